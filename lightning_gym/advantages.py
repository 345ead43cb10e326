"""Rewards of a group -> advantages. Pure functions on float64.

Groups are given by explicit ids, never by equal prompts. A group whose rewards are all equal has advantages of exactly
zero: floating-point residue would otherwise be divided by a standard deviation of almost nothing and train.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_gym.errors import AlignmentError

Baseline = Literal["group_mean", "leave_one_out"]
Scale = Literal["none", "group_std"]
_STD_FLOOR = 1e-6


def group_advantages(
    rewards: Sequence[float], group_ids: Sequence[int], *, baseline: Baseline = "group_mean", scale: Scale = "none"
) -> npt.NDArray[np.float64]:
    """How much better each rollout did than its group.

    Args:
        rewards: one a rollout, finite.
        group_ids: which group each rollout belongs to; same length.
        baseline: ``group_mean`` subtracts the mean of the group (GRPO); ``leave_one_out`` the mean of the *others*
            (RLOO), which is the centred reward times n / (n - 1).
        scale: ``group_std`` divides by the group's sample standard deviation (n - 1), as GRPO does; ``none`` leaves
            rewards in their own unit (Dr. GRPO).

    Returns:
        ``[rollout]``, in the order given. A group of one gets 0: it has nothing to be compared with.

    Raises:
        AlignmentError: lengths differ, or a reward is not finite.

    Source: Shao et al. 2024, arXiv:2402.03300 (group mean and std); Ahmadian et al. 2024, arXiv:2402.14740 (leave
        one out); Liu et al. 2025, arXiv:2503.20783 (no std).

    Example: two of four attempts succeed.

        >>> group_advantages([1, 0, 0, 1], [5, 5, 5, 5]).tolist()
        [0.5, -0.5, -0.5, 0.5]
        >>> group_advantages([0.1 + 0.2, 0.3], [1, 2]).tolist()
        [0.0, 0.0]
    """
    values = np.asarray(rewards, dtype=np.float64)
    groups = np.asarray(group_ids, dtype=np.int64)
    if values.shape != groups.shape:
        raise AlignmentError(f"{len(values)} rewards but {len(groups)} group ids")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise AlignmentError(
            f"reward {bad} is {values[bad]}; a rollout without a finite reward is a failure, not a sample"
        )
    result = np.zeros_like(values)
    for group in np.unique(groups):
        members = groups == group
        result[members] = _one_group(values[members], baseline, scale)
    return result


def _one_group(rewards: npt.NDArray[np.float64], baseline: Baseline, scale: Scale) -> npt.NDArray[np.float64]:
    count = len(rewards)
    if count == 1 or rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if baseline == "leave_one_out":
        centred *= count / (count - 1)
    if scale == "group_std":
        centred /= rewards.std(ddof=1) + _STD_FLOOR
    return centred


def zero_variance_frac(rewards: Sequence[float], group_ids: Sequence[int]) -> float:
    """Fraction of groups that teach nothing because all their rewards are equal."""
    by_group: dict[int, set[float]] = {}
    for reward, group in zip(rewards, group_ids, strict=True):
        by_group.setdefault(group, set()).add(reward)
    return sum(len(distinct) == 1 for distinct in by_group.values()) / max(1, len(by_group))
