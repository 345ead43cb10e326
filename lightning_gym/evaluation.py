"""Evaluation: held-out tasks, played by the policy as it stands, and scored. Nothing here trains."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gym.colocation import Colocation
from lightning_gym.errors import ConfigError, GymError
from lightning_gym.played import Played
from lightning_gym.rollout import Rollout
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.scores import PREFIX, Score, scores
from lightning_gym.tasks import DealtTask, Task, blend_turns, read_tasks, shard

_log = logging.getLogger(__name__)

Rows = str | Path | Sequence[str | Path | Mapping[str, Any]]
"""What `lightning_gym.tasks.read_tasks` takes."""


class EvaluationTasks:
    """The tasks of one or more datasets in one order, in which the datasets take turns by their sizes.

    So any beginning of it (a sanity check, ``limit_val_batches``) is a sample of all of them.

    Args:
        source: a dataset, or several by name.
        agent: the Gym agent of rows that name none; a list: one for each file of a dataset.

    Raises:
        TaskError: a row is not usable.
        ConfigError: a file is missing or empty, or a dataset's name could not be part of a metric's.
    """

    def __init__(self, source: Rows | Mapping[str, Rows], *, agent: str | Sequence[str] | None = None) -> None:
        by_name = dict(source) if isinstance(source, Mapping) else {"": source}
        if not by_name:
            raise ConfigError("val names no dataset; pass a path, or {name: path}, or None for no validation")
        for name in by_name:
            if isinstance(source, Mapping) and (not name or "/" in name):
                raise ConfigError(f"the dataset name {name!r} is part of metric names; expected a word without '/'")
        decks = {name: read_tasks(rows, agent=agent) for name, rows in by_name.items()}
        sizes = {name: float(len(deck)) for name, deck in decks.items()}
        turns = blend_turns(sizes, 0, sum(map(len, decks.values())))
        self._names = [name for name, _ in turns]
        self.dealt = [DealtTask(group_id=place, task=decks[name][turn]) for place, (name, turn) in enumerate(turns)]
        """All of them; the group id is the place in the order, the same in every evaluation."""

    def __len__(self) -> int:
        return len(self.dealt)

    @property
    def tasks(self) -> list[Task]:
        """In order."""
        return [dealt.task for dealt in self.dealt]

    def dataset_of(self, group_id: int) -> str:
        """The name of a group's dataset; empty where there is one without a name."""
        return self._names[group_id]

    def per_rank(self, num_ranks: int) -> int:
        """Tasks of each rank; the last of some ranks may be missing."""
        return math.ceil(len(self) / num_ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationGroup:
    """The attempts at one task: what a ``validation_step`` is given."""

    dataset: str
    task: Task | None
    """``None`` where a rank has one task fewer than another."""
    rollouts: Sequence[Rollout]

    def to(self, device: Any, **_: Any) -> "EvaluationGroup":
        """Itself: it has no tensors. What moves batches to a device calls this."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found."""

    groups: Sequence[EvaluationGroup]
    """Of this rank, as many as every other rank has."""
    scores: Sequence[Score]
    """Over all ranks."""
    seconds: float
    """Of the slowest rank."""
    num_samples: int
    gym_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    """What Gym's ``/aggregate_metrics`` makes of the rollouts, by agent; empty on several ranks: none has all."""

    def metrics(self) -> dict[str, float]:
        """What to log."""
        values = {f"{PREFIX}/seconds": self.seconds}
        for score in self.scores:
            values |= score.metrics(num_samples=self.num_samples)
        return values


def evaluate(
    colocation: Colocation,
    tasks: EvaluationTasks,
    *,
    version: int,
    num_samples: int,
    max_tasks_per_rank: int,
    log: RolloutLog | None = None,
) -> Evaluation:
    """Play `num_samples` attempts at the first tasks with the trainer's weights, all at once; collective.

    Args:
        colocation: started.
        tasks: dealt to the ranks in turn.
        version: the optimizer step that the trainer's weights are of.
        num_samples: attempts at each task.
        max_tasks_per_rank: how many of the tasks are played.
        log: gets every rollout of this rank.

    Raises:
        WeightSyncError: trainer and engine disagree.
        CollectionError: too many attempts failed.
    """
    ranks = colocation.ranks
    start = time.perf_counter()
    per_rank = min(max_tasks_per_rank, tasks.per_rank(ranks.size))
    here = shard(tasks.dealt[: per_rank * ranks.size], ranks.rank, ranks.size)
    played = Played()
    with ranks.agreeing():
        colocation.ensure_synced(version)
    with ranks.agreeing():
        played.add(colocation.evaluate(here, group_size=num_samples))
        if log is not None:
            log.write(version, played.rollouts, played.segments, {})
    outcomes = [outcome for of_rank in ranks.gather(played.outcomes()) for outcome in of_rank]
    return Evaluation(
        groups=_groups(tasks, here, played.rollouts, per_rank),
        scores=scores(outcomes, tasks.dataset_of, num_samples=num_samples),
        seconds=max(ranks.gather(time.perf_counter() - start)),
        num_samples=num_samples,
        gym_metrics=_gym_metrics(colocation, played.rollouts) if ranks.size == 1 else {},
    )


def _gym_metrics(colocation: Colocation, rollouts: Sequence[Rollout]) -> dict[str, dict[str, float]]:
    try:
        return colocation.aggregate(rollouts)
    except GymError as error:  # scores are ours, and an agent of another Gym version may have no such route
        _log.warning("evaluation goes without the Gym's own metrics: %s", error)
        return {}


def _groups(
    tasks: EvaluationTasks, here: Sequence[DealtTask], rollouts: Sequence[Rollout], count: int
) -> list[EvaluationGroup]:
    of_group: dict[int, list[Rollout]] = {dealt.group_id: [] for dealt in here}
    for rollout in rollouts:
        of_group[rollout.group_id].append(rollout)
    groups = [
        EvaluationGroup(
            dataset=tasks.dataset_of(dealt.group_id), task=dealt.task, rollouts=tuple(of_group[dealt.group_id])
        )
        for dealt in here
    ]
    return [*groups, *(EvaluationGroup(dataset="", task=None, rollouts=()) for _ in range(count - len(groups)))]
