"""Validation inside a Trainer: a loader that plays held-out tasks, and the ``validation_step`` it needs.

Lightning decides when: ``check_val_every_n_epoch``, ``val_check_interval``, ``num_sanity_val_steps`` and
``limit_val_batches``, which count tasks of a rank here. Its loop is entered only where the module has a
``validation_step``; a module without one gets a step that does nothing, for there is nothing left to compute: the
environments have scored the rollouts, and `lightning_gym.GymCallback` logs what they came to.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_gym.evaluation import EvaluationGroup, EvaluationTasks
from lightning_gym.ranks import Ranks


class Evaluates(Protocol):
    """Who plays, `lightning_gym.GymCallback`."""

    def evaluate(self, trainer: L.Trainer, *, max_tasks_per_rank: int) -> list[EvaluationGroup]:
        """Play the validation tasks."""
        ...


class EvaluationLoader:
    """Yields one `EvaluationGroup` a task; plays all of them together when the first is asked for.

    Sized, with the same length on every rank.
    """

    def __init__(self, callback: Evaluates, tasks: EvaluationTasks, trainer: L.Trainer) -> None:
        self._callback = callback
        self._trainer = trainer
        self._length = tasks.per_rank(ranks_of(trainer).size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[EvaluationGroup]:
        trainer = self._trainer
        (limit,) = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        # Lightning validates in inference mode, whose tensors may never train; syncing can hand tensors to the trainer.
        with torch.inference_mode(mode=False), torch.no_grad():
            groups = self._callback.evaluate(trainer, max_tasks_per_rank=int(limit))
        yield from groups


def ranks_of(trainer: L.Trainer) -> Ranks:
    """The data-parallel ranks of a Trainer."""
    sampler: dict[str, int] = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return Ranks(sampler["rank"], sampler["num_replicas"])


def give_validation_step(module: L.LightningModule) -> None:
    """Let Lightning enter its validation loop, for a module that has no ``validation_step`` of its own."""
    if not is_overridden("validation_step", module):
        module.validation_step = _nothing_left_to_compute


def _nothing_left_to_compute(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
    """Stand in for a ``validation_step``."""
