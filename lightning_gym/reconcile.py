"""Reconciliation: which of the calls that were served to a rollout are part of its answer.

The ledger knows every call exactly, but not what became of it: an answer may have been lost on the way and asked for
again, or belong to a judge that speaks to the same endpoint. The ``/run`` result knows what the agent kept, but its ids
went through other hands. So a call counts, with the engine's own numbers, by one of two rules:

* The result carries ids. A call counts if its ids came back, or if a call that counts continues it: then the agent had
  its tokens in the history, whether or not it handed the ids on. Of several equal ones that is the last.
* The result lost every id. Calls that begin with the same prompt, or continue one another, are one conversation. Of a
  conversation the last call counts, and every call that it continues, one by one. So a call that a retry superseded,
  or a branch that was given up, does not; conversations that share no beginning (a compacted history, a sub-agent)
  each count.

Calls that do not count are dropped and counted. Ids that came back but do not agree with what was served fail the
rollout, whatever else is right with it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_gym.gym.number_arrays import NumberArray
from lightning_gym.gym.wire import Bundle, Played
from lightning_gym.policy.ledger import Entry
from lightning_gym.rollout import Call, Failure, FailureKind, Misaligned, Misalignment, Rollout

_LOGPROB_TOLERANCE = 1e-5  # nats; float32 or six digits on the way are no disagreement


def finished(base: Rollout, played: Played, entry: Entry) -> Rollout:
    """`base` with what was played and the calls that made it; failed where those do not agree, or there were none.

    Args:
        base: the rollout as it began.
        played: the result of ``/run``.
        entry: the rollout's page of the ledger.
    """
    calls = reconcile(entry, played.bundles)
    ending: dict[str, Any]
    if isinstance(calls, Failure):
        why = "; its first prompt did not fit the context window" if played.context_overflow else ""
        ending = {"failure": replace(calls, message=f"rollout {base.rollout_id}: {calls.message}{why}")}
    else:
        ending = {
            "reward": played.reward,
            "calls": calls,
            "unconfirmed_calls": len(entry.served) - len(calls),
            "ids_lost": not played.bundles,
            "truncated": played.truncated or any(call.finish_reason == "length" for call in calls),
            "masked": played.masked,
        }
    return replace(
        base,
        output=played.output,
        prompt=played.prompt,
        context_overflow=played.context_overflow,
        invalid_tool_calls=played.invalid_tool_calls,
        metrics=played.metrics,
        reward_components=played.reward_components,
        **ending,
    )


def reconcile(entry: Entry, bundles: Sequence[Bundle]) -> list[Call] | Failure:
    """The calls of a rollout that are part of its answer, in the order they were served.

    Args:
        entry: what was served.
        bundles: what came back.

    Returns:
        One call or more; a `Failure` where nothing was served, or a `Misaligned` one where something came back that
        was not served like that.
    """
    calls = [served.call for served in entry.served]
    if not bundles:
        counting = last_of_each_conversation(calls)
    else:
        counting = _confirmed(calls, bundles)
        if isinstance(counting, Failure):
            return counting
    if not counting:
        return Failure(kind=FailureKind.NO_TOKEN_IDS, message="the rollout came back without a call that was served")
    return [calls[index] for index in sorted(_with_history(calls, counting))]


def last_of_each_conversation(calls: Sequence[Call]) -> set[int]:
    """Indices of the last call of every conversation.

    Example: a second sample from the same prompt was gone on with, and a sub-agent spoke in between.

        >>> def call(prompt_ids, token_ids):
        ...     return Call(
        ...         index=0,
        ...         prompt_ids=prompt_ids,
        ...         token_ids=token_ids,
        ...         logprobs=[],
        ...         finish_reason="stop",
        ...         weight_version=0,
        ...     )
        >>> calls = [call([1], [2]), call([1], [3]), call([8], [9]), call([1, 3, 4], [5])]
        >>> sorted(last_of_each_conversation(calls))
        [2, 3]
    """
    conversation: list[int] = []
    for index, call in enumerate(calls):
        earlier = (
            before
            for before in reversed(range(index))
            if call.continues(calls[before]) or call.prompt_ids == calls[before].prompt_ids
        )
        found = next(earlier, None)
        conversation.append(index if found is None else conversation[found])
    return set({first: index for index, first in enumerate(conversation)}.values())


def _with_history(calls: Sequence[Call], counting: set[int]) -> set[int]:
    """`counting`, and every call whose tokens one of them was fed; of equal ones, the last."""
    known = set(counting)
    for before in reversed(range(len(calls))):
        earlier = calls[before]
        if before in counting or not any(calls[index].continues(earlier) for index in counting if index > before):
            continue
        if not any(_same_tokens(calls[index], earlier) for index in known):
            known.add(before)
    return known


def _same_tokens(one: Call, other: Call) -> bool:
    return one.token_ids == other.token_ids and one.prompt_ids == other.prompt_ids


def _confirmed(calls: Sequence[Call], bundles: Sequence[Bundle]) -> set[int] | Misaligned:
    """Indices of the calls whose ids came back."""
    order: list[int] = []
    for position, bundle in enumerate(bundles):
        expected = order[-1] + 1 if order else 0
        before = (calls[order[-1]], bundles[position - 1]) if order else None
        if expected < len(calls) and expected not in order and _same_ids(calls[expected], bundle, before):
            found = expected  # nearly always
        else:
            others = (*range(expected, len(calls)), *range(expected))
            found = next((other for other in others if other not in order and _same_ids(calls[other], bundle)), None)
        # Compared as text, which is not read for it; asking for their number would.
        same = found is not None and bundle.logprobs == calls[found].logprobs
        if found is None or not (same or len(bundle.logprobs) == len(calls[found].logprobs)):
            duplicate = any(_same_ids(calls[index], bundle) for index in order)
            return _disagreement(position, bundle, calls, expected, duplicate=duplicate)
        wrong = None if same else _wrong_logprob(calls[found], bundle)
        if wrong is not None:
            message = (
                f"call {position} came back with {bundle.logprobs[wrong]!r} as logprob of sampled token {wrong}; call "
                f"{calls[found].index} was served with {calls[found].logprobs[wrong]!r}"
            )
            return Misaligned(how=Misalignment.WRONG_LOGPROBS, message=message)
        order.append(found)
    return _early(order, calls) or set(order)


def _same_ids(call: Call, bundle: Bundle, before: tuple[Call, Bundle] | None = None) -> bool:
    """Whether a bundle has the ids of a call; `before` has those of another, of which this may be the continuation.

    Then only what is new in the prompt is compared number by number, the rest as text with what came back before.
    """
    if bundle.token_ids != call.token_ids:
        return False
    if before is not None and call.continues(before[0]):
        known, prompt = before[1].prompt_ids, bundle.prompt_ids
        new = prompt.after(known) if isinstance(prompt, NumberArray) and isinstance(known, NumberArray) else None
        if new is not None:
            return new == call.prompt_ids[len(before[0].prompt_ids) :]
    return bundle.prompt_ids == call.prompt_ids[:]


def _wrong_logprob(call: Call, bundle: Bundle) -> int | None:
    """The first sampled token whose logprob came back as another one; there are as many."""
    for position, (got, want) in enumerate(zip(bundle.logprobs, call.logprobs, strict=True)):
        if not isinstance(got, int | float) or not abs(got - want) <= _LOGPROB_TOLERANCE:  # a NaN is never close
            return position
    return None


def _early(order: Sequence[int], calls: Sequence[Call]) -> Misaligned | None:
    """What is wrong with calls that came back in the order `order`, where one precedes a call that it continues."""
    latest = -1
    for position, index in enumerate(order):
        if index < latest:  # branches may end in any order, so only a call that this one is the history of is wrong
            after = next((earlier for earlier in order[:position] if calls[earlier].continues(calls[index])), None)
            if after is not None:
                message = (
                    f"call {position} came back with ids that were served before those of call "
                    f"{order.index(after)}, which continues it; {len(calls)} served"
                )
                return Misaligned(how=Misalignment.OTHER_ORDER, message=message)
        latest = max(latest, index)
    return None


def _disagreement(
    position: int, bundle: Bundle, calls: Sequence[Call], expected: int, *, duplicate: bool
) -> Misaligned:
    counts = f"{len(bundle.prompt_ids)} prompt ids and {len(bundle.token_ids)} sampled ids"
    if not bundle.is_whole:
        how = Misalignment.PARTIAL_IDS
        what = f"{counts}, but {len(bundle.logprobs)} logprobs: an incomplete token bundle"
    elif not all(isinstance(i, int) and i >= 0 for i in (*bundle.prompt_ids, *bundle.token_ids)):
        how, what = Misalignment.OUT_OF_VOCABULARY, f"{counts}, some of them negative or no whole numbers"
    elif duplicate:
        how, what = Misalignment.DUPLICATE, f"{counts} that were served to this rollout, but less often"
    else:
        how = Misalignment.NOT_SERVED
        what = f"{counts} that were not served to this rollout{_first_difference(bundle, calls[expected:])}"
    return Misaligned(how=how, message=f"call {position} came back with {what}; {len(calls)} served")


def _first_difference(bundle: Bundle, rest: Sequence[Call]) -> str:
    """Where the ids leave the next call that was served."""
    if not rest:
        return ""
    call = rest[0]
    for name, back, served in (
        ("prompt", bundle.prompt_ids, call.prompt_ids),
        ("sampled", bundle.token_ids, call.token_ids),
    ):
        for position, (got, want) in enumerate(zip(back, served, strict=False)):
            if got != want:
                return f": {name} id {position} is {got}, call {call.index} had {want}"
    return f": call {call.index} had {len(call.prompt_ids)} and {len(call.token_ids)}"
