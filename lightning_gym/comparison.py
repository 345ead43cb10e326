"""Comparison: which rollouts of a collection train, and with what advantages.

Made of the outcomes of all ranks, so that every rank comes to the same result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_gym.advantages import (
    Baseline,
    Scale,
    component_advantages,
    group_advantages,
    overlong_penalty,
    varied_groups,
)
from lightning_gym.batch import Aggregation
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.outcome import Outcome, compared

Truncated = Literal["keep", "mask"]
ZeroVariance = Literal["keep", "drop", "resample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """What an optimizer step is made of."""

    prompts_per_step: int
    """Over all ranks."""
    group_size: int
    updates_per_collection: int = 1
    """Optimizer steps on the rollouts of one collection, which then plays that many times `prompts_per_step` tasks.
    Each rollout trains once; those of the n-th step were sampled by weights n - 1 steps old."""
    max_lag: int = 0
    """Optimizer steps by which the weights that sample a collection may be behind when it begins to train. 0: it is
    played when it is asked for. 1: while the one before it trains, which makes it one step old. With several updates a
    collection, its n-th window is another n - 1 steps older."""
    baseline: Baseline = "group_mean"
    """See `lightning_gym.advantages.group_advantages`."""
    advantage_scale: Scale = "none"
    """See `lightning_gym.advantages.group_advantages`."""
    reward_weights: Mapping[str, float] | None = None
    """Weights of the environments' reward components, compared one by one, see
    `lightning_gym.advantages.component_advantages`; ``None``: compare the reward."""
    truncated: Truncated = "keep"
    """``mask``: a rollout that ran into a token limit counts in its group's baseline, and does not train."""
    overlong_max_tokens: int | None = None
    """Sampled tokens of a rollout at which the soft penalty is 1, see `lightning_gym.advantages.overlong_penalty`."""
    overlong_buffer_tokens: int | None = None
    """The penalty sets in this many tokens before."""
    zero_variance: ZeroVariance = "keep"
    """Groups whose rewards are all equal. ``keep``: they count in the denominators of the loss; ``drop``: they do not;
    ``resample``: further tasks are played in their place (DAPO's dynamic sampling), and in place of groups that lost
    all but one attempt."""
    max_resample_rounds: int = 5
    """With ``resample``: how often further tasks are played; then the step makes do with the groups there are."""
    aggregation: Aggregation = "token_mean"
    constant_length: int | None = None
    max_tokens_per_micro_batch: int = 32768
    share_prefix: bool = False
    """Store a prompt that attempts have in common once a micro-batch, see `lightning_gym.batch.pack_window`."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size is {self.group_size}; a group of one has no baseline, use at least 2")
        for name in ("prompts_per_step", "updates_per_collection", "max_resample_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_lag not in (0, 1):
            raise ConfigError(
                f"max_lag is {self.max_lag}; expected 0, or 1 to play the next step while this one trains: one "
                "collection is open at a time, so none can be further ahead"
            )
        if self.reward_weights is not None and self.advantage_scale != "none":
            raise ConfigError(
                f"advantage_scale={self.advantage_scale!r} has no meaning with reward_weights: each component is "
                "divided by its group's std already; leave one of the two out"
            )
        if (self.constant_length is not None) != (self.aggregation == "constant"):
            raise ConfigError(
                f"aggregation={self.aggregation!r} with constant_length={self.constant_length}; aggregation='constant' "
                "needs constant_length, the fixed number of tokens a rollout is divided by, and no other takes it"
            )
        self._check_overlong()

    @property
    def max_token_lag(self) -> int:
        """Optimizer steps by which a trained token's weights may be behind."""
        return self.max_lag + self.updates_per_collection - 1

    def _check_overlong(self) -> None:
        limit, buffer = self.overlong_max_tokens, self.overlong_buffer_tokens
        if limit is None and buffer is None:
            return
        if limit is None or buffer is None or not 0 < buffer <= limit:
            raise ConfigError(
                f"overlong_max_tokens is {limit} and overlong_buffer_tokens {buffer}; expected both, and the buffer "
                "between 1 and the maximum"
            )
        if self.reward_weights is not None:
            raise ConfigError(
                "the penalty of overlong_max_tokens is no part of the components that reward_weights compares; leave "
                "one of the two out, or let the environment return the length as a component"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the outcomes of a collection teach."""

    advantages: Mapping[str, float]
    """By rollout id, of those that train."""
    groups: Sequence[int]
    """Ids of the groups that count for the step, in order: all that have two rollouts to compare, or of those the ones
    with variance."""


def compare(outcomes: Sequence[Outcome], settings: WindowSettings) -> Comparison:
    """Compare the rollouts of each group.

    Args:
        outcomes: of all ranks; the order does not matter.
        settings: of the run.

    Raises:
        AlignmentError: a reward is not finite, or a rollout lacks a reward component that others have.
        ConfigError: `reward_weights` names a component that there is not.

    Example: group 0 teaches; group 1 has no variance and, of group 2, one attempt came through.

        >>> from lightning_gym.testing import tiny_outcome
        >>> outcomes = [
        ...     *(tiny_outcome(group_id=0, attempt=attempt, reward=attempt) for attempt in (0, 1)),
        ...     *(tiny_outcome(group_id=1, attempt=attempt, reward=1) for attempt in (0, 1)),
        ...     tiny_outcome(group_id=2, attempt=0, reward=1),
        ... ]
        >>> compare(outcomes, WindowSettings(prompts_per_step=3, group_size=2, zero_variance="drop"))
        Comparison(advantages={'0.0': -0.5, '0.1': 0.5}, groups=[0])
    """
    candidates = sorted(compared(outcomes), key=lambda outcome: (outcome.group_id, outcome.rollout_id))
    ids = [outcome.group_id for outcome in candidates]
    values = _advantages(candidates, ids, settings)
    counting = set(ids) if settings.zero_variance == "keep" else varied_groups(_rewards(candidates, settings), ids)
    advantages = {
        outcome.rollout_id: value
        for outcome, value in zip(candidates, values, strict=True)
        if outcome.group_id in counting and not (outcome.truncated and settings.truncated == "mask")
    }
    return Comparison(advantages=advantages, groups=sorted(counting))


def _rewards(outcomes: Sequence[Outcome], settings: WindowSettings) -> list[tuple[float, ...]]:
    """What has to differ inside a group for it to teach: the rewards themselves, without the penalty for length."""
    if settings.reward_weights is None:
        return [(_reward(outcome),) for outcome in outcomes]
    return [tuple(outcome.components.get(name, 0.0) for name in settings.reward_weights) for outcome in outcomes]


def _advantages(outcomes: Sequence[Outcome], ids: Sequence[int], settings: WindowSettings) -> list[float]:
    if settings.reward_weights is not None:
        return component_advantages(
            [outcome.components for outcome in outcomes],
            ids,
            weights=settings.reward_weights,
            baseline=settings.baseline,
        ).tolist()
    rewards = [_reward(outcome) + _penalty(outcome, settings) for outcome in outcomes]
    return group_advantages(rewards, ids, baseline=settings.baseline, scale=settings.advantage_scale).tolist()


def _penalty(outcome: Outcome, settings: WindowSettings) -> float:
    limit, buffer = settings.overlong_max_tokens, settings.overlong_buffer_tokens
    if limit is None or buffer is None:
        return 0.0
    return overlong_penalty(outcome.sampled_tokens, max_tokens=limit, buffer_tokens=buffer)


def _reward(outcome: Outcome) -> float:
    if outcome.reward is None:
        raise AlignmentError(f"rollout {outcome.rollout_id} has neither a reward nor a failure")
    return outcome.reward
