"""GymLoop: the two acts of a step, sync and batches, for a loop written by hand: plain PyTorch, Fabric, Accelerate.

It is made of what `lightning_gym.callback.GymCallback` is made of, `Colocation` and `RolloutStream`, and adds what a
Trainer does there: it counts optimizer steps.
"""

import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.colocation import CollectSettings, Colocation
from lightning_gym.comparison import WindowSettings
from lightning_gym.errors import ConfigError, StalePolicyError
from lightning_gym.gym.servers import Gym
from lightning_gym.ladder import SyncMode
from lightning_gym.memory_budget import Precision
from lightning_gym.policy.engine import Engine
from lightning_gym.policy.ledger import Profile
from lightning_gym.policy_checks import check_lag, check_sampling
from lightning_gym.ranks import Ranks, rank_dir
from lightning_gym.reference import with_old_logprobs
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.sharding import is_sharded
from lightning_gym.stream import RolloutStream
from lightning_gym.tasks import read_tasks
from lightning_gym.trainer_logprobs import FILE_NAME, TrainerLogprobs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.hooks import RemovableHandle


class GymLoop:
    """Plays a policy on a Gym and hands out the windows that a hand-written loop trains on.

    ::

        with GymLoop(model, "train.jsonl", engine=VLLMEngine(), gym=EmbeddedGym(["counter"]), window=settings) as gym:
            for window in gym.windows(max_steps=100):
                for batch in window:
                    loss, _ = grpo(token_logprobs(model, batch), batch)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Every window is played by the weights it trains; with ``updates_per_collection`` above 1, by those that the first
    window of its collection trained. Batches are on the model's device and complete: do not give them to
    ``accelerator.prepare`` or ``fabric.setup_dataloaders``, which fetch ahead and deal them out again.

    ``loss_weight`` undoes what a loss is divided by on its way to the optimizer, so that the gradient is that of the
    plain sum of the losses over all ranks and micro-batches: Accelerate's ``backward`` divides by
    ``gradient_accumulation_steps`` (1.15, ``accelerator.py``), Fabric's and torch's by nothing; DDP averages over ranks
    under all three.

    Args:
        model: the causal language model as the loop calls it, after DDP, Fabric or Accelerate have wrapped it, or
            `lightning_gym.sharding.shard` has cut it.
        tasks: JSONL path(s) of Gym dataset rows, or rows in memory.
        engine: what samples, for example `lightning_gym.VLLMEngine`.
        gym: what plays, for example `lightning_gym.EmbeddedGym`.
        window: what an optimizer step is made of.
        num_micro_batches: of each rank in a window; ``None``: the accelerator's ``gradient_accumulation_steps``, or 1.
        accelerator: Accelerate's, where the model was prepared by one.
        ranks: who else trains, on other data; ``None``: everybody in ``torch.distributed``'s process group.
        sampling: of rollouts; ``top_p`` and ``top_k`` only with `corrected`.
        corrected: the loop's loss applies one of `lightning_gym.corrections`; needed with ``max_lag`` in `window`.
        collect: how rollouts are played.
        sync_mode: how the engine gets the weights, see `lightning_gym.GymCallback`.
        model_path: directory with the model's config, tokenizer and chat template; ``None``: where the model was
            loaded from (``model.name_or_path``).
        seed: of the order of tasks.
        agent: the Gym agent of rows that name none; a list: one for each file of `tasks`.
        run_dir: where ``rollouts.jsonl`` and Gym's log go; rank N writes into ``rank_N`` inside.

    Raises:
        ConfigError: a setting or a row is not usable, or a launcher's processes have not joined a group; on entry,
            whatever can be checked before a rollout is paid for.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: str | Path | Sequence[str | Path | Mapping[str, Any]],
        *,
        engine: Engine,
        gym: Gym,
        window: WindowSettings,
        num_micro_batches: int | None = None,
        accelerator: "Accelerator | None" = None,
        ranks: Ranks | None = None,
        sampling: SamplingProfile | None = None,
        corrected: bool = False,
        collect: CollectSettings | None = None,
        sync_mode: SyncMode = "auto",
        model_path: str | Path | None = None,
        seed: int = 0,
        agent: str | Sequence[str] | None = None,
        run_dir: str | Path = "gym_run",
    ) -> None:
        if accelerator is None and getattr(model, "_is_accelerate_prepared", False):
            raise ConfigError(
                "the model was prepared by Accelerate, whose backward() divides losses by gradient_accumulation_steps; "
                "pass accelerator=..., so that batches are weighted for that"
            )
        self.metrics: dict[str, float] = {}
        """Of the last window: rollouts, sync, seconds."""
        self.ranks = ranks or Ranks.of_process_group()
        """Who else trains; rank 0 is the one to print."""
        profile = sampling or SamplingProfile()
        check_sampling(profile, corrected=corrected)
        check_lag(window.max_lag, corrected=corrected)
        profiles: dict[Profile, SamplingProfile] = {"train": profile, "eval": profile}
        self._colocation = Colocation(engine, gym, profiles, collect or CollectSettings(), sync_mode=sync_mode)
        self._stream = RolloutStream(read_tasks(tasks, agent=agent), window, seed=seed)
        if window.updates_per_collection > 1:
            self._stream.prepare = self._with_old_logprobs
        self._finished = _Finished(steps=0, position=0)
        self._loss_divisor = 1 if accelerator is None else accelerator.gradient_accumulation_steps
        mixed: dict[str, Precision] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}
        self._precision: Precision | None = None if accelerator is None else mixed.get(accelerator.mixed_precision)
        self._num_micro_batches = num_micro_batches or self._loss_divisor
        self._called = model
        self._model = unwrapped(model)
        self._model_path = Path(model_path or self._model.config.name_or_path)  # type: ignore[union-attr]  checked
        self._run_dir = rank_dir(Path(run_dir), self.ranks.rank)
        self._steps_seen = 0
        self._left: int | None = None
        """Micro-batches of the open window that were not asked for; ``None`` between windows."""
        self._hook: RemovableHandle | None = None
        self._trainer_logprobs: TrainerLogprobs | None = None

    def __enter__(self) -> Self:
        trained = {id(parameter) for parameter in self._model.parameters()}

        def count(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
                self.mark_step()

        self._hook = register_optimizer_step_post_hook(count)
        try:
            self._stream.log = RolloutLog(self._run_dir / "rollouts.jsonl", self._model_path, resume=self.step > 0)
            self._trainer_logprobs = TrainerLogprobs(self._run_dir / FILE_NAME, resume=self.step > 0)
            self._colocation.start(
                self._model,
                self._model_path,
                self._stream.tasks,
                run_dir=self._run_dir,
                run_id=uuid.uuid4().hex[:8],
                ranks=self.ranks,
                precision=self._precision,
                max_tokens_per_micro_batch=self._stream.settings.max_tokens_per_micro_batch,
                max_lag=self._stream.settings.max_lag,
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def windows(self, max_steps: int) -> Generator[Iterator[TrajectoryBatch]]:
        """Windows until `max_steps` optimizer steps are done; each is played when it is asked for.

        Collective: every rank asks for the same number.

        Yields:
            An iterator over the window's micro-batches; the optimizer steps once after the last of them.

        Raises:
            ConfigError: the ranks train different weights.
            StalePolicyError: no optimizer step was seen after a window, or one in the middle of it.
            CollectionError: too many rollouts failed.
        """
        while self.step < max_steps:
            self._check_equal_on_ranks()
            batches = self._stream.window(
                self._colocation,
                version=self.step,
                num_micro_batches=self._num_micro_batches,
                loss_divisor=self._loss_divisor,
                last=self.step + 1 >= max_steps,
            )
            self.metrics = self._stream.metrics | self._colocation.take_sync_metrics()
            self._steps_seen, self._left = 0, len(batches)
            yield self._handed_out(batches)
            self._check_trained()
            if self._trainer_logprobs is not None:
                self._trainer_logprobs.write(self.step)
            self._finished, self._left = _Finished(self.step + 1, self._stream.cursor.position), None

    def record(self, batch: TrajectoryBatch, logprobs: Tensor) -> None:
        """Keep the trainer's logprobs of a micro-batch for `lightning-gym report`; optional.

        Args:
            batch: of the current window.
            logprobs: ``[batch, seq]`` of its tokens, as `lightning_gym.logprobs.token_logprobs` gives them.
        """
        if self._trainer_logprobs is not None:
            self._trainer_logprobs.add(batch, logprobs)

    def mark_step(self) -> None:
        """Say that the policy's weights have moved.

        Done for you when a torch optimizer steps. Call it where something else moves them (DeepSpeed steps inside
        ``backward``), or where a step was skipped on purpose, as a gradient scaler does.
        """
        self._steps_seen += 1

    @property
    def step(self) -> int:
        """Optimizer steps finished when the latest window was asked for; the version of the weights that it trains."""
        return self._finished.steps

    @property
    def _is_trained(self) -> bool:
        """Whether the open window has been trained on, and its optimizer has stepped."""
        return self._left == 0 and self._steps_seen > 0

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands after the last finished optimizer step; plain Python, equal on all ranks.

        Save it with the weights and the optimizer at any time between two optimizer steps. A window that is not
        finished by then is played and trained again whole.
        """
        position = self._stream.cursor.position if self._is_trained else self._finished.position
        return self._stream.state_at(position) | {"step": self.step + self._is_trained}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a run, on any number of ranks; before the first window.

        Raises:
            ConfigError: the state is of another dataset, seed or group size, or windows have been played.
        """
        if self.step or self._left is not None:
            raise ConfigError("a GymLoop that has played windows cannot load a state; make a new one and load it first")
        self._finished = _Finished(steps=state_dict["step"], position=self._stream.restore(state_dict))

    def close(self) -> None:
        """Stop the engine and Gym; idempotent, bounded. Leaving the ``with`` block does it."""
        if self._hook is not None:
            self._hook.remove()
        self._colocation.close()
        if self._stream.log is not None:
            self._stream.log.close()
        if self._trainer_logprobs is not None:
            self._trainer_logprobs.close()

    def _with_old_logprobs(self, batches: list[TrajectoryBatch]) -> list[TrajectoryBatch]:
        with self.ranks.agreeing():
            return with_old_logprobs(self._called, batches)  # as the loop calls it: in the precision that it trains in

    def _handed_out(self, batches: Sequence[TrajectoryBatch]) -> Iterator[TrajectoryBatch]:
        device = next(self._model.parameters()).device
        for number, batch in enumerate(batches, start=1):
            if self._steps_seen:
                raise StalePolicyError(
                    f"the optimizer stepped in the middle of window {self.step}: its next micro-batch was sampled by "
                    f"the weights before. Step once, after all {self._num_micro_batches} micro-batches of a window"
                )
            self._left = len(batches) - number
            yield batch.to(device)

    def _check_equal_on_ranks(self) -> None:
        *_, probe = self._model.parameters()
        if self.ranks.size > 1 and not is_sharded(self._model):
            sums = self.ranks.gather(probe.detach().double().sum().item())
            if len(set(sums)) > 1:
                raise ConfigError(
                    f"the ranks hold different weights at step {self.step}, so each trains alone; wrap the model in "
                    "DistributedDataParallel, or prepare it with Fabric or Accelerate, and call the wrapper"
                )

    def _check_trained(self) -> None:
        if self._left:
            raise StalePolicyError(
                f"{self._left} of the {self._num_micro_batches} micro-batches of window {self.step} were not asked for;"
                " train on all of a window before the next one, its loss is normalised over all of them"
            )
        if not self._steps_seen:
            raise StalePolicyError(
                f"no optimizer step on the model's parameters was seen after window {self.step}. Call optimizer.step() "
                "once after its micro-batches (Accelerate: with accelerator.accumulate(model), and "
                f"gradient_accumulation_steps={self._num_micro_batches}); call mark_step() where something else moves "
                "the weights, or where a gradient scaler skipped the step"
            )


@dataclass(frozen=True, slots=True)
class _Finished:
    """What is behind a run."""

    steps: int
    """Optimizer steps."""
    position: int
    """Tasks dealt to their windows."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The language model inside the wrappers of DDP, Fabric (``.module``) and ``torch.compile`` (``._orig_mod``).

    FSDP1's stays around it: parts that no inner unit has are whole only in the outermost one's forward.

    Raises:
        ConfigError: what is inside is not a transformers model.
    """
    while not hasattr(type(model), "from_pretrained") and type(model).__name__ != "FullyShardedDataParallel":
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise ConfigError(
                f"the model is a {type(model).__name__}; expected the transformers causal language model that is "
                "trained, bare or wrapped by DistributedDataParallel, Fabric, Accelerate or torch.compile"
            )
        model = inner
    return model
