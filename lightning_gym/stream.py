"""RolloutStream: tasks in, windows of training batches out. Composition only: no rule of its own."""

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from lightning_gym import metrics
from lightning_gym.advantages import Baseline, Scale, group_advantages, zero_variance_frac
from lightning_gym.batch import Aggregation, StepTotals, TrajectoryBatch, loss_weights, pack_window
from lightning_gym.collect import Collection
from lightning_gym.colocation import Colocation
from lightning_gym.errors import AlignmentError, CollectionError, ConfigError
from lightning_gym.ranks import Ranks
from lightning_gym.rollout import Failure, FailureKind, Rollout
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.tasks import Task, TaskCursor, shard
from lightning_gym.trajectory import Trajectory, trajectories

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """What an optimizer step is made of."""

    prompts_per_step: int
    """Over all ranks."""
    group_size: int
    baseline: Baseline = "group_mean"
    advantage_scale: Scale = "none"
    aggregation: Aggregation = "token_mean"
    constant_length: int | None = None
    max_tokens_per_micro_batch: int = 32768

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size is {self.group_size}; a group of one has no baseline, use at least 2")
        if self.prompts_per_step < 1:
            raise ConfigError(f"prompts_per_step is {self.prompts_per_step}; expected at least 1")


class RolloutStream:
    """Makes windows, one an optimizer step.

    Args:
        tasks: the dataset.
        settings: what a window is made of.
        seed: of the order of tasks.
        shuffle: deal tasks in file order if ``False``.
    """

    def __init__(self, tasks: Sequence[Task], settings: WindowSettings, *, seed: int = 0, shuffle: bool = True) -> None:
        self.tasks = tasks
        self.settings = settings
        self.cursor = TaskCursor(tasks, seed=seed, shuffle=shuffle)
        self.metrics: dict[str, float] = {}
        """Of the last window."""
        self.log: RolloutLog | None = None

    def window(self, colocation: Colocation, *, version: int, num_micro_batches: int) -> list[TrajectoryBatch]:
        """Sync, collect, align, pack: exactly `num_micro_batches` micro-batches sampled by `version`.

        Moves the cursor on when the window is complete.

        Raises:
            WeightSyncError: trainer and engine disagree.
            CollectionError: too many rollouts failed, or none can be trained on.
            ConfigError: the window does not fit the micro-batches.
        """
        ranks, settings = colocation.ranks, self.settings
        clock = metrics.PhaseClock()
        with ranks.agreeing():
            colocation.ensure_synced(version)
            seconds = clock.lap("sync")
            dealt = shard(self.cursor.peek(settings.prompts_per_step), ranks.rank, ranks.size)
            collection = colocation.collect(dealt, group_size=settings.group_size, profile="train")
            seconds |= clock.lap("collect")
            played = _Played.of(collection, settings)
            if self.log is not None:
                self.log.write(version, played.collection.rollouts, played.segments, played.advantages)
        totals = _over_ranks(StepTotals.of(played.chosen), ranks)
        with ranks.agreeing():
            batches = self._pack(played, totals, colocation, num_micro_batches)
        self.cursor.position += settings.prompts_per_step
        values = played.metrics() | seconds | clock.lap("prepare")
        self.metrics = metrics.over_ranks(ranks.gather(values | {"batch/tokens": float(_num_tokens(batches))}))
        return batches

    def _pack(
        self, played: "_Played", totals: StepTotals, colocation: Colocation, num_micro_batches: int
    ) -> list[TrajectoryBatch]:
        if not totals.num_rollouts:
            raise CollectionError(f"no group has two rollouts to compare; failures: {dict(played.collection.failures)}")
        settings = self.settings
        weights = loss_weights(
            played.chosen,
            aggregation=settings.aggregation,
            constant_length=settings.constant_length,
            totals=totals,
        )
        return pack_window(
            played.chosen,
            [played.advantages[segment.rollout_id] for segment in played.chosen],
            weights,
            num_micro_batches=num_micro_batches,
            max_tokens_per_micro_batch=settings.max_tokens_per_micro_batch,
            weight_scale=num_micro_batches * colocation.ranks.size,
            temperature=colocation.profiles["train"].temperature,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Played:
    """A collection, aligned and compared."""

    collection: Collection
    segments: dict[str, list[Trajectory]]
    advantages: dict[str, float]
    """By rollout id, of those that train."""

    @classmethod
    def of(cls, collection: Collection, settings: WindowSettings) -> "_Played":
        collection, segments = _align(collection)
        survivors = collection.survivors
        values = group_advantages(
            [rollout.reward or 0.0 for rollout in survivors],
            [rollout.group_id for rollout in survivors],
            baseline=settings.baseline,
            scale=settings.advantage_scale,
        )
        advantages = {rollout.rollout_id: value for rollout, value in zip(survivors, values.tolist(), strict=True)}
        return cls(collection=collection, segments=segments, advantages=advantages)

    @property
    def chosen(self) -> list[Trajectory]:
        """The segments that train."""
        return [segment for rollout_id in self.advantages for segment in self.segments[rollout_id]]

    def metrics(self) -> dict[str, float]:
        rollouts, survivors, chosen = self.collection.rollouts, self.collection.survivors, self.chosen
        rewards = [rollout.reward or 0.0 for rollout in survivors]
        counts = self.collection.failures
        return {
            **metrics.rollout_metrics(rollouts, survivors),
            metrics.MISALIGNED: float(counts[FailureKind.MISALIGNED]),
            "rollout/zero_variance_frac": zero_variance_frac(rewards, [rollout.group_id for rollout in survivors]),
            "rollout/segments_mean": len(chosen) / max(1, len(survivors)),
            "rollout/splice_breaks": float(sum(len(rollout.breaks) for rollout in rollouts)),
            "batch/trained_tokens": float(sum(segment.num_trained for segment in chosen)),
            **{f"rollout/failed_{kind.value}": float(count) for kind, count in counts.items()},
        }


def _over_ranks(totals: StepTotals, ranks: Ranks) -> StepTotals:
    num_tokens, num_rollouts = ranks.sums(astuple(totals))
    return StepTotals(num_tokens=round(num_tokens), num_rollouts=round(num_rollouts))


def _num_tokens(batches: Sequence[TrajectoryBatch]) -> int:
    return sum(batch.num_tokens for batch in batches)


def _align(collection: Collection) -> tuple[Collection, dict[str, list[Trajectory]]]:
    """Segments by rollout id; a rollout that does not line up becomes a failed one."""
    segments: dict[str, list[Trajectory]] = {}
    rollouts: list[Rollout] = []
    for rollout in collection.rollouts:
        checked = rollout
        if rollout.failure is None:
            try:
                segments[rollout.rollout_id] = trajectories(rollout)
            except AlignmentError as error:
                _log.warning("%s", error)
                failure = Failure(kind=FailureKind.MISALIGNED, message=str(error))
                checked = replace(rollout, failure=failure, reward=None)
        rollouts.append(checked)
    return replace(collection, rollouts=rollouts), segments
