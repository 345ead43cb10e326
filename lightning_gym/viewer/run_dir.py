"""RunDir: what a run's directory holds, whatever state the run left it in.

Nothing here raises over a file that is missing, cut off or damaged: what is wrong becomes a sentence in `problems`, and
the rest is read.
"""

import contextlib
import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lightning_gym.errors import ConfigError
from lightning_gym.rollout_log import FORMAT, LoggedRollout
from lightning_gym.trainer_logprobs import FILE_NAME, Line, read_trainer_logprobs

ROLLOUTS = "rollouts.jsonl"
_METRICS = ("csv/metrics.csv", "metrics.csv")
_NOT_METRICS = {"step", "epoch"}


class _MaskOnly(msgspec.Struct):
    loss_mask: list[int] = []


class _Brief(msgspec.Struct):
    """What is kept of every line in memory; the rest is read again for the rollouts that are shown."""

    rollout_id: str
    step: int
    group_id: int = -1
    agent: str = ""
    reward: float | None = None
    truncated: bool = False
    failure: dict[str, Any] | None = None
    breaks: list[dict[str, Any]] = []
    segments: list[_MaskOnly] = []


@dataclass(frozen=True, slots=True)
class Entry:
    """A rollout that was logged, and where its line is."""

    path: Path
    offset: int
    """Bytes from the file's beginning."""
    num_bytes: int
    rank: int
    rollout_id: str
    step: int
    group_id: int
    agent: str
    reward: float | None
    truncated: bool
    failure: str | None
    num_breaks: int
    num_tokens: int
    sampled_tokens: int

    def read(self) -> LoggedRollout:
        """The whole rollout.

        Raises:
            msgspec.DecodeError: the line does not hold what the log's format says.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return msgspec.json.decode(file.read(self.num_bytes), type=LoggedRollout)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Columns of numbers over optimizer steps."""

    steps: list[int]
    series: dict[str, list[float | None]]
    """One value a step; ``None`` where nothing was logged, or no finite number."""


@dataclass(slots=True)
class RunDir:
    """A run's directory, read."""

    path: Path
    model: Path | None = None
    """Whose tokenizer decodes the ids."""
    entries: list[Entry] = field(default_factory=list[Entry])
    """In the order of optimizer steps."""
    metrics: Metrics | None = None
    summary: dict[str, Any] | None = None
    trainer_logprobs: dict[tuple[str, int], Line] = field(default_factory=dict[tuple[str, int], Line])
    """By rollout id and segment."""
    problems: list[str] = field(default_factory=list[str])


def read_run_dir(path: Path) -> RunDir:
    """Read everything but the rollouts' own text and tokens.

    Args:
        path: the ``output_dir`` of a run, or the ``run_dir`` of a `lightning_gym.GymCallback` or
            `lightning_gym.GymLoop`.

    Raises:
        ConfigError: there is no such directory, or nothing in it is a run's.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; expected the output directory of a run")
    run = RunDir(path)
    ranks = [(0, path), *_rank_dirs(path)]
    if not any((folder / ROLLOUTS).exists() for _, folder in ranks) and _metrics_path(path) is None:
        raise ConfigError(
            f"{path} has neither {ROLLOUTS} nor {_METRICS[0]}; expected the output directory of a run "
            "(`lightning-gym train` prints it, and writes both there)"
        )
    for rank, folder in ranks:
        _read_rollouts(run, folder / ROLLOUTS, rank)
    run.entries.sort(key=lambda entry: (entry.step, entry.group_id))  # stable: attempts keep their order
    for _, folder in ranks:
        if (folder / FILE_NAME).is_file():
            run.trainer_logprobs |= {
                (line.rollout_id, line.segment): line for line in read_trainer_logprobs(folder / FILE_NAME)
            }
    if run.entries and not run.trainer_logprobs:
        run.problems.append(
            f"The trainer's logprobs were not recorded ({FILE_NAME} is missing or empty), so tokens show the engine's "
            'alone. PolicyModule records them; a training_step of your own does by returning {"loss": loss, '
            '"logprobs": logprobs}.'
        )
    _read_metrics(run)
    _read_summary(run)
    return run


def _rank_dirs(path: Path) -> list[tuple[int, Path]]:
    found: list[tuple[int, Path]] = []
    for folder in path.glob("rank_*"):
        with contextlib.suppress(ValueError):
            found.append((int(folder.name.removeprefix("rank_")), folder))
    return sorted(found)


# -- rollouts


def _read_rollouts(run: RunDir, path: Path, rank: int) -> None:
    name = str(path.relative_to(run.path))
    if not path.is_file():
        if rank == 0:
            run.problems.append(f"{name} is missing: there are no rollouts to show. GymCallback(log_rollouts=True)?")
        return
    with path.open("rb") as file:
        first = file.readline()
    header = _header(first)
    if header is None:
        run.problems.append(
            f"{name} does not begin as a rollout log does, with format {FORMAT!r}; its lines are read all the same."
            if first
            else f"{name} is empty: the run ended before its first rollout."
        )
    elif run.model is None:
        run.model = Path(str(header.get("model", "")))
    entries, bad = _entries(path, rank, skip=len(first) if header is not None else 0)
    run.entries += entries
    run.problems += [f"{name}, line {number}: {what}" for number, what in bad[:_MOST_BAD_LINES]]
    if len(bad) > _MOST_BAD_LINES:
        run.problems.append(f"{name}: {len(bad) - _MOST_BAD_LINES} more lines cannot be read.")
    if header is not None and not entries:
        run.problems.append(f"{name} has no rollout that can be read: the run ended before its first step was played.")


_MOST_BAD_LINES = 5


def _header(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        header = json.loads(line)
        if isinstance(header, dict) and header.get("format") == FORMAT:
            return header
    return None


def _entries(path: Path, rank: int, *, skip: int) -> tuple[list[Entry], list[tuple[int, str]]]:
    """The rollouts of a log, and the lines that are none: their numbers, and what is wrong with them."""
    decoder = msgspec.json.Decoder(_Brief)
    entries: list[Entry] = []
    bad: list[tuple[int, str]] = []
    for number, offset, line in _lines(path, skip):
        try:
            brief = decoder.decode(line)
        except msgspec.DecodeError as error:
            cut = not line.endswith(b"\n")
            bad.append((number, "cut off; the run was ended while it wrote." if cut else f"left out, {error}."))
            continue
        entries.append(_entry(path, offset, len(line), rank, brief))
    return entries, bad


def _lines(path: Path, skip: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of every line after the first `skip` bytes that is not blank."""
    with path.open("rb") as file:
        file.seek(skip)
        offset = skip
        for number, line in enumerate(file, start=2 if skip else 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _entry(path: Path, offset: int, num_bytes: int, rank: int, brief: _Brief) -> Entry:
    return Entry(
        path=path,
        offset=offset,
        num_bytes=num_bytes,
        rank=rank,
        rollout_id=brief.rollout_id,
        step=brief.step,
        group_id=brief.group_id,
        agent=brief.agent,
        reward=brief.reward,
        truncated=brief.truncated,
        failure=None if brief.failure is None else str(brief.failure.get("kind", "unknown")),
        num_breaks=len(brief.breaks),
        num_tokens=sum(len(segment.loss_mask) for segment in brief.segments),
        sampled_tokens=sum(sum(segment.loss_mask) for segment in brief.segments),
    )


# -- numbers


def _metrics_path(path: Path) -> Path | None:
    return next((path / name for name in _METRICS if (path / name).is_file()), None)


def _read_metrics(run: RunDir) -> None:
    path = _metrics_path(run.path)
    if path is None:
        run.problems.append(
            f"{_METRICS[0]} is missing, so the curves are counted from the rollouts: rewards, lengths and failures. "
            "Lightning's CSVLogger writes it."
        )
    else:
        run.metrics, num_bad = _table(path)
        if num_bad:
            run.problems.append(f"{path.relative_to(run.path)}: {num_bad} lines are not whole and left out.")
        if run.metrics is None:
            run.problems.append(f"{path.relative_to(run.path)} has no line of numbers.")
    if run.metrics is None and run.entries:
        run.metrics = counted(run.entries)


def _table(path: Path) -> tuple[Metrics | None, int]:
    """The columns of a metrics.csv, and how many of its lines are not whole; the last value of a step counts."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.reader(line.replace("\0", "") for line in file))
    names = rows[0] if rows else []
    if "step" not in names:
        return None, len(rows)
    at: dict[int, dict[str, float]] = {}
    num_bad = 0
    for row in rows[1:]:
        cells = dict(zip(names, row, strict=False))
        step = _number(cells.get("step", ""))
        if len(row) != len(names) or step is None:
            num_bad += 1
            continue
        values = {name: _number(cell) for name, cell in cells.items() if name not in _NOT_METRICS}
        at.setdefault(int(step), {}).update({name: value for name, value in values.items() if value is not None})
    steps = sorted(at)
    series = {name: [at[step].get(name) for step in steps] for name in names if name not in _NOT_METRICS}
    series = {name: values for name, values in series.items() if any(value is not None for value in values)}
    return (Metrics(steps, series) if steps else None), num_bad


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def counted(entries: Sequence[Entry]) -> Metrics:
    """What the rollouts alone say about the steps, under the names that a run logs it by."""
    at: dict[int, list[Entry]] = {}
    for entry in entries:
        at.setdefault(entry.step, []).append(entry)
    steps = sorted(at)
    series: dict[str, list[float | None]] = {}

    def add(name: str, step_values: Sequence[float | None]) -> None:
        if any(value is not None for value in step_values):
            series[name] = list(step_values)

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    rewarded = [[entry for entry in at[step] if entry.reward is not None] for step in steps]
    add("rollout/reward_mean", [mean([entry.reward or 0.0 for entry in of_step]) for of_step in rewarded])
    for agent in sorted({entry.agent for entry in entries}):
        add(
            f"rollout/reward_mean/{agent}",
            [mean([entry.reward or 0.0 for entry in of_step if entry.agent == agent]) for of_step in rewarded],
        )
    add("rollout/sampled_tokens_mean", [mean([entry.sampled_tokens for entry in of_step]) for of_step in rewarded])
    add("rollout/truncated_frac", [mean([float(entry.truncated) for entry in of_step]) for of_step in rewarded])
    add("rollout/count", [float(len(at[step])) for step in steps])
    for kind in sorted({entry.failure for entry in entries if entry.failure}):
        add(f"rollout/failed_{kind}", [float(sum(entry.failure == kind for entry in at[step])) for step in steps])
    add("rollout/splice_breaks", [float(sum(entry.num_breaks for entry in at[step])) for step in steps])
    return Metrics(steps, series)


def _read_summary(run: RunDir) -> None:
    path = run.path / "summary.json"
    if not path.is_file():
        run.problems.append(
            "summary.json is missing: the run is going on, was ended before its last step, or was not started by "
            "`lightning-gym train`."
        )
        return
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        run.problems.append(f"summary.json cannot be read: {error}.")
        return
    if isinstance(summary, dict):
        run.summary = summary
    else:
        run.problems.append("summary.json does not hold a summary.")
