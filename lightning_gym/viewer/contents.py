"""The contents of a report: what the page's scripts get, small enough to open at once.

Token ids are written as indices into a table of the distinct ones, so that every id is decoded once; numbers of tokens
are base64 of little-endian arrays, which the page takes apart when a rollout is opened, and not before.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lightning_gym.errors import ConfigError
from lightning_gym.metrics import PHASES
from lightning_gym.rollout_log import LoggedRollout, LoggedSegment
from lightning_gym.trainer_logprobs import Line
from lightning_gym.viewer.run_dir import Entry, Metrics, RunDir
from lightning_gym.viewer.selection import Selection
from lightning_gym.viewer.token_texts import TokenTexts

_MOST_POINTS = 1000  # of a curve; more than the pixels it is drawn on


def contents(run: RunDir, selection: Selection, *, model: Path | None = None) -> dict[str, Any]:
    """Everything the page shows, as JSON can hold it.

    Args:
        run: read by `lightning_gym.viewer.run_dir.read_run_dir`.
        selection: the rollouts to show.
        model: whose tokenizer decodes; ``None``: the one the run's log names.
    """
    table = _IdTable()
    prompts = _Interned()
    problems = list(run.problems)
    rollouts: list[dict[str, Any]] = []
    for entry in selection.entries:
        try:
            logged = entry.read()
            rollouts.append(_rollout(entry, logged, run.trainer_logprobs, table, prompts))
        except (msgspec.DecodeError, ValueError) as error:
            problems.append(f"Rollout {entry.rollout_id} of step {entry.step} cannot be shown: {error}.")
    texts, special = _texts(model or run.model, table.ids, problems)
    return {
        "name": run.path.resolve().name,
        "path": str(run.path),
        "model": str(model or run.model or ""),
        "problems": problems,
        "note": selection.note,
        "num_rollouts": selection.num_rollouts,
        "summary": run.summary,
        "phases": PHASES,
        "metrics": None if run.metrics is None else _thinned(run.metrics),
        "tokens": {"ids": table.ids, "texts": texts, "special": special},
        "prompts": prompts.items,
        "rollouts": rollouts,
    }


class _IdTable:
    """The distinct token ids, in the order they were met."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._index: dict[int, int] = {}

    def indices(self, token_ids: Sequence[int]) -> list[int]:
        for new in dict.fromkeys(token_ids):
            if new not in self._index:
                self._index[new] = len(self.ids)
                self.ids.append(new)
        return [self._index[token_id] for token_id in token_ids]


class _Interned:
    """Equal values once; the attempts of a group begin with the same messages."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._index: dict[str, int] = {}

    def index(self, item: Any) -> int:
        key = json.dumps(item)
        if key not in self._index:
            self._index[key] = len(self.items)
            self.items.append(item)
        return self._index[key]


def _rollout(
    entry: Entry,
    logged: LoggedRollout,
    trainer: Mapping[tuple[str, int], Line],
    table: _IdTable,
    prompts: _Interned,
) -> dict[str, Any]:
    segments = [
        _segment(segment, trainer.get((entry.rollout_id, index)), table)
        for index, segment in enumerate(logged.segments)
    ]
    gaps = [segment.pop("gap") for segment in segments]
    return {
        "id": entry.rollout_id,
        "step": entry.step,
        "rank": entry.rank,
        "task": logged.task_index,
        "group": entry.group_id,
        "attempt": logged.attempt,
        "agent": entry.agent,
        "reward": entry.reward,
        "advantage": logged.advantage,
        "truncated": entry.truncated,
        "seconds": logged.seconds,
        "failure": logged.failure,
        "breaks": logged.breaks,
        "metrics": logged.metrics,
        "components": logged.reward_components,
        "remarks": [remark for remark, holds in _remarks(logged).items() if holds],
        "prompt": prompts.index(logged.prompt),
        "output": logged.output,
        "num_tokens": entry.num_tokens,
        "sampled": entry.sampled_tokens,
        "gap": max((gap for gap in gaps if gap is not None), default=None),
        "segments": segments,
    }


def _remarks(logged: LoggedRollout) -> dict[str, bool]:
    """What is worth a word about a rollout where it holds."""
    return {
        "truncated: a call ran into the token limit, or the context window was full": logged.truncated,
        "context overflow: the last prompt did not fit the context window": logged.context_overflow,
        "masked: the environment asked to leave it out of the loss": logged.masked,
        "token ids lost on the way: the ledger alone says what the calls were": logged.ids_lost,
        f"calls served that are no part of the answer: {logged.unconfirmed_calls}": logged.unconfirmed_calls > 0,
        f"answers whose tool call could not be read: {logged.invalid_tool_calls}": logged.invalid_tool_calls > 0,
    }


def _segment(segment: LoggedSegment, line: Line | None, table: _IdTable) -> dict[str, Any]:
    """A segment in short.

    ``runs`` are the lengths of the stretches of equal mask, the first of which does not train (and may be empty);
    ``calls`` are start, stop, index, weight version and finish reason of each;
    ``engine`` and ``trainer`` have one float32 a trained token. ``gap`` is the largest difference between them.

    Raises:
        ValueError: the lists of the segment are not of one length.
    """
    if not len(segment.token_ids) == len(segment.loss_mask) == len(segment.logprobs):
        raise ValueError(
            f"{len(segment.token_ids)} token ids, {len(segment.loss_mask)} mask values and {len(segment.logprobs)} "
            "logprobs in one segment"
        )
    mask = np.asarray(segment.loss_mask, dtype=np.bool_)
    engine = np.asarray(segment.logprobs, dtype=np.float64)[mask]
    measured = None if line is None or len(line.logprobs) != engine.size else np.asarray(line.logprobs)
    return {
        "version": segment.weight_version,
        "calls": [[c.start, c.stop, c.index, c.weight_version, c.finish_reason] for c in segment.calls],
        "trained_at": None if line is None else line.step,
        "ids": _base64(np.asarray(table.indices(segment.token_ids)), "<u4"),
        "runs": _runs(mask),
        "engine": _base64(engine, "<f4"),
        "trainer": None if measured is None else _base64(measured, "<f4"),
        "gap": float(np.abs(measured - engine).max()) if measured is not None and engine.size else None,
    }


def _runs(mask: np.ndarray) -> list[int]:
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    lengths = [stop - start for start, stop in pairwise(borders)]
    return [0, *lengths] if len(mask) and mask[0] else lengths


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _texts(model: Path | None, ids: Sequence[int], problems: list[str]) -> tuple[list[Any] | None, list[int]]:
    """Texts of `ids`, and which of them (by index) are control tokens; ``None`` and a problem without a tokenizer."""
    if not ids or model is None:
        return None, []
    try:
        tokenizer = TokenTexts(model)
    except ConfigError:
        problems.append(f"There is no tokenizer at {model}, so tokens are shown by their ids; name one with --model.")
        return None, []
    return tokenizer.of(ids), [index for index, token_id in enumerate(ids) if tokenizer.is_special(token_id)]


def _thinned(metrics: Metrics) -> dict[str, Any]:
    """Curves of at most some thousand points: of neighbours the mean, or the largest where the name says ``max``."""
    width = -(-len(metrics.steps) // _MOST_POINTS) or 1
    starts = range(0, len(metrics.steps), width)

    def thin(name: str, values: Sequence[float | None]) -> list[float | None]:
        found: list[float | None] = []
        for start in starts:
            some = [value for value in values[start : start + width] if value is not None]
            value = (max(some) if "max" in name else sum(some) / len(some)) if some else None
            found.append(None if value is None else float(f"{value:.6g}"))
        return found

    return {
        "steps": [metrics.steps[start] for start in starts],
        "width": width,
        "series": {name: thin(name, values) for name, values in metrics.series.items()},
    }
