"""Played: what a step's collections came to on this rank, aligned, and the windows that it is cut into."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lightning_gym.collection import Collection
from lightning_gym.errors import AlignmentError
from lightning_gym.outcome import Outcome
from lightning_gym.rollout import Misaligned, Misalignment, Rollout
from lightning_gym.trajectory import Trajectory, trajectories

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Played:
    """Rollouts of one or more collections, with the segments of those that line up."""

    rollouts: list[Rollout] = field(default_factory=list[Rollout])
    segments: dict[str, list[Trajectory]] = field(default_factory=dict[str, list[Trajectory]])
    """By rollout id; a rollout that failed has none."""
    _misaligned: dict[str, str] = field(default_factory=dict[str, str])

    def align(self, rollouts: Iterable[Rollout]) -> None:
        """Align rollouts that are over while others are being played; each one once."""
        for rollout in rollouts:
            if rollout.failure is None:
                try:
                    self.segments[rollout.rollout_id] = trajectories(rollout)
                except AlignmentError as error:
                    _log.warning("%s", error)
                    self._misaligned[rollout.rollout_id] = str(error)

    def add(self, collection: Collection) -> None:
        """Take in another collection, of which a rollout that does not line up becomes a failed one."""
        known = self.segments.keys() | self._misaligned.keys()
        self.align(rollout for rollout in collection.rollouts if rollout.rollout_id not in known)
        for rollout in collection.rollouts:
            said = self._misaligned.get(rollout.rollout_id)
            if said is None:
                self.rollouts.append(rollout)
            else:
                failure = Misaligned(message=said, how=Misalignment.BAD_CALL)
                self.rollouts.append(replace(rollout, failure=failure, reward=None))

    def outcomes(self) -> list[Outcome]:
        """Of every rollout."""
        return [Outcome.of(rollout, len(self.segments.get(rollout.rollout_id, ()))) for rollout in self.rollouts]

    def collection_of(self, span: "Span") -> Collection:
        """The rollouts at a span's tasks."""
        of_span = [rollout for rollout in self.rollouts if span.start <= rollout.group_id < span.stop]
        return Collection(rollouts=of_span, seconds=max((rollout.seconds for rollout in of_span), default=0.0))

    def segments_of(self, rollout_ids: Iterable[str]) -> list[Trajectory]:
        """The segments of those of the rollouts that were played here."""
        return [segment for rollout_id in rollout_ids for segment in self.segments.get(rollout_id, ())]


@dataclass(frozen=True, slots=True)
class Span:
    """The tasks that one optimizer step stands for, by their place in the order of tasks, which is the group's id."""

    start: int
    stop: int

    def of(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """The attempts at these tasks."""
        return [outcome for outcome in outcomes if self.start <= outcome.group_id < self.stop]


def spans(groups: Sequence[int], *, num_spans: int, start: int, stop: int) -> list[Span]:
    """Cut the tasks of a collection into windows that have about equally many of the groups that count.

    Args:
        groups: ids of the groups that count, in order.
        num_spans: at most as many as there are groups.
        start: place of the first task that was played.
        stop: place after the last one.

    Example: of the tasks 10 to 15, groups 11 and 13 taught nothing.

        >>> spans([10, 12, 14, 15], num_spans=2, start=10, stop=16)
        [Span(start=10, stop=14), Span(start=14, stop=16)]
    """
    firsts = [groups[len(groups) * index // num_spans] for index in range(1, num_spans)]
    borders = [start, *firsts, stop]
    return [Span(first, last) for first, last in itertools.pairwise(borders)]
