"""Names and arithmetic of what is logged. No logger, no trainer.

Names are ``area/quantity``; a unit is part of the name (``_s``, ``_bytes``, ``_frac``). Means are carried as (sum,
count) and divided once, so that micro-batches of different sizes count by what is in them.
"""

import collections
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_gym.advantages import zero_variance_frac
from lightning_gym.outcome import Outcome, compared
from lightning_gym.rollout import FailureKind

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
LAG = "batch/lag"
"""Optimizer steps between the weights that sampled a window and those that train on it."""
PADDING_WASTE = "batch/padding_waste_frac"
"""Computed tokens that are no token of a rollout: the fillers of packed rows."""


def rollout_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What the rollouts of a step were like.

    Rewards, lengths and turns are those of the rollouts that came through and have another of their group to be
    compared with; counts are of all.

    Args:
        outcomes: of all ranks.
    """
    candidates = compared(outcomes)
    rewards = [outcome.reward or 0.0 for outcome in candidates]
    sampled = [outcome.sampled_tokens for outcome in candidates]
    failures = collections.Counter(outcome.failure for outcome in outcomes if outcome.failure)
    misalignments = collections.Counter(outcome.misalignment for outcome in outcomes if outcome.misalignment)
    values = {
        REWARD: _mean(rewards),
        "rollout/reward_std": _deviation(rewards),
        "rollout/zero_variance_frac": zero_variance_frac(rewards, [outcome.group_id for outcome in candidates]),
        "rollout/sampled_tokens_mean": _mean(sampled),
        "rollout/sampled_tokens_max": float(max(sampled, default=0)),
        "rollout/calls_mean": _mean([outcome.num_calls for outcome in candidates]),
        "rollout/calls_max": float(max((outcome.num_calls for outcome in candidates), default=0)),
        "rollout/segments_mean": _mean([outcome.num_segments for outcome in candidates]),
        "rollout/truncated_frac": _mean([float(outcome.truncated) for outcome in candidates]),
        "rollout/masked": float(sum(outcome.masked for outcome in outcomes)),
        "rollout/entropy": -sum(outcome.sampled_logprobs for outcome in candidates) / max(1, sum(sampled)),
        "rollout/slowest_s": max((outcome.seconds for outcome in outcomes), default=0.0),
        "rollout/splice_breaks": float(sum(outcome.num_breaks for outcome in outcomes)),
        ROLLOUTS: float(len(outcomes)),
        DROPPED: float(len(outcomes) - len(candidates)),
        MISALIGNED: float(failures[FailureKind.MISALIGNED.value]),
        **{f"rollout/failed_{kind}": float(count) for kind, count in failures.items()},
        **{f"{MISALIGNED}_{kind}": float(count) for kind, count in misalignments.items()},
    }
    for agent, of_agent in rewards_by_environment(outcomes).items():
        values[f"{REWARD}/{agent}"] = _mean(of_agent)
        values[f"rollout/reward_std/{agent}"] = _deviation(of_agent)
    return values


def rewards_by_environment(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """The rewards of the rollouts that can be compared, by the agent that played them: what a histogram is made of.

    Example:
        >>> from lightning_gym.testing import tiny_outcome
        >>> rewards_by_environment([tiny_outcome(attempt=0, reward=0.0), tiny_outcome(attempt=1, reward=1.0)])
        {'agent': [0.0, 1.0]}
    """
    rewards: dict[str, list[float]] = {}
    for outcome in sorted(compared(outcomes), key=lambda outcome: outcome.agent):
        rewards.setdefault(outcome.agent, []).append(outcome.reward or 0.0)
    return rewards


def log_histograms(loggers: Sequence[Any], rewards: Mapping[str, Sequence[float]], step: int) -> None:
    """Give the rewards of each environment to every logger that draws histograms, as TensorBoard's does.

    Args:
        loggers: Lightning's.
        rewards: from `rewards_by_environment`.
        step: the optimizer step.
    """
    for logger in loggers:
        add = getattr(getattr(logger, "experiment", None), "add_histogram", None)
        if add is not None:
            for agent, values in rewards.items():
                add(f"rollout/reward/{agent}", np.asarray(values), step)


_SUMMED = (
    "batch/",
    "rollout/count",
    "rollout/dropped",
    "rollout/misaligned",
    "rollout/failed_",
    "rollout/splice_breaks",
    "rollout/unconfirmed_calls",
    "rollout/ids_lost",
    "rollout/invalid_tool_calls",
)
_LARGEST = ("time/", "rollout/slowest_s", "sync/")


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


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return _mean([(value - mean) ** 2 for value in values]) ** 0.5


class PhaseClock:
    """Times the phases of a step, one after the other, by the wall and by this process's CPU time.

    Example:
        >>> clock = PhaseClock()
        >>> sorted(clock.lap("sync"))
        ['time/sync_cpu_s', 'time/sync_s']
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._paused = (self._wall, self._cpu)

    def lap(self, phase: str) -> dict[str, float]:
        """The seconds since the last lap, under the phase's names."""
        wall, cpu = time.perf_counter(), time.process_time()
        values = {f"time/{phase}_s": wall - self._wall, f"time/{phase}_cpu_s": cpu - self._cpu}
        self._wall, self._cpu = wall, cpu
        return values

    def pause(self) -> None:
        """What follows, until `go_on`, is no part of any phase."""
        self._paused = (time.perf_counter(), time.process_time())

    def go_on(self) -> None:
        """Count again."""
        wall, cpu = self._paused
        self._wall += time.perf_counter() - wall
        self._cpu += time.process_time() - cpu
