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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.ledger import Served
from lightning_gym.rollout import SpliceBreak

Canonical = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What shapes a prompt, in comparable form."""

    messages: tuple[Canonical, ...]
    context: Canonical
    """Tools and template arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spliced:
    """A prompt, and how it came about."""

    prompt_ids: list[int]
    num_encoded: int
    """Tokens that were tokenized for this prompt; the rest was known."""
    broke: SpliceBreak | None


def canonical_message(message: Mapping[str, Any]) -> Canonical:
    """A message reduced to what it says; ids, nulls and empty lists do not count.

    Example:
        >>> canonical_message({"role": "assistant", "content": None, "tool_calls": []})
        ('assistant', '', '', (), None)
    """
    role = message.get("role")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] if part.get("type") == "text" else repr(part) for part in content)
    content = content or ""
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    calls = tuple(
        (call["function"]["name"], _canonical_arguments(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    )
    if role == "assistant":  # Gym joins and re-splits assistant text, which may trim its ends
        content, reasoning = content.strip(), reasoning.strip()
    return (role, content, reasoning, calls, message.get("tool_call_id"))


def _canonical_arguments(arguments: Any) -> str:
    """A call's arguments however a client spaces, orders or escapes their JSON: the ids say how they were sampled."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments
    return json.dumps(arguments, sort_keys=True)


def conversation(request: Mapping[str, Any]) -> Conversation:
    """The conversation of a chat request."""
    return Conversation(
        messages=tuple(canonical_message(message) for message in request["messages"]),
        context=(repr(request.get("tools") or None), repr(request.get("chat_template_kwargs") or None)),
    )


class Splicer:
    """Turns requests into prompt ids. Belongs to the thread of its `ChatFormat`."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat

    def splice(self, request: Mapping[str, Any], said: Conversation, served: Sequence[Served]) -> Spliced:
        """Prompt ids of `request`, continuing one of the calls `served` to the same rollout where that is exact.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        found = _extended_call(request["messages"], said, served)
        if isinstance(found, SpliceBreak):
            return self._whole(request, found)
        if found is None:
            return self._whole(request, None)
        index = len(found.messages)
        tail = self._chat.render_after(
            request["messages"], index, request.get("tools"), request.get("chat_template_kwargs")
        )
        turn_end = self._chat.turn_end_text
        if tail is None or not tail.startswith(turn_end):
            detail = (
                f"after the assistant's words the template writes {(tail or '')[:80]!r}, expected {turn_end!r} first"
            )
            return self._whole(request, SpliceBreak(kind="template", call_index=len(served), detail=detail))
        call = found.call
        if call.token_ids and call.token_ids[-1] == self._chat.turn_end_id:
            tail = tail[len(turn_end) :]
        new_ids = self._chat.encode(tail)
        broke = None
        if found is not served[-1]:
            detail = f"continues call {call.index}, not the latest call {served[-1].call.index}"
            broke = SpliceBreak(kind="branch", call_index=len(served), detail=detail)
        return Spliced(prompt_ids=[*call.prompt_ids, *call.token_ids, *new_ids], num_encoded=len(new_ids), broke=broke)

    def _whole(self, request: Mapping[str, Any], broke: SpliceBreak | None) -> Spliced:
        text = self._chat.render(request["messages"], request.get("tools"), request.get("chat_template_kwargs"))
        ids = self._chat.encode(text)
        return Spliced(prompt_ids=ids, num_encoded=len(ids), broke=broke)


def _extended_call(
    messages: Sequence[Mapping[str, Any]], said: Conversation, served: Sequence[Served]
) -> Served | SpliceBreak | None:
    """The latest served call that the request extends; why there is none; ``None`` for a first turn."""
    if not served:
        return None
    reason = SpliceBreak(kind="edited_history", call_index=len(served), detail=_first_difference(said, served[-1]))
    for candidate in reversed(served):
        index = len(candidate.messages)
        if said.messages[:index] != candidate.messages or said.messages[index : index + 1] != (candidate.reply,):
            continue
        if said.context != candidate.context:
            detail = "tools or chat_template_kwargs differ from the earlier call's"
            reason = SpliceBreak(kind="changed_tools", call_index=len(served), detail=detail)
            continue
        if not _ids_agree(messages[index], candidate):
            detail = f"message {index} carries ids that call {candidate.call.index} was not given"
            reason = SpliceBreak(kind="unknown_ids", call_index=len(served), detail=detail)
            continue
        return candidate
    return reason


def _ids_agree(message: Mapping[str, Any], candidate: Served) -> bool:
    """Whether the ids a client sent back, if any, are the ones it was given."""
    if not message.get(wire.PROMPT_TOKEN_IDS):
        return True
    return (
        message[wire.PROMPT_TOKEN_IDS] == candidate.call.prompt_ids
        and message.get(wire.GENERATION_TOKEN_IDS) == candidate.call.token_ids
    )


def _first_difference(said: Conversation, latest: Served) -> str:
    expected = (*latest.messages, latest.reply)
    for index, want in enumerate(expected):
        got = said.messages[index] if index < len(said.messages) else None
        if got != want:
            return f"message {index}: the earlier turn had {want!r}, this request has {got!r}"
    return "the earlier turn is a prefix of this request"
