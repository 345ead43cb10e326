"""Task: one row of a Gym dataset; and the cursor that deals rows out.

Rows are JSONL as Gym's dataset collation writes them: ``responses_create_params`` (OpenAI Responses parameters),
``agent_ref`` (which agent plays it), and whatever the environment's verifier needs beside them.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    source: str | Path | Sequence[str | Path | Mapping[str, Any]], *, agent: str | None = None
) -> list[Task]:
    """Read and check every row of `source`: a JSONL path, several, or rows in memory.

    Args:
        source: path(s) or rows.
        agent: the agent of rows that have no ``agent_ref``.

    Raises:
        TaskError: a row is not usable; says which line of which file and which key.
        ConfigError: a file is missing, or there are no rows at all.
    """
    parts = [source] if isinstance(source, str | Path) else list(source)
    tasks: list[Task] = []
    for part in parts:
        rows = [("row", part)] if isinstance(part, Mapping) else _read_lines(Path(part))
        for where, row in rows:
            place = f"row {len(tasks)}" if where == "row" else where
            tasks.append(_task(len(tasks), row, place, agent))
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

    Example: three tasks dealt two at a time make groups ``0 1 | 2 3 | ...``; group 3 is the first of the second pass.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0, shuffle: bool = True) -> None:
        self._tasks = tasks
        self._seed = seed
        self._shuffle = shuffle
        self.position = 0
        """Tasks dealt so far in the run; the one number that resume needs."""

    def peek(self, count: int) -> list[DealtTask]:
        """The next `count` tasks, without moving on."""
        positions = range(self.position, self.position + count)
        return [DealtTask(group_id=position, task=self._at(position)) for position in positions]

    def _at(self, position: int) -> Task:
        epoch, offset = divmod(position, len(self._tasks))
        if not self._shuffle:
            return self._tasks[offset]
        order = list(range(len(self._tasks)))
        random.Random(f"{self._seed}-{epoch}").shuffle(order)
        return self._tasks[order[offset]]


def shard(dealt: Sequence[DealtTask], rank: int, num_ranks: int) -> list[DealtTask]:
    """The tasks that data-parallel rank `rank` plays: whole groups, dealt round-robin."""
    return list(dealt[rank::num_ranks])
