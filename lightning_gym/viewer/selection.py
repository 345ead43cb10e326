"""Which rollouts a report holds: a file that a browser opens at once cannot hold every rollout of a long run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_gym.viewer.run_dir import Entry

_T = TypeVar("_T")
MAX_ROLLOUTS = 2000
MAX_BYTES = 100_000_000
"""Of the log's lines; in the report they take about half."""
_NOTABLE_FRAC = 0.25


@dataclass(frozen=True, slots=True)
class Selection:
    """What is shown, and of how much."""

    entries: list[Entry]
    num_rollouts: int
    """In the run."""
    note: str | None
    """What was left out, and how to see it; ``None`` where nothing was."""


def select(
    entries: Sequence[Entry],
    *,
    max_rollouts: int = MAX_ROLLOUTS,
    step: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Selection:
    """Choose whole groups, so that advantages can be understood: notable ones first, then evenly over the run.

    A group is notable if one of its rollouts failed or has a splice break; at most a quarter of the room is theirs.
    The first and the last step are in as long as there is room for two groups.

    Args:
        entries: of the run, in the order of its steps.
        max_rollouts: at most this many, but always one group.
        step: only rollouts of this optimizer step.
        max_bytes: at most this much of the log, but always one group.
    """
    wanted = [entry for entry in entries if step is None or entry.step == step]
    groups: dict[tuple[int, int], list[Entry]] = {}
    for entry in wanted:
        groups.setdefault((entry.step, entry.group_id), []).append(entry)
    notable = [key for key, group in groups.items() if any(e.failure or e.num_breaks for e in group)]
    chosen: dict[tuple[int, int], None] = {}
    room = _Room(max_rollouts, max_bytes)
    notable_room = _Room(int(max_rollouts * _NOTABLE_FRAC), int(max_bytes * _NOTABLE_FRAC))
    for key in spread(notable):
        if notable_room.takes(groups[key]) and room.takes(groups[key]):
            chosen[key] = None
    for key in _evenly(list(groups)):
        if key not in chosen and (room.takes(groups[key]) or not chosen):
            chosen[key] = None
    shown = [entry for key, group in groups.items() if key in chosen for entry in group]
    return Selection(shown, len(entries), _note(len(shown), len(wanted), len(entries), step))


class _Room:
    def __init__(self, num_rollouts: int, num_bytes: int) -> None:
        self._num_rollouts, self._num_bytes = num_rollouts, num_bytes

    def takes(self, group: Sequence[Entry]) -> bool:
        """Whether there was room for another group; if so, it is taken."""
        num_bytes = sum(entry.num_bytes for entry in group)
        if len(group) > self._num_rollouts or num_bytes > self._num_bytes:
            return False
        self._num_rollouts -= len(group)
        self._num_bytes -= num_bytes
        return True


def _evenly(keys: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Groups by (step, group), one of every step in turn, the steps in the order of `spread`."""
    of_step: dict[int, list[tuple[int, int]]] = {}
    for key in keys:
        of_step.setdefault(key[0], []).append(key)
    steps = spread(sorted(of_step))
    for turn in range(max((len(of) for of in of_step.values()), default=0)):
        for step in steps:
            if turn < len(of_step[step]):
                yield of_step[step][turn]


def spread(items: Sequence[_T]) -> list[_T]:
    """The same items so that any number of first ones lies evenly over the whole: ends, middle, quarters, eighths.

    Example:
        >>> spread([0, 1, 2, 3, 4, 5, 6, 7, 8])
        [0, 8, 4, 2, 6, 1, 3, 5, 7]
    """
    order: dict[int, None] = dict.fromkeys([0, len(items) - 1] if items else [])
    level = [(0, len(items) - 1)]
    while level:
        middles = [((first + last) // 2, first, last) for first, last in level if last - first > 1]
        order |= dict.fromkeys(middle for middle, _, _ in middles)
        level = [half for middle, first, last in middles for half in ((first, middle), (middle, last))]
    return [items[index] for index in order]


def _note(num_shown: int, num_wanted: int, num_rollouts: int, step: int | None) -> str | None:
    if num_shown == num_rollouts:
        return None
    of = f"{num_shown:,} of {num_rollouts:,} rollouts are in this file"
    if num_shown == num_wanted:
        return f"{of}: those of step {step}."
    return (
        f"{of}: whole groups, those with failures or splice breaks first, then evenly over the "
        f"{'steps' if step is None else f'groups of step {step}'}. --limit N holds more, --step N one step."
    )
