"""Splice breaks, told for a reader: where a request leaves what was served, in words and in tokens, and probably why.

Computed only when a segment breaks. The likely rule is a guess from the two conversations and never decides anything.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_gym.policy.conversation import Canonical, Conversation, Said
from lightning_gym.policy.ledger import Served
from lightning_gym.rollout import SpliceBreak

_WINDOW_TOKENS = 8  # on either side of the first difference
_WINDOW_CHARS = 100
_SPELLING = re.compile(r"""[\s"'\\]""")


def closest_call(said: Conversation, served: Sequence[Served]) -> Served:
    """The served call that shares most messages with a request; of several, the latest."""
    return max(reversed(served), key=lambda one: first_difference(one.told.messages, said.messages))


def first_difference(want: Sequence[object], got: Sequence[object]) -> int:
    """Index of the first message, token or character that differs; the length of the shorter where none does."""
    return next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))


def with_tokens(
    broke: SpliceBreak, prompt_ids: Sequence[int], expected: Served | None, decode: Callable[[Sequence[int]], str]
) -> SpliceBreak:
    """The break with its place in tokens: where the new prompt leaves the ids of the call `expected`."""
    if expected is None:
        return broke
    want = [*expected.call.prompt_ids, *expected.call.token_ids]
    offset = first_difference(want, prompt_ids)
    window = slice(max(0, offset - _WINDOW_TOKENS), offset + _WINDOW_TOKENS)
    return replace(broke, token_offset=offset, expected_text=decode(want[window]), got_text=decode(prompt_ids[window]))


def edited(said: Conversation, closest: Served, call_index: int) -> SpliceBreak:
    """The break of a request whose messages are not those of any earlier turn."""
    want, got = closest.told.messages, said.messages
    index = first_difference(want, got)
    ours = tuple(want[index].canonical) if index < len(want) else None
    theirs = tuple(got[index].canonical) if index < len(got) else None
    left, right = _around_difference(repr(ours), repr(theirs))
    return SpliceBreak(
        kind="edited_history",
        call_index=call_index,
        detail=f"message {index}: the earlier turn had {left}, this request has {right}",
        likely_rule=likely_rule(want, got),
    )


def branched(said: Conversation, found: Served, latest: Served, call_index: int) -> SpliceBreak:
    """The break of a request that goes on from an earlier call than the latest."""
    *asked, reply = latest.told.messages
    if _says_nothing(reply.canonical):
        rule = "empty turn dropped"
    else:
        rule = "request repeated" if asked == list(said.messages) else "parallel branch"
    return SpliceBreak(
        kind="branch",
        call_index=call_index,
        detail=f"continues call {found.call.index}, not the latest call {latest.call.index}",
        likely_rule=rule,
    )


def changed_context(said: Conversation, told: Conversation, call_index: int) -> SpliceBreak:
    """The break of a request that goes on with other tools or template arguments."""
    return SpliceBreak(
        kind="changed_tools",
        call_index=call_index,
        detail="tools or chat_template_kwargs differ from the earlier call's",
        likely_rule="tools changed" if said.tools != told.tools else "template arguments changed",
    )


def _around_difference(left: str, right: str) -> tuple[str, str]:
    start = first_difference(left, right)
    start = 0 if start < _WINDOW_CHARS else start - _WINDOW_CHARS // 2
    return _clipped(left, start), _clipped(right, start)


def _clipped(text: str, start: int) -> str:
    end = start + 2 * _WINDOW_CHARS
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def likely_rule(want: Sequence[Said], got: Sequence[Said]) -> str:
    """What probably happened to a conversation between an earlier turn and a request that does not go on from it.

    Args:
        want: messages of the earlier turn, its reply last.
        got: messages of the request.
    """
    index = first_difference(want, got)
    if index == len(got):
        return "request repeated" if len(got) == len(want) - 1 else "history cut back"
    if got[index] == want[min(index + 1, len(want) - 1)]:
        return "message dropped"
    if want[index] in got[index + 1 :]:
        return "message inserted"
    if len(got) < len(want):
        return "history compacted"
    return _rule_of_message(want[index].canonical, got[index].canonical)


def _rule_of_message(ours: Canonical, theirs: Canonical) -> str:
    if ours.role != theirs.role:
        if ours.role != "assistant":
            return "history rewritten"
        return "empty turn dropped" if _says_nothing(ours) else "assistant's turn dropped"
    if ours.role in ("system", "developer"):
        return "system text changed"
    if ours.reasoning and not theirs.reasoning:
        moved = ours.reasoning in theirs.content
        return "reasoning moved into the content" if moved else "earlier reasoning dropped"
    if ours.calls != theirs.calls:
        return "tool call re-serialised" if _spelled_alike(ours, theirs) else "tool call edited"
    return "content trimmed" if ours.content.split() == theirs.content.split() else "message edited"


def _says_nothing(message: Canonical) -> bool:
    return not (message.content or message.calls)


def _spelled_alike(ours: Canonical, theirs: Canonical) -> bool:
    """Whether two messages make the same calls but for quotes and white space, or in their content."""
    if not ours.calls or not theirs.calls:
        called, spoken = (ours, theirs) if ours.calls else (theirs, ours)
        return all(name in spoken.content for name, _ in called.calls)
    return [(n, _SPELLING.sub("", a)) for n, a in ours.calls] == [(n, _SPELLING.sub("", a)) for n, a in theirs.calls]
