"""Trajectory: a rollout as flat arrays, one per segment.

Calls are chained while each prompt starts with everything before it, exactly; where one does not, a new segment
begins. Nothing is repaired: what does not line up is refused, and the message says where.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gym.errors import AlignmentError
from lightning_gym.rollout import Call, Rollout

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

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """Tokens that train."""
        return int(self.loss_mask.sum())


def trajectories(rollout: Rollout) -> list[Trajectory]:
    """Chain the calls of a rollout into segments.

    Raises:
        AlignmentError: a call has no tokens, a count that differs between ids and logprobs, or a logprob that is not
            a finite number of at most zero.
    """
    segments: list[list[Call]] = []
    seen: list[int] = []
    for call in rollout.calls:
        _check(call, rollout)
        prompt = list(call.prompt_ids)
        if not segments or len(prompt) < len(seen) or prompt[: len(seen)] != seen:
            segments.append([])
        segments[-1].append(call)
        seen = [*prompt, *call.token_ids]
    return [_segment(rollout, index, calls) for index, calls in enumerate(segments)]


def _segment(rollout: Rollout, index: int, calls: Sequence[Call]) -> Trajectory:
    last = calls[-1]
    length = len(last.prompt_ids) + len(last.token_ids)
    token_ids = np.empty(length, dtype=np.int64)
    token_ids[: len(last.prompt_ids)] = last.prompt_ids
    token_ids[len(last.prompt_ids) :] = last.token_ids
    loss_mask = np.zeros(length, dtype=np.bool_)
    logprobs = np.zeros(length, dtype=np.float32)
    versions = np.full(length, -1, dtype=np.int64)
    for call in calls:
        span = slice(len(call.prompt_ids), len(call.prompt_ids) + len(call.token_ids))
        loss_mask[span] = True
        logprobs[span] = call.logprobs
        versions[span] = call.weight_version
    return Trajectory(
        rollout_id=rollout.rollout_id,
        segment=index,
        group_id=rollout.group_id,
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=logprobs,
        weight_versions=versions,
    )


def _check(call: Call, rollout: Rollout) -> None:
    where = f"rollout {rollout.rollout_id} (task {rollout.task_index}, attempt {rollout.attempt}), call {call.index}"
    if not call.prompt_ids or not call.token_ids:
        raise AlignmentError(
            f"{where}: {len(call.prompt_ids)} prompt ids and {len(call.token_ids)} sampled ids; expected some of each"
        )
    if len(call.token_ids) != len(call.logprobs):
        raise AlignmentError(f"{where}: {len(call.token_ids)} sampled ids but {len(call.logprobs)} logprobs")
    for position, logprob in enumerate(call.logprobs):
        if not math.isfinite(logprob) or logprob > _LOGPROB_SLACK:
            raise AlignmentError(
                f"{where}: logprob of sampled token {position} is {logprob}; expected a finite number of at most 0"
            )
