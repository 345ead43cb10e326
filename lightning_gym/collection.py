"""Collection: every rollout of a step, and what can be said of them together."""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_gym.rollout import FailureKind, Misaligned, Misalignment, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Every rollout of one collection, failed ones included."""

    rollouts: list[Rollout]
    """Group by group, attempts in order."""
    seconds: float

    @property
    def survivors(self) -> list[Rollout]:
        """Rollouts to train on: unmasked ones of groups in which at least two attempts came through."""
        alive = [rollout for rollout in self.rollouts if rollout.failure is None and not rollout.masked]
        counts = collections.Counter(rollout.group_id for rollout in alive)
        return [rollout for rollout in alive if counts[rollout.group_id] > 1]

    @property
    def failures(self) -> collections.Counter[FailureKind]:
        """How many rollouts failed, by kind."""
        return collections.Counter(rollout.failure.kind for rollout in self.rollouts if rollout.failure)

    @property
    def misalignments(self) -> collections.Counter[Misalignment]:
        """How many rollouts did not agree with what was served, by how."""
        return collections.Counter(r.failure.how for r in self.rollouts if isinstance(r.failure, Misaligned))

    def metrics(self) -> dict[str, float]:
        """What to log of the rollouts beside `lightning_gym.metrics.rollout_metrics`: what was left out, and by agent.

        Counts are of all rollouts, means of the survivors. ``env/<agent>/<name>`` is what the environment returned
        beside the reward.
        """
        survivors = self.survivors
        values = {
            "rollout/unconfirmed_calls": float(sum(rollout.unconfirmed_calls for rollout in self.rollouts)),
            "rollout/ids_lost": float(sum(rollout.ids_lost for rollout in self.rollouts)),
            "rollout/invalid_tool_calls": float(sum(rollout.invalid_tool_calls for rollout in self.rollouts)),
            "rollout/context_overflow_frac": _mean([float(rollout.context_overflow) for rollout in survivors]),
            **_means("rollout/reward_component", [rollout.reward_components for rollout in survivors]),
        }
        alive = {rollout.rollout_id for rollout in survivors}
        for agent in sorted({rollout.agent for rollout in self.rollouts}):
            of_agent = [rollout for rollout in self.rollouts if rollout.agent == agent]
            kept = [rollout for rollout in of_agent if rollout.rollout_id in alive]
            values[f"rollout/dropped/{agent}"] = float(len(of_agent) - len(kept))
            values[f"rollout/calls_mean/{agent}"] = _mean([len(rollout.calls) for rollout in kept])
            values[f"rollout/truncated_frac/{agent}"] = _mean([float(rollout.truncated) for rollout in kept])
            values |= _means(f"env/{agent}", [rollout.metrics for rollout in kept])
        return values


def _means(prefix: str, of_rollouts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name, over the rollouts that have it."""
    names = dict.fromkeys(name for numbers in of_rollouts for name in numbers)
    return {f"{prefix}/{name}": _mean([numbers[name] for numbers in of_rollouts if name in numbers]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
