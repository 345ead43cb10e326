"""GymDataModule: a dataset of tasks as a Lightning DataModule whose batches are played on demand.

Its loader is sized and lazy: Lightning fetches one batch ahead from an unsized loader, which would play every step
with the weights of the step before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_gym.advantages import Baseline, Scale
from lightning_gym.batch import Aggregation, TrajectoryBatch
from lightning_gym.callback import GymCallback
from lightning_gym.comparison import Truncated, WindowSettings, ZeroVariance
from lightning_gym.errors import ConfigError
from lightning_gym.evaluation import EvaluationTasks, Rows
from lightning_gym.preconditions import check_same_lightning
from lightning_gym.ranks import Ranks
from lightning_gym.reference import with_old_logprobs
from lightning_gym.stream import RolloutStream
from lightning_gym.tasks import read_tasks
from lightning_gym.validation import EvaluationLoader, give_validation_step

Prepare = Callable[[list[TrajectoryBatch], Ranks], list[TrajectoryBatch]]


class GymDataModule(L.LightningDataModule):
    """Tasks of a Gym dataset, played by the policy being trained.

    Args:
        train: JSONL path(s) of Gym dataset rows, or rows in memory.
        val: held-out rows, like `train`, or several datasets by name, as in ``{"easy": path, "hard": path}``. They are
            played in Lightning's validation loop, whose batches are tasks: see `lightning_gym.validation`.
        val_samples: attempts at each of them.
        prompts_per_step: tasks an optimizer step, over all ranks.
        group_size: attempts at each task; they share a baseline.
        steps_per_epoch: optimizer steps that Lightning calls an epoch; ``None``: once through the dataset. The order
            of tasks goes on across epochs.
        updates_per_collection: optimizer steps on the rollouts of one collection, which then plays that many times
            `prompts_per_step` tasks before the first of them. Each rollout trains once; ratios are taken to the weights
            before the first of these steps.
        max_lag: 0: a step is played by the weights that it trains, and one thing is done at a time. 1: the next step is
            played while this one trains, by weights one optimizer step old; a correction for it is switched on, and the
            weights are copied instead of shared.
        baseline: what a reward is compared with, see `lightning_gym.advantages.group_advantages`.
        advantage_scale: what the difference is divided by.
        reward_weights: compare the environments' reward components one by one, and add them with these weights, see
            `lightning_gym.advantages.component_advantages`; ``None``: compare the reward.
        truncated: ``"mask"``: rollouts that ran into a token limit count in their group's baseline, and do not train.
        overlong_max_tokens: sampled tokens of a rollout from which on its reward is 1 less, see
            `lightning_gym.advantages.overlong_penalty`.
        overlong_buffer_tokens: this many tokens before, the penalty sets in.
        zero_variance: what becomes of groups whose rewards are all equal: ``"keep"``, ``"drop"`` (they no longer count
            in the denominators of the loss), or ``"resample"`` (further tasks are played in their place).
        max_resample_rounds: how often that is tried before the step makes do with the groups there are.
        aggregation: what the loss is a mean over, see `lightning_gym.batch.loss_weights`.
        constant_length: tokens a rollout is divided by, with ``aggregation="constant"``.
        max_tokens_per_micro_batch: ceiling of a packed micro-batch. The Trainer's ``accumulate_grad_batches`` says how
            many micro-batches a step has; a step that does not fit raises and says how many would.
        share_prefix: store a prompt that attempts have in common once a micro-batch, see
            `lightning_gym.batch.pack_window`.
        seed: of the order of tasks.
        shuffle: deal tasks in file order if ``False``.
        agent_weights: several environments in one run: how often tasks of each agent are dealt relative to the
            others', as in ``{"math": 1, "tools": 2}``, whatever their number; ``None``: every task once a pass.
        agent: the Gym agent of rows that name none; a list: one for each file of `train`, and of each dataset of `val`.

    Raises:
        ConfigError: a setting is out of range. Rows are read and checked in `setup`.
    """

    def __init__(
        self,
        train: Rows,
        val: Mapping[str, Rows] | Rows | None = None,
        *,
        val_samples: int = 1,
        prompts_per_step: int = 32,
        group_size: int = 8,
        steps_per_epoch: int | None = None,
        updates_per_collection: int = 1,
        max_lag: int = 0,
        baseline: Baseline = "group_mean",
        advantage_scale: Scale = "none",
        reward_weights: Mapping[str, float] | None = None,
        truncated: Truncated = "keep",
        overlong_max_tokens: int | None = None,
        overlong_buffer_tokens: int | None = None,
        zero_variance: ZeroVariance = "keep",
        max_resample_rounds: int = 5,
        aggregation: Aggregation = "token_mean",
        constant_length: int | None = None,
        max_tokens_per_micro_batch: int = 32768,
        share_prefix: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        agent_weights: Mapping[str, float] | None = None,
        agent: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.stream: RolloutStream | None = None
        if val_samples < 1:
            raise ConfigError(f"val_samples is {val_samples}; expected at least one attempt at each validation task")
        self._train = train
        self._val = val
        self._val_samples = val_samples
        self._val_tasks: EvaluationTasks | None = None
        # Lightning takes a data module that has the method for one with validation data, so there is none without.
        if val is not None and not is_overridden("val_dataloader", self):
            self.val_dataloader = self._evaluation_loader
        self._steps_per_epoch = steps_per_epoch
        self._seed = seed
        self._shuffle = shuffle
        self._agent_weights = None if agent_weights is None else dict(agent_weights)
        self._agent = agent
        self._settings = WindowSettings(
            prompts_per_step=prompts_per_step,
            group_size=group_size,
            updates_per_collection=updates_per_collection,
            max_lag=max_lag,
            baseline=baseline,
            advantage_scale=advantage_scale,
            reward_weights=reward_weights,
            truncated=truncated,
            overlong_max_tokens=overlong_max_tokens,
            overlong_buffer_tokens=overlong_buffer_tokens,
            zero_variance=zero_variance,
            max_resample_rounds=max_resample_rounds,
            aggregation=aggregation,
            constant_length=constant_length,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            share_prefix=share_prefix,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trainer":  # the first that a Trainer does to its data module
            check_same_lightning(value)
            if value is not None and self._val is not None:
                give_validation_step(value.lightning_module)
        super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        """Read the tasks and hand them to the Trainer's `GymCallback`."""
        if stage not in {"fit", "validate"} or (stage == "validate" and self._val is None):
            raise ConfigError(
                f"GymDataModule has no {stage} data; it plays training rollouts, and validation rollouts where it is "
                "given val=..."
            )
        if self._val is not None:
            self._val_tasks = self._val_tasks or EvaluationTasks(self._val, agent=self._agent)
            self._callback().attach_validation(self._val_tasks, self._val_samples)
        if stage == "fit":
            self._setup_training()

    def _setup_training(self) -> None:
        self.stream = self.stream or self.make_stream()
        self._callback().attach(self.stream)

    def make_stream(self) -> RolloutStream:
        """Read the tasks, and begin their order."""
        tasks = read_tasks(self._train, agent=self._agent)
        return RolloutStream(
            tasks, self._settings, seed=self._seed, shuffle=self._shuffle, agent_weights=self._agent_weights
        )

    def train_dataloader(self) -> "WindowLoader":
        """The loader. Do not wrap it: a wrapper without a length makes Lightning fetch ahead."""
        assert self.stream is not None
        assert self.trainer is not None
        self.stream.prepare = self._prepare
        return WindowLoader(self._callback(), self.stream, self.trainer, self._steps_per_epoch)

    def _evaluation_loader(self) -> EvaluationLoader:
        assert self._val_tasks is not None
        assert self.trainer is not None
        return EvaluationLoader(self._callback(), self._val_tasks, self.trainer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Unpack what the loader yields."""
        return batch.batch if isinstance(batch, Sealed) else batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands after the last finished optimizer step; plain Python, equal on all ranks."""
        assert self.stream is not None
        assert self.trainer is not None
        position = self._callback().finished_position(self.trainer.global_step)
        return self.stream.state_at(position) | {"num_micro_batches": self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run, on any number of ranks.

        Raises:
            ConfigError: the checkpoint is of another dataset, order of tasks or group size.
        """
        if self.stream is None:  # trainer.validate(ckpt_path=...): no order of tasks goes on
            return
        self._callback().resume_at(self.stream.restore(state_dict))

    def _prepare(self, batches: list[TrajectoryBatch]) -> list[TrajectoryBatch]:
        """Before a window's collection is trained on: `old_logprobs` where they differ, and what the module wants.

        A module may have a ``prepare_window(batches, ranks) -> batches``, as `PolicyModule` has; it is called on every
        rank.
        """
        assert self.trainer is not None
        module, callback = self.trainer.lightning_module, self._callback()
        with self.trainer.strategy.precision_plugin.forward_context():
            if self._settings.updates_per_collection > 1:
                with callback.colocation.ranks.agreeing():
                    batches = with_old_logprobs(callback.find_policy(module), batches)
            prepare_window: Prepare | None = getattr(module, "prepare_window", None)
            return batches if prepare_window is None else prepare_window(batches, callback.colocation.ranks)

    def _callback(self) -> GymCallback:
        callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]  Trainer's
        for callback in callbacks:
            if isinstance(callback, GymCallback):
                return callback
        raise ConfigError(
            "the Trainer has no GymCallback; pass one: Trainer(callbacks=[GymCallback(engine=..., gym=...)])"
        )


class Sealed:
    """A batch on its way through Lightning's precision plugin, which ``precision="bf16-true"`` would round to bfloat16.

    Losses and advantages are float32 whatever the model is. Opened in `GymDataModule.on_before_batch_transfer`.
    """

    def __init__(self, batch: TrajectoryBatch) -> None:
        self.batch = batch


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

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where to go on is the data module's state. That there is one tells Lightning that resuming works."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing to load."""

    def __iter__(self) -> Iterator[Sealed]:
        for number in range(self._steps):
            last = self._is_last_of_run(number)
            for batch in self._callback.next_window(self._trainer, self._stream, last=last):
                yield Sealed(batch)

    def _is_last_of_run(self, number: int) -> bool:
        """Whether no window follows the one that is asked for, as far as the Trainer's limits say."""
        trainer = self._trainer
        if trainer.max_steps != -1 and trainer.global_step + 1 >= trainer.max_steps:
            return True
        last_epoch = trainer.max_epochs not in {None, -1} and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready // trainer.accumulate_grad_batches
        return last_epoch and max(number, done) + 1 >= self._steps
