r"""Splice: the prompt of a later turn is the *emitted* ids of the earlier turns plus the template's text after them.

Re-rendering a history and tokenizing it again gives other ids than were sampled (merged tokens, re-serialised tool
calls, dropped reasoning), so the logprobs would belong to a different sequence. A request continues a segment only
when it provably extends a call we served: same messages, same reply, same tools, and, where the client sends ids back,
the same ids. Anything else is rendered whole and opens a new segment, and the reason is recorded. Tokenization is
proportional to the new text; comparing and rendering are linear in the request.

With ``<|im_end|>`` = 2, a first call with prompt ``[1, 10, 7]`` that sampled ``[20, 21, 2]``, and the text that the
template writes for a tool's result and the next turn's start::

    prompt of call 2 = [1, 10, 7] + [20, 21, 2] + encode("\n<|im_start|>tool\n6<|im_end|>\n<|im_start|>assistant\n")

Had the first call run into its token limit after ``[20, 21]``, the template's own ``<|im_end|>`` follows as a prompt
token, which never trains.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.policy import breaks
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.conversation import Claim, Conversation, claimed_ids, last_claim, stand_for
from lightning_gym.policy.ledger import Served
from lightning_gym.rollout import SpliceBreak

OwnerOf = Callable[[Any, Any], str | None]
"""(prompt ids, sampled ids) -> the rollout that was given exactly these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spliced:
    """A prompt, and how it came about."""

    prompt_ids: list[int]
    num_encoded: int
    """Tokens that were tokenized for this prompt; the rest was known."""
    continues: Served | None
    """The call whose ids the prompt begins with."""
    broke: SpliceBreak | None


class Splicer:
    """Turns requests into prompt ids. Belongs to the thread of its `ChatFormat`.

    Args:
        chat: the model's chat template.
        owner_of: finds whose ids a client sent, for the record; nobody's where it is not given.
    """

    def __init__(self, chat: ChatFormat, owner_of: OwnerOf = lambda _prompt, _tokens: None) -> None:
        self._chat = chat
        self._owner_of = owner_of
        self._beginnings = Beginnings()

    def splice(self, request: Mapping[str, Any], said: Conversation, served: Sequence[Served]) -> Spliced:
        """Prompt ids of `request`, continuing one of the calls `served` to the same client where that is exact.

        Args:
            request: OpenAI's chat request.
            said: its conversation.
            served: the calls that may be continued, in order: those of the same rollout.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        found, broke = self._extended_call(request["messages"], said, served)
        if found:
            new_ids = self._tail_ids(request, said, found)
            if isinstance(new_ids, list):
                prompt_ids = [*found.call.prompt_ids[:], *found.call.token_ids, *new_ids]
                if broke:
                    broke = breaks.with_tokens(broke, prompt_ids, served[-1], self._chat.decode)
                return Spliced(prompt_ids=prompt_ids, num_encoded=len(new_ids), continues=found, broke=broke)
            broke = SpliceBreak(kind="template", call_index=len(served), detail=new_ids, likely_rule="no turn end")
        return self._whole(request, said, served, broke)

    def _tail_ids(self, request: Mapping[str, Any], said: Conversation, found: Served) -> list[int] | str:
        """Ids of what the template writes after the call `found`; in words, why that is not to be had."""
        index = len(found.told.messages) - 1
        prepared = [message.prepared for message in said.messages]
        try:
            tail = self._chat.render_after(prepared, index, said.prepared_tools, request.get("chat_template_kwargs"))
        except ConfigError as error:
            return str(error)
        turn_end = self._chat.turn_end_text
        if tail is None or not tail.startswith(turn_end):
            return f"after the assistant's words the template writes {(tail or '')[:80]!r}, expected {turn_end!r} first"
        # Encoded with the turn's end in front, which is special: nothing merges across it, and whatever a tokenizer
        # does at the beginning of a text it does before it.
        ids = self._chat.encode(tail)
        ended = found.call.token_ids and found.call.token_ids[-1] == self._chat.turn_end_id
        return ids[1:] if ended else ids

    def _whole(
        self, request: Mapping[str, Any], said: Conversation, served: Sequence[Served], broke: SpliceBreak | None
    ) -> Spliced:
        said_first = None if served else _key(request["messages"], said)
        known = self._beginnings.get(said_first) if said_first else None
        ids = known or self._encoded(request)
        if said_first and not known:
            self._beginnings.add(said_first, ids)
        if broke:
            closest = breaks.closest_call(said, served) if served else None
            broke = breaks.with_tokens(broke, ids, closest, self._chat.decode)
        return Spliced(prompt_ids=ids, num_encoded=0 if known else len(ids), continues=None, broke=broke)

    def _encoded(self, request: Mapping[str, Any]) -> list[int]:
        text = self._chat.render(request["messages"], request.get("tools"), request.get("chat_template_kwargs"))
        return self._chat.encode(text)

    def _extended_call(
        self, messages: Sequence[Mapping[str, Any]], said: Conversation, served: Sequence[Served]
    ) -> tuple[Served | None, SpliceBreak | None]:
        """The latest served call that the request extends, and why it is not the latest of all."""
        broke: SpliceBreak | None = None
        for candidate in reversed(served):
            told = candidate.told
            if said.messages[: len(told.messages)] != told.messages:
                continue
            if said.tools != told.tools or said.template_kwargs != told.template_kwargs:
                broke = broke or breaks.changed_context(said, told, len(served))
                continue
            index = len(told.messages) - 1
            claim = claimed_ids(messages[index])
            if claim is not None and not _is_of(claim, candidate):
                broke = broke or self._unknown_ids(index, claim, served)
                continue
            if candidate is not served[-1]:
                broke = broke or breaks.branched(said, candidate, served[-1], len(served))
            return candidate, broke
        last = last_claim(messages)
        if not broke and last and not any(_is_of(last[1], one) for one in served):
            broke = self._unknown_ids(*last, served)
        if not broke and served:
            broke = breaks.edited(said, breaks.closest_call(said, served), len(served))
        return None, broke

    def _unknown_ids(self, index: int, claim: Claim, served: Sequence[Served]) -> SpliceBreak:
        stale = next((one for one in served if _is_of(claim, one)), None)
        if stale:
            detail = f"message {index} carries the ids of call {stale.call.index}, whose reply it is not"
            rule = "stale ids"
        elif self._owner_of(*claim) is not None:
            detail = f"message {index} carries the ids of a call of another rollout"
            rule = "ids of another rollout"
        else:
            detail = f"message {index} carries ids that nobody was given, or that were forgotten since"
            rule = "fabricated ids"
        return SpliceBreak(kind="unknown_ids", call_index=len(served), detail=detail, likely_rule=rule)


Key = tuple[bytes, bytes, bytes]
"""What stands for messages, tools and template arguments."""


class Beginnings:
    """Prompts of conversations that have only begun: the attempts of a group begin alike.

    A date that a template writes is that of the first of them.

    Args:
        max_tokens: of all prompts that are held; the oldest go first.
    """

    def __init__(self, max_tokens: int = 1 << 20) -> None:
        self._max_tokens = max_tokens
        self._ids: OrderedDict[Key, array[int]] = OrderedDict()
        self._num_tokens = 0

    def get(self, key: Key) -> list[int] | None:
        ids = self._ids.get(key)
        return None if ids is None else ids.tolist()

    def add(self, key: Key, ids: Sequence[int]) -> None:
        self._ids[key] = array("l", ids)
        self._num_tokens += len(ids)
        while self._num_tokens > self._max_tokens:
            _, oldest = self._ids.popitem(last=False)
            self._num_tokens -= len(oldest)


def _key(messages: Sequence[Mapping[str, Any]], said: Conversation) -> Key | None:
    """Of all that reaches a prompt; ``None`` where it has no UTF-8 form, which the tokenizer refuses."""
    try:
        return stand_for(messages), said.tools, said.template_kwargs
    except UnicodeEncodeError:
        return None


def _is_of(claim: Claim, served: Served) -> bool:
    prompt_ids, token_ids = claim
    return token_ids == served.call.token_ids and prompt_ids == served.call.prompt_ids
