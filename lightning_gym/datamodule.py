"""GymDataModule: a dataset of tasks as a Lightning DataModule whose batches are played on demand.

Its loader is sized and lazy: Lightning fetches one batch ahead from an unsized loader, which would play every step
with the weights of the step before.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lightning_gym.advantages import Baseline, Scale
from lightning_gym.batch import Aggregation, TrajectoryBatch
from lightning_gym.callback import GymCallback
from lightning_gym.errors import ConfigError
from lightning_gym.stream import RolloutStream, WindowSettings
from lightning_gym.tasks import read_tasks

_STATE_VERSION = 1


class GymDataModule(L.LightningDataModule):
    """Tasks of a Gym dataset, played by the policy being trained.

    Args:
        train: JSONL path(s) of Gym dataset rows, or rows in memory.
        prompts_per_step: tasks an optimizer step, over all ranks.
        group_size: attempts at each task; they share a baseline.
        steps_per_epoch: optimizer steps that Lightning calls an epoch; ``None``: once through the dataset. The order
            of tasks goes on across epochs.
        baseline: what a reward is compared with, see `lightning_gym.advantages.group_advantages`.
        advantage_scale: what the difference is divided by.
        aggregation: what the loss is a mean over, see `lightning_gym.batch.loss_weights`.
        constant_length: tokens a rollout is divided by, with ``aggregation="constant"``.
        max_tokens_per_micro_batch: ceiling of a packed micro-batch. The Trainer's ``accumulate_grad_batches`` says how
            many micro-batches a step has; a step that does not fit raises and says how many would.
        seed: of the order of tasks.
        shuffle: deal tasks in file order if ``False``.
        agent: the Gym agent of rows that name none.

    Raises:
        ConfigError: a setting is out of range. Rows are read and checked in `setup`.
    """

    def __init__(
        self,
        train: str | Path | Sequence[str | Path | Mapping[str, Any]],
        *,
        prompts_per_step: int = 32,
        group_size: int = 8,
        steps_per_epoch: int | None = None,
        baseline: Baseline = "group_mean",
        advantage_scale: Scale = "none",
        aggregation: Aggregation = "token_mean",
        constant_length: int | None = None,
        max_tokens_per_micro_batch: int = 32768,
        seed: int = 0,
        shuffle: bool = True,
        agent: str | None = None,
    ) -> None:
        super().__init__()
        self.stream: RolloutStream | None = None
        self._train = train
        self._steps_per_epoch = steps_per_epoch
        self._seed = seed
        self._shuffle = shuffle
        self._agent = agent
        self._settings = WindowSettings(
            prompts_per_step=prompts_per_step,
            group_size=group_size,
            baseline=baseline,
            advantage_scale=advantage_scale,
            aggregation=aggregation,
            constant_length=constant_length,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        )

    def setup(self, stage: str) -> None:
        """Read the tasks and hand the stream to the Trainer's `GymCallback`."""
        if stage != "fit":
            raise ConfigError(f"GymDataModule has no {stage} data; it plays training rollouts")
        if self.stream is None:
            tasks = read_tasks(self._train, agent=self._agent)
            self.stream = RolloutStream(tasks, self._settings, seed=self._seed, shuffle=self._shuffle)
        self._callback().attach(self.stream)

    def train_dataloader(self) -> "WindowLoader":
        """The loader. Do not wrap it: a wrapper without a length makes Lightning fetch ahead."""
        assert self.stream is not None
        assert self.trainer is not None
        return WindowLoader(self._callback(), self.stream, self.trainer, self._steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the order of tasks stands after the last finished optimizer step; plain Python, equal on all ranks."""
        assert self.stream is not None
        return {
            "version": _STATE_VERSION,
            "position": self._callback().finished_position,
            "seed": self._seed,
            "num_tasks": len(self.stream.tasks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the order of tasks.

        Raises:
            ConfigError: the checkpoint is of another dataset or seed.
        """
        assert self.stream is not None
        here = {"version": _STATE_VERSION, "seed": self._seed, "num_tasks": len(self.stream.tasks)}
        for key, expected in here.items():
            if state_dict.get(key) != expected:
                raise ConfigError(
                    f"the checkpoint has {key}={state_dict.get(key)}, this run {expected}; resume with the same data"
                )
        self.stream.cursor.position = state_dict["position"]
        self._callback().finished_position = state_dict["position"]

    def _callback(self) -> GymCallback:
        callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]  Trainer's
        for callback in callbacks:
            if isinstance(callback, GymCallback):
                return callback
        raise ConfigError(
            "the Trainer has no GymCallback; pass one: Trainer(callbacks=[GymCallback(engine=..., gym=...)])"
        )


class WindowLoader:
    """Yields the micro-batches of one epoch; plays a window when its first micro-batch is asked for."""

    def __init__(
        self, callback: GymCallback, stream: RolloutStream, trainer: L.Trainer, steps_per_epoch: int | None
    ) -> None:
        self._callback = callback
        self._stream = stream
        self._trainer = trainer
        self._steps = steps_per_epoch or max(1, len(stream.tasks) // stream.settings.prompts_per_step)

    def __len__(self) -> int:
        return self._steps * self._trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        for _ in range(self._steps):
            yield from self._callback.next_window(self._trainer, self._stream)
