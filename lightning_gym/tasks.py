"""Task: one row of a Gym dataset; and the cursor that deals rows out.

Rows are JSONL as Gym's dataset collation writes them: ``responses_create_params`` (OpenAI Responses parameters),
``agent_ref`` (which agent plays it), and whatever the environment's verifier needs beside them.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

from lightning_gym.errors import ConfigError, TaskError
from lightning_gym.gym.wire import AGENT_REF, RESPONSES_CREATE_PARAMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One dataset row, checked."""

    index: int
    """Position among the rows of all files, from 0."""
    agent: str
    """Name of the Gym agent that plays it."""
    row: Mapping[str, Any]
    """The row without nulls: Gym's model server fails on an explicit ``"metadata": null``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DealtTask:
    """A task with the number of the group that will attempt it."""

    group_id: int
    """How many tasks were dealt before this one in the run: the same on every rank, and after a resume."""
    task: Task


def read_tasks(
    source: str | Path | Sequence[str | Path | Mapping[str, Any]], *, agent: str | Sequence[str] | None = None
) -> list[Task]:
    """Read and check every row of `source`: a JSONL path, several, or rows in memory.

    Args:
        source: path(s) or rows.
        agent: the agent of rows that have no ``agent_ref``; a list: one for each part of `source`.

    Raises:
        TaskError: a row is not usable; says which line of which file and which key.
        ConfigError: a file is missing, there are no rows at all, or agents and parts are not equally many.
    """
    parts = [source] if isinstance(source, str | Path) else list(source)
    agents = [agent] * len(parts) if agent is None or isinstance(agent, str) else list(agent)
    if len(agents) != len(parts):
        raise ConfigError(
            f"agent names {len(agents)} agents ({', '.join(map(str, agents))}), and {source} is {len(parts)}; name one "
            "for all, one for each, or none if every row has its `agent_ref`"
        )
    tasks: list[Task] = []
    for part, default_agent in zip(parts, agents, strict=True):
        rows = [("row", part)] if isinstance(part, Mapping) else _read_lines(Path(part))
        for where, row in rows:
            place = f"row {len(tasks)}" if where == "row" else where
            tasks.append(_task(len(tasks), row, place, default_agent))
    if not tasks:
        raise ConfigError(f"no tasks in {source}; expected JSONL with one Gym dataset row a line")
    return tasks


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"the dataset {path} does not exist (looked from {Path.cwd()})")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise TaskError(f"{path}:{number}: not JSON: {error}") from error


def _task(index: int, row: Any, place: str, default_agent: str | None) -> Task:
    if not isinstance(row, Mapping):
        raise TaskError(f"{place}: expected a JSON object, got {type(row).__name__}")
    params = row.get(RESPONSES_CREATE_PARAMS)
    if not isinstance(params, Mapping) or not params.get("input"):
        raise TaskError(
            f"{place}: expected `{RESPONSES_CREATE_PARAMS}` with a non-empty `input` (a string or a list of messages), "
            f"got {_short(params)}"
        )
    agent = row.get(AGENT_REF)
    name = agent.get("name") if isinstance(agent, Mapping) else default_agent if agent is None else None
    if not isinstance(name, str):
        raise TaskError(
            f"{place}: expected `{AGENT_REF}` such as {{'type': 'responses_api_agents', 'name': 'my_agent'}}, got "
            f"{_short(agent)}; pass `agent=` to name one for rows that have none"
        )
    return Task(index=index, agent=name, row=_without_nulls(row))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def digest(tasks: Iterable[Task]) -> str:
    """A short text that is another one for other tasks, or the same in another order.

    Example:
        >>> task = Task(index=0, agent="agent", row={"a": 1, "b": 2})
        >>> digest([task]) == digest([Task(index=0, agent="agent", row={"b": 2, "a": 1})])
        True
    """
    hashed = hashlib.blake2b(digest_size=8)
    for task in tasks:
        hashed.update(msgspec.json.encode((task.agent, task.row), order="deterministic") + b"\n")
    return hashed.hexdigest()


def check_agents(tasks: Iterable[Task], known: Iterable[str]) -> None:
    """Refuse tasks of agents that the running Gym does not have.

    Raises:
        ConfigError: names the first such task and the agents that exist.
    """
    known = sorted(known)
    for task in tasks:
        if task.agent not in known:
            raise ConfigError(
                f"task {task.index} is for agent {task.agent!r}, but this Gym runs {', '.join(known) or 'no agents'}; "
                "add its environment to the Gym, or correct the row's `agent_ref`"
            )


class TaskCursor:
    """Deals tasks for ever: a new permutation each pass, the same on every rank, resumable.

    Args:
        tasks: what is dealt.
        seed: of the permutations.
        shuffle: deal in file order if ``False``.
        agent_weights: how often tasks of each agent are dealt relative to the others', whatever their number; an
            agent that is not named is not dealt. ``None``: every task comes once a pass.

    Raises:
        ConfigError: a weight is not a positive number, or is for an agent without tasks.

    Example: three tasks dealt two at a time make groups ``0 1 | 2 3 | ...``; group 3 is the first of the second pass.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int = 0,
        shuffle: bool = True,
        agent_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._seed = seed
        self._shuffle = shuffle
        if agent_weights is None:
            self._decks: dict[str, Sequence[Task]] = {"": tasks}
        else:
            _check_agent_weights(agent_weights, tasks)
            self._decks = {agent: [t for t in tasks if t.agent == agent] for agent in sorted(agent_weights)}
        self._weights = agent_weights or {"": 1.0}
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self.position = 0
        """Tasks dealt so far in the run; the one number that resume needs."""

    def peek(self, count: int) -> list[DealtTask]:
        """The next `count` tasks, without moving on."""
        positions = range(self.position, self.position + count)
        turns = blend_turns(self._weights, self.position, count)
        return [
            DealtTask(group_id=position, task=self._at(deck, turn))
            for position, (deck, turn) in zip(positions, turns, strict=True)
        ]

    def _at(self, deck: str, turn: int) -> Task:
        tasks = self._decks[deck]
        epoch, offset = divmod(turn, len(tasks))
        if not self._shuffle:
            return tasks[offset]
        return tasks[self._order(deck, epoch)[offset]]

    def _order(self, deck: str, epoch: int) -> list[int]:
        """The deck's permutation of a pass; the latest one is kept, for datasets of many rows."""
        known = self._orders.get(deck)
        if known is None or known[0] != epoch:
            order = list(range(len(self._decks[deck])))
            random.Random(f"{self._seed}-{epoch}-{deck}").shuffle(order)
            known = self._orders[deck] = (epoch, order)
        return known[1]


def blend_turns(weights: Mapping[str, float], start: int, count: int) -> list[tuple[str, int]]:
    """Whose turn it is at positions ``start .. start + count - 1``, and which of its turns that is.

    A name of weight w (of a sum of 1) has its turn i at time (i + 1/2) / w, and turns are ordered by time: after any n
    positions it has had w n turns to within half the number of names, without randomness. Any position is found
    without dealing those before it.

    Example: one task of ``math`` for every two of ``tools``.

        >>> [name for name, _ in blend_turns({"math": 1, "tools": 2}, 0, 6)]
        ['tools', 'math', 'tools', 'tools', 'math', 'tools']
        >>> blend_turns({"math": 1, "tools": 2}, 4, 2)
        [('math', 1), ('tools', 3)]
    """
    exact = {name: Fraction(weight) for name, weight in sorted(weights.items())}
    total = sum(exact.values())
    # By time t a name has had floor(w t + 1/2) turns: t is chosen so early that these are at most `start` in all.
    time = max(0, start - len(exact))
    had = {name: math.floor(weight / total * time + Fraction(1, 2)) for name, weight in exact.items()}
    turns: list[tuple[str, int]] = []
    dealt = sum(had.values())
    while dealt < start + count:
        name = min(exact, key=lambda name: (had[name] + Fraction(1, 2)) / exact[name])
        if dealt >= start:
            turns.append((name, had[name]))
        had[name] += 1
        dealt += 1
    return turns


def _check_agent_weights(weights: Mapping[str, float], tasks: Sequence[Task]) -> None:
    agents = {task.agent for task in tasks}
    for agent, weight in weights.items():
        if agent not in agents:
            raise ConfigError(
                f"a weight is given for agent {agent!r}, but the tasks are for {', '.join(sorted(agents))}"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"the weight of agent {agent!r} is {weight}; expected a positive number, or leave it out")
    if not weights:
        raise ConfigError("agent_weights is empty, so no task would be dealt; name at least one agent, or pass None")


def shard(dealt: Sequence[DealtTask], rank: int, num_ranks: int) -> list[DealtTask]:
    """The tasks that data-parallel rank `rank` plays: whole groups, dealt round-robin."""
    return list(dealt[rank::num_ranks])
