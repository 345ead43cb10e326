"""RolloutStream: tasks in, windows of training batches out. Composition only: no rule of its own."""

import collections
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_gym import metrics
from lightning_gym.batch import StepTotals, TrajectoryBatch, loss_weights, pack_window
from lightning_gym.colocation import Colocation
from lightning_gym.comparison import Comparison, WindowSettings, compare
from lightning_gym.errors import CollectionError, ConfigError
from lightning_gym.open_collection import OpenCollection
from lightning_gym.outcome import Outcome, compared
from lightning_gym.played import Played, Span, spans
from lightning_gym.ranks import Ranks
from lightning_gym.resume import check_same_run
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.tasks import Task, TaskCursor, digest, shard

_log = logging.getLogger(__name__)

Prepare = Callable[[list[TrajectoryBatch]], list[TrajectoryBatch]]
"""Done to each window of a collection before the first of them trains; it fills in `old_logprobs`, for example."""


class RolloutStream:
    """Makes windows, one an optimizer step.

    With ``updates_per_collection`` above 1 the windows of a collection are cut from it in the order of its tasks, and
    kept until they are asked for. The cursor's position is that of the windows handed out: a run that is resumed plays
    the rest of a collection again, with the weights it has then.

    Args:
        tasks: the dataset.
        settings: what a window is made of.
        seed: of the order of tasks.
        shuffle: deal tasks in file order if ``False``.
        agent_weights: how often tasks of each agent are dealt, see `lightning_gym.tasks.TaskCursor`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        settings: WindowSettings,
        *,
        seed: int = 0,
        shuffle: bool = True,
        agent_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks = tasks
        self.settings = settings
        self.cursor = TaskCursor(tasks, seed=seed, shuffle=shuffle, agent_weights=agent_weights)
        self.metrics: dict[str, float] = {}
        """Of the last window, over all ranks."""
        self.rewards: dict[str, list[float]] = {}
        """Of the last window, over all ranks, by environment: what a histogram is made of."""
        self.log: RolloutLog | None = None
        self.prepare: Prepare | None = None
        """Called on every rank for every window; several updates a collection need it."""
        self._waiting: collections.deque[_Window] = collections.deque()
        self._ahead: _Begun | None = None
        """What is played while the windows before it train."""
        self._identity: dict[str, Any] = {
            "version": _STATE_VERSION,
            "seed": seed,
            "shuffle": shuffle,
            "agent_weights": None if agent_weights is None else dict(agent_weights),
            "group_size": settings.group_size,
            "num_tasks": len(tasks),
        }

    def state_at(self, position: int) -> dict[str, Any]:
        """What is saved of a run whose windows up to `position` are finished: plain Python, equal on all ranks.

        It says nothing about ranks: any number of them goes on with it.
        """
        return self._run() | {"position": position}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Go on where a run was saved; windows that were not handed out are forgotten.

        Returns:
            The position of its first unfinished window.

        Raises:
            ConfigError: the state is of other tasks, another order of them, or other groups.
        """
        check_same_run(state, self._run())
        self.cursor.position = state["position"]
        self._waiting.clear()
        self._ahead = None
        return self.cursor.position

    def _run(self) -> dict[str, Any]:
        """What the order of tasks, the groups and their seeds depend on."""
        if "tasks" not in self._identity:  # a second for 100,000 rows; a run that saves nothing does not spend it
            self._identity["tasks"] = digest(self.tasks)
        return dict(self._identity)

    def window(
        self, colocation: Colocation, *, version: int, num_micro_batches: int, loss_divisor: int, last: bool = False
    ) -> list[TrajectoryBatch]:
        """The next window: exactly `num_micro_batches` micro-batches.

        Unless one is left of the last collection, this syncs, collects, aligns and packs. Moves the cursor on when the
        window is complete. With ``max_lag``, the collection is the one that was begun when the window before this was
        handed out; what it failed of is raised here, on all ranks; and the next one is begun with the weights of now.

        Args:
            colocation: started.
            version: the optimizer step that the trainer's weights are of.
            num_micro_batches: of this rank.
            loss_divisor: what ``backward`` divides a micro-batch's loss by: ``accumulate_grad_batches`` under a
                Trainer, ``gradient_accumulation_steps`` with Accelerate, 1 elsewhere. Undone by ``loss_weight``, as is
                the average over ranks that data-parallel training takes.
            last: no window is going to be asked for after this one.

        Raises:
            WeightSyncError: trainer and engine disagree.
            CollectionError: too many rollouts failed, or none can be trained on.
            ConfigError: the window does not fit the micro-batches.
        """
        ranks = colocation.ranks
        clock = metrics.PhaseClock()
        seconds: dict[str, float] = {}
        if not self._waiting:
            begun, self._ahead = self._ahead, None
            if begun is None or begun.collection.is_abandoned:
                begun = self._begin(colocation, version)
            seconds = clock.lap("sync")
            collected = self._collect(colocation, begun)
            seconds |= clock.lap("collect")
            with ranks.agreeing():
                if self.log is not None:
                    self.log.write(
                        version, collected.played.rollouts, collected.played.segments, collected.comparison.advantages
                    )
            packing = _Packing(colocation, begun.version, num_micro_batches, loss_divisor * ranks.size)
            self._waiting.extend(self._window(collected, span, packing) for span in collected.spans)
        window = self._waiting.popleft()
        self.cursor.position = window.span.stop
        seconds |= clock.lap("prepare")
        if self.settings.max_lag and not self._waiting and not last:
            self._ahead = self._begin(colocation, version)
            seconds |= clock.lap("begin")
        self._measure(window, version, seconds, ranks)
        return window.batches

    def _begin(self, colocation: Colocation, version: int) -> "_Begun":
        """Begin to play the tasks after the last window's, with the weights of now."""
        settings, ranks = self.settings, colocation.ranks
        dealt = self.cursor.peek(settings.prompts_per_step * settings.updates_per_collection)
        played = Played()
        with ranks.agreeing():
            colocation.ensure_synced(version)
        with ranks.agreeing():
            here = shard(dealt, ranks.rank, ranks.size)
            collection = colocation.begin(here, group_size=settings.group_size, profile="train", on_group=played.align)
        return _Begun(collection, played, len(dealt), version)

    def _collect(self, colocation: Colocation, begun: "_Begun") -> "_Collected":
        """Wait; with ``resample`` play again and again, each time as many tasks as groups are missing."""
        settings, ranks, start = self.settings, colocation.ranks, self.cursor.position
        played, num_dealt, wanted = begun.played, begun.num_dealt, begun.num_dealt
        with ranks.agreeing():
            played.add(begun.collection.result())
        outcomes, comparison = self._compared(played, ranks)
        for _ in range(settings.max_resample_rounds if settings.zero_variance == "resample" else 0):
            missing = wanted - len(comparison.groups)
            if not missing:
                break
            _log.info("%d of %d groups do not count for the step", missing, wanted)
            dealt = self.cursor.peek(num_dealt + missing)[num_dealt:]
            with ranks.agreeing():
                colocation.ensure_synced(begun.version)  # an engine that can sleep does so between collections
            with ranks.agreeing():
                here = shard(dealt, ranks.rank, ranks.size)
                played.add(colocation.collect(here, group_size=settings.group_size, profile="train"))
            num_dealt += missing
            outcomes, comparison = self._compared(played, ranks)
        num_spans = settings.updates_per_collection
        if len(comparison.groups) < num_spans:
            raise CollectionError(_nothing_to_train(outcomes, settings, num_spans))
        cut = spans(comparison.groups, num_spans=num_spans, start=start, stop=start + num_dealt)
        return _Collected(played, outcomes, comparison, cut)

    def _compared(self, played: Played, ranks: Ranks) -> tuple[list[Outcome], Comparison]:
        """The outcomes of all ranks, and what they teach."""
        outcomes = [outcome for of_rank in ranks.gather(played.outcomes()) for outcome in of_rank]
        return outcomes, compare(outcomes, self.settings)

    def _window(self, collected: "_Collected", span: Span, packing: "_Packing") -> "_Window":
        settings, colocation, ranks = self.settings, packing.colocation, packing.colocation.ranks
        outcomes = span.of(collected.outcomes)
        advantages = collected.comparison.advantages
        chosen = collected.played.segments_of(
            outcome.rollout_id for outcome in outcomes if outcome.rollout_id in advantages
        )
        totals = _over_ranks(StepTotals.of(chosen), ranks)
        if not totals.num_tokens:
            raise CollectionError(_nothing_to_train(outcomes, settings, 1))
        with ranks.agreeing():
            batches = pack_window(
                chosen,
                [advantages[segment.rollout_id] for segment in chosen],
                loss_weights(
                    chosen, aggregation=settings.aggregation, constant_length=settings.constant_length, totals=totals
                ),
                num_micro_batches=packing.num_micro_batches,
                max_tokens_per_micro_batch=settings.max_tokens_per_micro_batch,
                weight_scale=packing.weight_scale,
                temperature=colocation.profiles["train"].temperature,
                share_prefix=settings.share_prefix,
            )
        if self.prepare is not None:
            batches = self.prepare(batches)
        elif settings.updates_per_collection > 1:
            raise ConfigError(
                "updates_per_collection is above 1, so losses need old_logprobs of the weights that sampled, and "
                "nothing computes them; set RolloutStream.prepare (see lightning_gym.reference.with_old_logprobs)"
            )
        own = span.of(collected.played.outcomes())
        counts = {
            **collected.played.collection_of(span).metrics(),
            metrics.ROLLOUTS: float(len(own)),
            metrics.DROPPED: float(len(own) - len(compared(own))),
            "batch/tokens": float(sum(batch.num_tokens for batch in batches)),
            "batch/trained_tokens": float(sum(segment.num_trained for segment in chosen)),
            "batch/rollouts": float(len({segment.rollout_id for segment in chosen})),
            _FILLERS: float(sum(batch.num_tokens for batch in batches if not (batch.weight_versions >= 0).any())),
        }
        return _Window(batches, span, outcomes, packing.version, counts)

    def _measure(self, window: "_Window", version: int, seconds: dict[str, float], ranks: Ranks) -> None:
        values = metrics.over_ranks(ranks.gather(window.counts | seconds))
        fillers = values.pop(_FILLERS)
        self.rewards = metrics.rewards_by_environment(window.outcomes)
        self.metrics = {
            **values,
            **metrics.rollout_metrics(window.outcomes),
            metrics.LAG: float(version - window.version),
            metrics.PADDING_WASTE: fillers / values["batch/tokens"],
        }


_STATE_VERSION = 2
_FILLERS = "batch/filler_tokens"


@dataclass(frozen=True, slots=True)
class _Begun:
    """A collection that was begun."""

    collection: OpenCollection
    played: Played
    """Gets its groups as they end."""
    num_dealt: int
    """Tasks of it, over all ranks."""
    version: int
    """The optimizer step whose weights sample it."""


@dataclass(frozen=True, slots=True)
class _Packing:
    """How the windows of a collection are packed."""

    colocation: Colocation
    version: int
    num_micro_batches: int
    weight_scale: int


@dataclass(frozen=True, slots=True)
class _Collected:
    """A collection, played, compared and cut."""

    played: Played
    outcomes: list[Outcome]
    """Of all ranks."""
    comparison: Comparison
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class _Window:
    """What one optimizer step trains on."""

    batches: list[TrajectoryBatch]
    span: Span
    outcomes: list[Outcome]
    """Of all ranks, of the window's tasks."""
    version: int
    """The optimizer step whose weights sampled it."""
    counts: dict[str, float]
    """Of this rank."""


def _over_ranks(totals: StepTotals, ranks: Ranks) -> StepTotals:
    names = [field.name for field in fields(totals)]
    sums = ranks.sums([getattr(totals, name) for name in names])
    return StepTotals(**{name: round(value) for name, value in zip(names, sums, strict=True)})


def _nothing_to_train(outcomes: Sequence[Outcome], settings: WindowSettings, needed: int) -> str:
    failures = dict(collections.Counter(outcome.failure for outcome in outcomes if outcome.failure))
    alive = compared(outcomes)
    cut = sum(outcome.truncated for outcome in alive) if settings.truncated == "mask" else 0
    return (
        f"the step has fewer than {needed} group(s) to train on, of {len({o.group_id for o in outcomes})} played: "
        f"{len({outcome.group_id for outcome in alive})} have two rollouts to compare (failures: {failures}), "
        f"zero_variance={settings.zero_variance!r}, and {cut} truncated rollouts are left out of the loss. If "
        "rewards do not differ, the tasks are too easy or too hard for the policy; otherwise look at the rollouts "
        "(lightning-gym inspect)"
    )
