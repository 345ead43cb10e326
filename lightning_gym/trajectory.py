"""Trajectory: a rollout as flat arrays, one per segment.

Calls are chained where a prompt starts with everything that an earlier call was fed and sampled, exactly; where it
starts with no call's, a new segment begins. Nothing is repaired: what does not line up is refused, and the message
says where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack_into

import numpy as np
import numpy.typing as npt

from lightning_gym.errors import AlignmentError
from lightning_gym.rollout import Call, Rollout

_LOWEST = float(np.finfo(np.float32).min)
_LOGPROB_SLACK = 1e-6  # a probability of one may come out of float32 as a hair above zero nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One segment of a rollout. Index t of every array speaks about token t.

    Example: two calls, ``[1, 10, 7] -> [20, 2]`` and ``[1, 10, 7, 20, 2, 30, 7] -> [24, 2]``, make one trajectory::

        token_ids        = [1, 10, 7, 20,  2,   30, 7, 24,  2 ]
        loss_mask        = [F, F,  F, T,   T,   F,  F, T,   T ]
        rollout_logprobs = [0, 0,  0, -.3, -.1, 0,  0, -.2, -.1]

    Token 30 (a tool's answer) and the second 7 (the next generation prompt) are prompt tokens and never train.
    """

    rollout_id: str
    segment: int
    """0 for the rollout's first segment."""
    group_id: int
    token_ids: npt.NDArray[np.int64]
    """``[seq]``."""
    loss_mask: npt.NDArray[np.bool_]
    """``[seq]``, true exactly where the policy sampled the token."""
    rollout_logprobs: npt.NDArray[np.float32]
    """``[seq]``, nats; 0 where the mask is false."""
    weight_versions: npt.NDArray[np.int64]
    """``[seq]``, the optimizer step whose weights sampled the token; -1 where the mask is false."""
    call_indices: tuple[int, ...] = ()
    """Of the calls in it, in order; empty where it was made by hand."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """Tokens that train."""
        return int(self.loss_mask.sum())


def trajectories(rollout: Rollout) -> list[Trajectory]:
    """Chain the calls of a rollout into segments, in the order their first calls were served.

    A call joins the segment whose tokens are the longest beginning of its prompt, and opens one where there is none.
    So conversations of sub-agents may be interleaved. Where several calls continue the same one, the first joins it;
    for the others the shared history is prompt, and every sampled token trains exactly once.

    Raises:
        AlignmentError: a call has no tokens, a count that differs between ids and logprobs, or a logprob that is not
            a finite number of at most zero.
    """
    segments: list[list[Call]] = []
    for call in rollout.calls:
        _check_counts(call, rollout)
        continued = [segment for segment in segments if call.continues(segment[-1])]
        if continued:
            max(continued, key=lambda segment: segment[-1].num_tokens).append(call)
        else:
            segments.append([call])
    return [_segment(rollout, index, calls) for index, calls in enumerate(segments)]


def _segment(rollout: Rollout, index: int, calls: Sequence[Call]) -> Trajectory:
    last = calls[-1]
    token_ids = np.empty(last.num_tokens, dtype=np.int64)
    pack_into(f"{last.num_tokens}q", token_ids.data, 0, *last.prompt_ids[:], *last.token_ids)
    loss_mask = np.zeros(len(token_ids), dtype=np.bool_)
    logprobs = np.zeros(len(token_ids), dtype=np.float32)
    versions = np.full(len(token_ids), -1, dtype=np.int64)
    for call in calls:
        start = len(call.prompt_ids)
        span = slice(start, start + len(call.token_ids))
        loss_mask[span] = True
        versions[span] = call.weight_version
        _write_logprobs(logprobs, start, call, rollout)
    if not (logprobs.max() <= _LOGPROB_SLACK and logprobs.min() > -np.inf):  # the maximum of a NaN is one
        raise _bad_logprob(calls, rollout)
    return Trajectory(
        rollout_id=rollout.rollout_id,
        segment=index,
        group_id=rollout.group_id,
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=logprobs,
        weight_versions=versions,
        call_indices=tuple(call.index for call in calls),
    )


def _check_counts(call: Call, rollout: Rollout) -> None:
    if not call.prompt_ids or not call.token_ids:
        raise AlignmentError(
            f"{_where(call, rollout)}: {len(call.prompt_ids)} prompt ids and {len(call.token_ids)} sampled ids; "
            "expected some of each"
        )
    if len(call.token_ids) != len(call.logprobs):
        raise AlignmentError(
            f"{_where(call, rollout)}: {len(call.token_ids)} sampled ids but {len(call.logprobs)} logprobs"
        )


def _write_logprobs(logprobs: npt.NDArray[np.float32], start: int, call: Call, rollout: Rollout) -> None:
    try:
        offset = start * logprobs.itemsize
        pack_into(f"{len(call.logprobs)}f", logprobs.data, offset, *call.logprobs)  # a third of the time of `np.array`
    except OverflowError:  # finite, and beyond float32
        raise _bad_logprob([call], rollout) from None


def _bad_logprob(calls: Sequence[Call], rollout: Rollout) -> AlignmentError:
    call, position = next(
        (call, position)
        for call in calls
        for position, logprob in enumerate(call.logprobs)
        if not _LOWEST <= logprob <= _LOGPROB_SLACK
    )
    return AlignmentError(
        f"{_where(call, rollout)}: logprob of sampled token {position} is {call.logprobs[position]}; expected a finite "
        "number of at most 0"
    )


def _where(call: Call, rollout: Rollout) -> str:
    return f"rollout {rollout.rollout_id} (task {rollout.task_index}, attempt {rollout.attempt}), call {call.index}"
