"""Rewards of a group -> advantages. Pure functions on float64.

Groups are given by explicit ids, never by equal prompts. A group whose rewards are all equal has advantages of exactly
zero: floating-point residue would otherwise be divided by a standard deviation of almost nothing and train.

Every function wants the rollouts of all ranks: a group is whole on one of them, but a batch is not.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_gym.errors import AlignmentError, ConfigError

Baseline = Literal["group_mean", "leave_one_out"]
Scale = Literal["none", "group_std", "batch_std"]
_STD_FLOOR = 1e-6
_RESIDUE = 1e-9
"""Standard deviations. Components that cancel leave rounding errors, which must not be scaled up to an advantage."""


def group_advantages(
    rewards: Sequence[float], group_ids: Sequence[int], *, baseline: Baseline = "group_mean", scale: Scale = "none"
) -> npt.NDArray[np.float64]:
    """How much better each rollout did than its group.

    Args:
        rewards: one a rollout, finite.
        group_ids: which group each rollout belongs to; same length.
        baseline: ``group_mean`` subtracts the mean of the group (GRPO); ``leave_one_out`` the mean of the *others*
            (RLOO), which is the centred reward times n / (n - 1).
        scale: ``group_std`` divides by the group's sample standard deviation (n - 1), as GRPO does; ``batch_std`` by
            that of all rewards given, so that a group which hardly differs does not count like one that does;
            ``none`` leaves rewards in their own unit (Dr. GRPO).

    Returns:
        ``[rollout]``, in the order given. A group of one gets 0: it has nothing to be compared with.

    Raises:
        AlignmentError: lengths differ, or a reward is not finite.

    Source: Shao et al. 2024, arXiv:2402.03300 (group mean and std); Ahmadian et al. 2024, arXiv:2402.14740 (leave
        one out); Liu et al. 2025, arXiv:2503.20783 (no std); Khatri et al. 2025, arXiv:2510.13786 (batch std).

    Example: two of four attempts succeed.

        >>> group_advantages([1, 0, 0, 1], [5, 5, 5, 5]).tolist()
        [0.5, -0.5, -0.5, 0.5]
        >>> group_advantages([0.1 + 0.2, 0.3], [1, 2]).tolist()
        [0.0, 0.0]
        >>> group_advantages([1, 0, 3, 1], [1, 1, 2, 2], scale="batch_std").round(3).tolist()
        [0.397, -0.397, 0.795, -0.795]
    """
    values, groups = _checked(rewards, group_ids)
    result = np.zeros_like(values)
    for group in np.unique(groups):
        members = groups == group
        result[members] = _centred(values[members], baseline)
        if scale == "group_std":
            result[members] /= _deviation(values[members])
    return result / _deviation(values) if scale == "batch_std" else result


def component_advantages(
    components: Sequence[Mapping[str, float]],
    group_ids: Sequence[int],
    *,
    weights: Mapping[str, float] | None = None,
    baseline: Baseline = "group_mean",
) -> npt.NDArray[np.float64]:
    """Advantages of several rewards, each measured in the group's own standard deviations before they are added.

    A component that varies over a large range does not drown one that varies over a small one. The sum is divided by
    its standard deviation over the batch.

    Args:
        components: one mapping a rollout, from a reward's name to its value; all with the same names.
        group_ids: which group each rollout belongs to; same length.
        weights: of the components; 1 each if ``None``.
        baseline: see `group_advantages`.

    Returns:
        ``[rollout]``, in the order given.

    Raises:
        AlignmentError: lengths differ, a value is not finite, or a rollout lacks a component that another has.
        ConfigError: a weight names a component that no rollout has.

    Source: Liu et al. 2026, arXiv:2601.05242 (GDPO).

    Example: one rollout is right, the other well-formed; both count the same although one is worth 10 times the other.

        >>> rollouts = [{"right": 10, "formed": 0}, {"right": 0, "formed": 1}, {"right": 0, "formed": 0}]
        >>> component_advantages(rollouts, [0, 0, 0]).round(3).tolist()
        [0.577, 0.577, -1.155]
    """
    names = sorted({name for rollout in components for name in rollout})
    for index, rollout in enumerate(components):
        if missing := [name for name in names if name not in rollout]:
            raise AlignmentError(
                f"rollout {index} has no reward component {', '.join(missing)}, but another has; expected "
                f"{', '.join(names)} of each. An environment returns the same components for every rollout"
            )
    if names and (unknown := sorted(set(weights or ()) - set(names))):
        raise ConfigError(f"reward_weights names {', '.join(unknown)}; the environments return {', '.join(names)}")
    total = np.zeros(len(components))
    for name in names:
        weight = 1.0 if weights is None else weights.get(name, 0.0)
        total += weight * _standardised([rollout[name] for rollout in components], group_ids, baseline)
    total[np.abs(total) < _RESIDUE] = 0.0
    return total / (total.std(ddof=1) if total.any() else 1.0)


def overlong_penalty(sampled_tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """What is added to the reward of a long answer: 0, then a slope over the buffer, then -1.

    Args:
        sampled_tokens: of the rollout.
        max_tokens: from here on the penalty is -1.
        buffer_tokens: it sets in this many tokens before.

    Source: Yu et al. 2025, arXiv:2503.14476, eq. 13.

    Example: a limit of 100 tokens, the last 20 of which cost.

        >>> [overlong_penalty(length, max_tokens=100, buffer_tokens=20) for length in (80, 85, 100, 120)]
        [0.0, -0.25, -1.0, -1.0]
    """
    return max(-1.0, min(0.0, (max_tokens - buffer_tokens - sampled_tokens) / buffer_tokens))


def varied_groups(rewards: Sequence[Hashable], group_ids: Sequence[int]) -> set[int]:
    """The groups whose rewards are not all equal: those that teach.

    Example:
        >>> varied_groups([1, 1, 0, 1], [7, 7, 8, 8])
        {8}
    """
    seen: dict[int, set[Hashable]] = {}
    for reward, group in zip(rewards, group_ids, strict=True):
        seen.setdefault(group, set()).add(reward)
    return {group for group, distinct in seen.items() if len(distinct) > 1}


def zero_variance_frac(rewards: Sequence[float], group_ids: Sequence[int]) -> float:
    """Fraction of groups that teach nothing because all their rewards are equal."""
    varied = varied_groups(rewards, group_ids)
    return 1 - len(varied) / len(set(group_ids)) if group_ids else 0.0


def _checked(
    rewards: Sequence[float], group_ids: Sequence[int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    values = np.asarray(rewards, dtype=np.float64)
    groups = np.asarray(group_ids, dtype=np.int64)
    if values.shape != groups.shape:
        raise AlignmentError(f"{len(values)} rewards but {len(groups)} group ids")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise AlignmentError(
            f"reward {bad} is {values[bad]}; a rollout without a finite reward is a failure, not a sample"
        )
    return values, groups


def _centred(rewards: npt.NDArray[np.float64], baseline: Baseline) -> npt.NDArray[np.float64]:
    count = len(rewards)
    if count == 1 or rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred * count / (count - 1) if baseline == "leave_one_out" else centred


def _standardised(rewards: Sequence[float], group_ids: Sequence[int], baseline: Baseline) -> npt.NDArray[np.float64]:
    """Centred, in the standard deviations of the group; exactly 0 where it has none."""
    values, groups = _checked(rewards, group_ids)
    result = np.zeros_like(values)
    for group in np.unique(groups):
        members = groups == group
        centred = _centred(values[members], baseline)
        result[members] = centred / values[members].std(ddof=1) if centred.any() else 0.0
    return result


def _deviation(values: npt.NDArray[np.float64]) -> float:
    """Sample standard deviation (n - 1), never 0; exactly the floor where nothing deviates."""
    varies = len(values) > 1 and values.max() != values.min()
    return (float(values.std(ddof=1)) if varies else 0.0) + _STD_FLOOR
