"""The rollout log: every rollout of a run as one line of JSON, with what it taught and why.

The first line says which model's tokenizer decodes the ids, and how rollouts were sampled. Every other line is a
rollout; ``segments`` hold what trained. ``lightning-gym inspect`` reads it. Nothing that a batch is made of is rounded:
`logged_rollout` is the rollout again, and `lightning_gym.replay` trains on it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lightning_gym.errors import ConfigError, LogError
from lightning_gym.rollout import (
    Call,
    Failure,
    FailureKind,
    Misaligned,
    Misalignment,
    Rollout,
    SamplingProfile,
    SpliceBreak,
)
from lightning_gym.trajectory import Trajectory

FORMAT = "lightning_gym.rollouts/1"
FILE_NAME = "rollouts.jsonl"


class RolloutLog:
    """Appends rollouts to a file.

    Args:
        path: made with its directories.
        model_path: whose tokenizer decodes the ids.
        resume: continue the file of the run that is resumed, from the step of the first `write` on: what it played
            after its last checkpoint is played again. Otherwise a file of an earlier run is replaced.
        sampling: of the rollouts.
    """

    def __init__(
        self, path: Path, model_path: Path, *, resume: bool = False, sampling: SamplingProfile | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._continues = resume and path.is_file()
        self._file = path.open(
            "ab" if resume else "wb", buffering=0
        )  # unbuffered: a line that failed is not tried again
        if self._file.tell() == 0:
            header: dict[str, Any] = {"format": FORMAT, "model": str(model_path)}
            self._append([header | ({} if sampling is None else {"sampling": asdict(sampling)})])

    def write(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        segments: Mapping[str, Sequence[Trajectory]],
        advantages: Mapping[str, float],
    ) -> None:
        """Append the rollouts of one collection.

        Args:
            step: the optimizer step they were collected for.
            rollouts: all of them, failed ones too.
            segments: by rollout id, of those that train.
            advantages: by rollout id, of those that train.

        Raises:
            LogError: the file cannot be written to.
        """
        if self._continues:
            self._file.truncate(end_of_steps_before(step, self._path))
            self._continues = False
        self._append(
            {
                "step": step,
                "rollout_id": rollout.rollout_id,
                "task_index": rollout.task_index,
                "group_id": rollout.group_id,
                "attempt": rollout.attempt,
                "agent": rollout.agent,
                "reward": rollout.reward,
                "advantage": advantages.get(rollout.rollout_id),
                "truncated": rollout.truncated,
                "seconds": round(rollout.seconds, 4),
                "failure": rollout.failure,
                "breaks": rollout.breaks,
                "metrics": rollout.metrics,
                "prompt": rollout.prompt,
                "output": rollout.output,
                "segments": [_segment(segment, rollout) for segment in segments.get(rollout.rollout_id, ())],
                "reward_components": rollout.reward_components,
                "masked": rollout.masked,
                "context_overflow": rollout.context_overflow,
                "invalid_tool_calls": rollout.invalid_tool_calls,
                "unconfirmed_calls": rollout.unconfirmed_calls,
                "ids_lost": rollout.ids_lost,
            }
            for rollout in rollouts
        )

    def close(self) -> None:
        """Close the file; never raises."""
        self._file.close()

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        left = memoryview(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            raise LogError(
                f"{self._path} cannot be written to: {error.strerror}. Make room or mend the file, and resume from the "
                "last checkpoint; log_rollouts=False trains without a log"
            ) from error


def end_of_steps_before(step: int, path: Path) -> int:
    """How many bytes of a log are whole lines of steps before `step`; lines are in the order of steps."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line).get("step", -1) >= step:
                break
            end += len(line)
    return end


def _segment(trajectory: Trajectory, rollout: Rollout) -> dict[str, Any]:
    calls = {call.index: call for call in rollout.calls}
    return {
        "token_ids": trajectory.token_ids.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        # Nine significant digits are the float32 again.
        "logprobs": [float(f"{value:.9g}") for value in trajectory.rollout_logprobs.tolist()],
        "weight_version": int(trajectory.weight_versions.max()),
        "calls": [_span(calls[index]) for index in trajectory.call_indices],
    }


class LoggedCall(msgspec.Struct):
    """Where a call's sampled ids stand in its segment."""

    index: int
    start: int
    stop: int
    finish_reason: str = ""
    weight_version: int = -1


class LoggedSegment(msgspec.Struct):
    """A segment as the log has it; index t of the three lists speaks about token t."""

    token_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    weight_version: int = -1
    calls: list[LoggedCall] = []


class LoggedRollout(msgspec.Struct):
    """A line of the log. What another version did not write has its default; what it wrote beyond is ignored."""

    rollout_id: str
    step: int
    task_index: int = -1
    group_id: int = -1
    attempt: int = 0
    agent: str = ""
    reward: float | None = None
    advantage: float | None = None
    truncated: bool = False
    seconds: float = 0.0
    failure: dict[str, Any] | None = None
    breaks: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    prompt: list[Any] = []
    output: list[Any] = []
    segments: list[LoggedSegment] = []
    reward_components: dict[str, Any] = {}
    masked: bool = False
    context_overflow: bool = False
    invalid_tool_calls: int = 0
    unconfirmed_calls: int = 0
    ids_lost: bool = False


def _span(call: Call) -> dict[str, Any]:
    """Where a call's sampled ids stand in its segment."""
    return {
        "index": call.index,
        "start": len(call.prompt_ids),
        "stop": call.num_tokens,
        "finish_reason": call.finish_reason,
        "weight_version": call.weight_version,
    }


def logged_rollout(line: Mapping[str, Any]) -> Rollout:
    """The rollout of a line: what is aligned, compared and packed from it is what was from the one that was played.

    Example: a call that was fed ``[1, 10, 7]`` and sampled ``[20, 2]`` stands in its segment's ``token_ids`` as
    ``[1, 10, 7, 20, 2]`` with ``start`` 3 and ``stop`` 5.
    """
    failure = line["failure"]
    return Rollout(
        rollout_id=line["rollout_id"],
        task_index=line["task_index"],
        group_id=line["group_id"],
        attempt=line["attempt"],
        agent=line["agent"],
        reward=line["reward"],
        calls=tuple(
            sorted((call for segment in line["segments"] for call in _calls(segment)), key=lambda call: call.index)
        ),
        unconfirmed_calls=line["unconfirmed_calls"],
        ids_lost=line["ids_lost"],
        breaks=tuple(SpliceBreak(**found) for found in line["breaks"]),
        output=line["output"],
        prompt=line["prompt"],
        truncated=line["truncated"],
        context_overflow=line["context_overflow"],
        masked=line["masked"],
        invalid_tool_calls=line["invalid_tool_calls"],
        seconds=line["seconds"],
        failure=None if failure is None else _failure(failure),
        metrics=line["metrics"],
        reward_components=line["reward_components"],
    )


def _calls(segment: Mapping[str, Any]) -> Iterator[Call]:
    ids, logprobs = segment["token_ids"], np.asarray(segment["logprobs"], dtype=np.float32).tolist()
    for span in segment["calls"]:
        start, stop = span["start"], span["stop"]
        yield Call(
            index=span["index"],
            prompt_ids=ids[:start],
            token_ids=ids[start:stop],
            logprobs=logprobs[start:stop],
            finish_reason=span["finish_reason"],
            weight_version=span["weight_version"],
        )


def _failure(failure: Mapping[str, Any]) -> Failure:
    if "how" in failure:
        return Misaligned(message=failure["message"], how=Misalignment(failure["how"]))
    return Failure(kind=FailureKind(failure["kind"]), message=failure["message"])


def read_rollout_log(path: Path) -> tuple[Path, Iterator[dict[str, Any]]]:
    """The model path of a log, and its rollouts one by one.

    Raises:
        ConfigError: there is no such file, or it is not a rollout log; while the rollouts are read, at a line that is
            damaged or cut off.
    """
    return Path(read_header(path)["model"]), _lines(path)


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a log.

    Raises:
        ConfigError: there is no such file, or it is not a rollout log.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; a run writes `rollouts.jsonl` into its output directory")
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    header = _header(first)
    if header.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is not a rollout log: its first line should say format {FORMAT!r}, got {first[:80]!r}"
        )
    return header


def _header(line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        next(file)
        for number, line in enumerate(file, start=2):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigError(
                    f"{path}, line {number}: {error}; the run was ended while it wrote, or the file was damaged. "
                    "`lightning-gym report` leaves such lines out"
                ) from error
