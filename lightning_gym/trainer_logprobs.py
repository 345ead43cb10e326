"""The trainer's logprobs of trained tokens, beside the rollout log: to be compared with the engine's, token by token.

A file of its own: rollouts are logged before they train. Optional: readers of ``rollouts.jsonl`` get along without it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightning_gym.rollout_log import end_of_steps_before

if TYPE_CHECKING:  # reading the file needs no torch
    from torch import Tensor

    from lightning_gym.batch import TrajectoryBatch

FILE_NAME = "trainer_logprobs.jsonl"


class TrainerLogprobs:
    """Appends to a file, one line a segment.

    ::

        {"step": 4, "rollout_id": "run.0.train.7.1.0", "segment": 0, "logprobs": [-0.111, -0.02]}

    ``logprobs`` are of the segment's trained tokens in order, in nats, under the weights before the step. Nothing
    leaves the device before `write`.

    Args:
        path: made with its directories.
        resume: continue the file of the run that is resumed, from the step of the first `write` on: its lines and those
            of later steps are cut off. Otherwise a file of an earlier run is replaced.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._continues = resume and path.is_file()
        self._file = path.open("ab" if resume else "wb")
        self._waiting: list[tuple[TrajectoryBatch, Tensor]] = []

    def add(self, batch: "TrajectoryBatch", logprobs: "Tensor") -> None:
        """Keep what a micro-batch measured.

        Args:
            batch: the micro-batch.
            logprobs: ``[batch, seq]`` of its tokens, nats.
        """
        self._waiting.append((batch, logprobs.detach()))

    def write(self, step: int) -> None:
        """Append the lines of a window.

        Args:
            step: the optimizer step that trained on it.
        """
        if self._continues:
            self._file.truncate(end_of_steps_before(step, self._path))
            self._continues = False
        for batch, logprobs in self._waiting:
            mask = batch.loss_mask[0].cpu().numpy()
            values = logprobs[0].double().cpu().numpy().round(8)
            end = 0
            # without sources, as a filler is, there is nothing to say whose tokens these were
            for (rollout_id, segment), length in zip(batch.sources, batch.sequence_lengths, strict=False):
                start, end = end, end + length
                trained = values[start:end][mask[start:end]]
                if trained.size:
                    line = {"step": step, "rollout_id": rollout_id, "segment": segment, "logprobs": trained.tolist()}
                    self._file.write(msgspec.json.encode(line) + b"\n")
        self._waiting.clear()
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def logprobs_of(outputs: Any) -> "Tensor | None":
    """The ``logprobs`` that a ``training_step`` returned beside its loss, if it did.

    Example:
        >>> import torch
        >>> logprobs_of({"loss": torch.tensor(0.5), "logprobs": torch.zeros(1, 2)})
        tensor([[0., 0.]])
        >>> logprobs_of(torch.tensor(0.5)) is None
        True
    """
    found = outputs.get("logprobs") if isinstance(outputs, Mapping) else None
    return found if hasattr(found, "detach") else None


class Line(msgspec.Struct):
    """One line of the file."""

    rollout_id: str
    segment: int
    logprobs: list[float]
    step: int = -1


def read_trainer_logprobs(path: Path) -> Iterator[Line]:
    """The lines of a file that was written; a line that cannot be read, as the last of a killed run, is left out."""
    decoder = msgspec.json.Decoder(Line)
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(msgspec.DecodeError):
                yield decoder.decode(line)
