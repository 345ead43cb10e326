"""Outcome: a rollout without its text and tokens, small enough that every rank knows those of all ranks.

Advantages and metrics are made of outcomes: what is a mean over a step is then a mean over all of it, not a mean of the
ranks' means.
"""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_gym.rollout import Misaligned, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended."""

    rollout_id: str
    group_id: int
    agent: str
    reward: float | None
    """``None`` exactly where it failed."""
    components: Mapping[str, float]
    sampled_tokens: int
    sampled_logprobs: float
    """Sum over the sampled tokens, nats."""
    num_calls: int
    num_segments: int
    num_breaks: int
    """Calls that could not continue an earlier one."""
    truncated: bool
    masked: bool
    """The environment asked to leave it out: it is no more compared with than one that failed."""
    seconds: float
    failure: str | None
    """The kind."""
    misalignment: str | None

    @classmethod
    def of(cls, rollout: Rollout, num_segments: int) -> "Outcome":
        """What is left of a rollout that was cut into so many segments."""
        return cls(
            rollout_id=rollout.rollout_id,
            group_id=rollout.group_id,
            agent=rollout.agent,
            reward=rollout.reward,
            components=rollout.reward_components,
            sampled_tokens=sum(len(call.token_ids) for call in rollout.calls),
            sampled_logprobs=sum(sum(call.logprobs) for call in rollout.calls),
            num_calls=len(rollout.calls),
            num_segments=num_segments,
            num_breaks=len(rollout.breaks),
            truncated=rollout.truncated,
            masked=rollout.masked,
            seconds=rollout.seconds,
            failure=rollout.failure.kind.value if rollout.failure else None,
            misalignment=rollout.failure.how.value if isinstance(rollout.failure, Misaligned) else None,
        )


def compared(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that count and have another of their group to be compared with; in the order given."""
    alive = [outcome for outcome in outcomes if outcome.failure is None and not outcome.masked]
    counts = collections.Counter(outcome.group_id for outcome in alive)
    return [outcome for outcome in alive if counts[outcome.group_id] > 1]
