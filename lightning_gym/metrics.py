"""Names and arithmetic of what is logged. No logger, no trainer.

Names are ``area/quantity``; a unit is part of the name (``_s``, ``_bytes``, ``_frac``). Means are carried as (sum,
count) and divided once, so that micro-batches of different sizes count by what is in them.
"""

import time
from collections.abc import Mapping, Sequence

from lightning_gym.rollout import Rollout

REWARD = "rollout/reward_mean"
"""Mean reward of the rollouts that are trained on; what the progress bar shows."""
LOGPROB_DIFF_MAX = "train/logprob_diff_max"
TOKEN_MULT_PROB_ERROR = "train/token_mult_prob_error"
LOSS = "train/loss"
PHASES = ("sync", "collect", "prepare", "train")
"""Of an optimizer step, in order. ``time/<phase>_s`` is wall time, ``time/<phase>_cpu_s`` CPU time of this process."""
ROLLOUTS = "rollout/count"
DROPPED = "rollout/dropped"
MISALIGNED = "rollout/misaligned"


def rollout_metrics(rollouts: Sequence[Rollout], survivors: Sequence[Rollout]) -> dict[str, float]:
    """What a collection was like.

    Args:
        rollouts: all of it.
        survivors: those that are trained on; rewards, lengths and turns are theirs.
    """
    rewards = [rollout.reward or 0.0 for rollout in survivors]
    mean = _mean(rewards)
    sampled = [sum(len(call.token_ids) for call in rollout.calls) for rollout in survivors]
    logprobs = [logprob for rollout in survivors for call in rollout.calls for logprob in call.logprobs]
    values = {
        REWARD: mean,
        "rollout/reward_std": _mean([(reward - mean) ** 2 for reward in rewards]) ** 0.5,
        "rollout/sampled_tokens_mean": _mean(sampled),
        "rollout/calls_mean": _mean([len(rollout.calls) for rollout in survivors]),
        "rollout/truncated_frac": _mean([float(rollout.truncated) for rollout in survivors]),
        "rollout/entropy": -_mean(logprobs),
        "rollout/slowest_s": max((rollout.seconds for rollout in rollouts), default=0.0),
        ROLLOUTS: float(len(rollouts)),
        DROPPED: float(len(rollouts) - len(survivors)),
    }
    for agent in sorted({rollout.agent for rollout in survivors}):
        of_agent = [rollout.reward or 0.0 for rollout in survivors if rollout.agent == agent]
        values[f"{REWARD}/{agent}"] = _mean(of_agent)
    return values


_SUMMED = (
    "batch/",
    "rollout/count",
    "rollout/dropped",
    "rollout/misaligned",
    "rollout/failed_",
    "rollout/splice_breaks",
)
_LARGEST = ("time/", "rollout/slowest_s", "sync/canary_diff", "sync/copy_s")


def over_ranks(of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step over all ranks.

    Counts are summed, seconds and differences are the slowest or largest rank's, the rest are means over the rollouts
    that came through.

    Example:
        >>> few = {"rollout/count": 1, "rollout/dropped": 0, "rollout/reward_mean": 1.0}
        >>> many = {"rollout/count": 3, "rollout/dropped": 0, "rollout/reward_mean": 0.0}
        >>> over_ranks([few, many])
        {'rollout/count': 4, 'rollout/dropped': 0, 'rollout/reward_mean': 0.25}
    """
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for values in of_ranks for name in values):
        having = [values for values in of_ranks if name in values]
        if name.startswith(_SUMMED):
            combined[name] = sum(values[name] for values in having)
        elif name.startswith(_LARGEST):
            combined[name] = max(values[name] for values in having)
        else:
            weights = [values[ROLLOUTS] - values[DROPPED] for values in having]
            total = sum(weights)
            parts = [weight * values[name] for weight, values in zip(weights, having, strict=True)]
            combined[name] = sum(parts) / total if total else having[0][name]
    return combined


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class PhaseClock:
    """Times the phases of a step, one after the other, by the wall and by this process's CPU time.

    Example:
        >>> clock = PhaseClock()
        >>> sorted(clock.lap("sync"))
        ['time/sync_cpu_s', 'time/sync_s']
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> dict[str, float]:
        """The seconds since the last lap, under the phase's names."""
        wall, cpu = time.perf_counter(), time.process_time()
        values = {f"time/{phase}_s": wall - self._wall, f"time/{phase}_cpu_s": cpu - self._cpu}
        self._wall, self._cpu = wall, cpu
        return values


class WindowMetrics:
    """Collects the metrics of a window's micro-batches; names ending in ``_max`` are maxima, others means.

    Example:
        >>> window = WindowMetrics()
        >>> window.add({"diff_max": 0.1, "kl": 1.0}, count=1)
        >>> window.add({"diff_max": 0.3, "kl": 2.0}, count=3)
        >>> window.take()
        {'diff_max': 0.3, 'kl': 1.75}
        >>> window.take()
        {}
    """

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[float, float]]] = {}

    def add(self, values: Mapping[str, float], *, count: float) -> None:
        """Add one micro-batch; `count` is what its means are means over."""
        for name, value in values.items():
            self._values.setdefault(name, []).append((value, count))

    def take(self) -> dict[str, float]:
        """The window's metrics; the next window starts empty."""
        taken, self._values = self._values, {}
        return {name: _combine(name, parts) for name, parts in taken.items()}


def _combine(name: str, parts: Sequence[tuple[float, float]]) -> float:
    if name.endswith("_max"):
        return max(value for value, _ in parts)
    total = sum(count for _, count in parts)
    return sum(value * count for value, count in parts) / total if total else parts[-1][0]
