"""GymCallback: colocates an engine with the policy of a Lightning Trainer and has it play on a Gym.

Hook bodies are a few lines; what they do is in `lightning_gym.colocation` and `lightning_gym.stream`.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_gym import metrics
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.collect import Stragglers
from lightning_gym.colocation import CollectSettings, Colocation
from lightning_gym.corrections import none as no_correction
from lightning_gym.errors import ConfigError, StalePolicyError
from lightning_gym.evaluation import Evaluation, EvaluationGroup, EvaluationTasks, evaluate
from lightning_gym.export import RECORD, policy_record
from lightning_gym.gym.servers import Gym
from lightning_gym.ladder import SyncMode
from lightning_gym.memory_budget import Precision
from lightning_gym.policy.engine import Engine
from lightning_gym.policy.ledger import Profile
from lightning_gym.policy.parsers import BUILTIN
from lightning_gym.policy_checks import check_lag, check_sampling
from lightning_gym.preconditions import check_trainer
from lightning_gym.ranks import rank_dir
from lightning_gym.replay import Replay
from lightning_gym.resume import rewind_fit_loop
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import FILE_NAME as ROLLOUTS
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.scores import PREFIX, REWARD
from lightning_gym.sigterm import Sigterm
from lightning_gym.stream import RolloutStream
from lightning_gym.tasks import Task
from lightning_gym.trainer_logprobs import FILE_NAME, TrainerLogprobs, logprobs_of
from lightning_gym.validation import ranks_of

_log = logging.getLogger(__name__)
VAL_ROLLOUTS = "val_rollouts.jsonl"


class GymCallback(L.Callback):
    """Lets the policy being trained play on a Gym, with its own weights, in its own process.

    The engine starts in ``on_fit_start``. Weights are synced when the first micro-batch of a window is asked for and
    ``trainer.global_step`` has moved on: once an optimizer step, whatever ``accumulate_grad_batches`` is. The same
    before a validation, which may come in the middle of a window. ``trainer.validate`` starts and closes the engine.

    Args:
        engine: what samples, for example `lightning_gym.VLLMEngine`.
        gym: what plays, for example `lightning_gym.EmbeddedGym`.
        replay: a ``rollouts.jsonl``, or a run directory that holds one, to train on in place of engine and Gym, which
            then are not needed, and not started where they are given; see `lightning_gym.replay`.
        policy: attribute of the LightningModule that holds the causal language model; dots reach deeper.
        model_path: directory with the model's config, tokenizer and chat template; ``None``: where the model was
            loaded from (``model.name_or_path``).
        sampling: of training rollouts; ``top_p`` and ``top_k`` only where the module's ``correction`` is on.
        eval_sampling: of validation rollouts; any ``top_p`` and ``top_k``. ``None``: the same as `sampling`.
        sync_mode: how the engine gets the trainer's weights: ``"adapter"`` (a LoRA adapter moves, its base does not),
            ``"share"`` (its tensors are the trainer's, nothing moves), ``"copy"``, ``"reload"`` (through the engine's
            own loader), or ``"auto"``, the first of them whose preconditions hold.
        seed: of sampling: together with a rollout's group and attempt it decides every token.
        rollout_timeout_s: a rollout that takes longer has failed.
        retries: further tries for a rollout that failed for reasons outside of it.
        max_failed_frac: above this fraction of failed rollouts a step is given up, and with it the run.
        heartbeat_s: a line of progress is logged this often while rollouts are being collected.
        gym_away_s: for how long a Gym that does not answer is waited for, before rollouts fail by its absence.
        stragglers: when not to wait for the last attempts of a group; ``None``: every one is waited for.
        endpoint_port: of the local OpenAI endpoint; 0 picks a free one.
        endpoint_api_key: its bearer token; ``None`` makes a random one. A Gym that was started before needs both known.
        tool_parser: how agents see tool calls: ``"builtin"`` (Hermes' form), a name in vLLM's registry (``"hermes"``,
            ``"llama3_json"``, ``"qwen3_coder"``, ...), or ``None`` to leave them in the content. Trained ids are the
            sampled ones whatever a parser makes of them.
        reasoning_parser: how they see reasoning: ``"builtin"`` (``<think>``), a name in vLLM's registry
            (``"deepseek_r1"``, ``"qwen3"``, ...), or ``None``.
        log_rollouts: write ``rollouts.jsonl`` into the run directory, or where a path says; ``val_rollouts.jsonl`` of
            validations; and ``trainer_logprobs.jsonl`` where the module's ``training_step`` returns
            ``{"loss": loss, "logprobs": logprobs}`` instead of the loss alone.
        run_dir: where logs go; ``None``: the Trainer's ``log_dir``, or its ``default_root_dir``.

    Raises:
        ConfigError: in ``setup`` and ``on_fit_start``, before a rollout is paid for.
        StalePolicyError: a token to be trained on was sampled by other weights than the current ones.
    """

    def __init__(
        self,
        *,
        engine: Engine | None = None,
        gym: Gym | None = None,
        replay: str | Path | None = None,
        policy: str = "model",
        model_path: str | Path | None = None,
        sampling: SamplingProfile | None = None,
        eval_sampling: SamplingProfile | None = None,
        sync_mode: SyncMode = "auto",
        seed: int = 0,
        rollout_timeout_s: float = 600.0,
        retries: int = 2,
        max_failed_frac: float = 0.25,
        heartbeat_s: float = 10.0,
        gym_away_s: float = 60.0,
        stragglers: Stragglers | None = None,
        endpoint_port: int = 0,
        endpoint_api_key: str | None = None,
        tool_parser: str | None = BUILTIN,
        reasoning_parser: str | None = BUILTIN,
        log_rollouts: bool | str | Path = True,
        run_dir: str | Path | None = None,
    ) -> None:
        train = sampling or SamplingProfile()
        settings = CollectSettings(
            seed=seed,
            rollout_timeout_s=rollout_timeout_s,
            retries=retries,
            max_failed_frac=max_failed_frac,
            heartbeat_s=heartbeat_s,
            gym_away_s=gym_away_s,
            stragglers=stragglers,
            endpoint_port=endpoint_port,
            endpoint_api_key=endpoint_api_key,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )
        profiles: dict[Profile, SamplingProfile] = {"train": train, "eval": eval_sampling or train}
        self.colocation = _colocation(engine, gym, replay, profiles, settings, sync_mode)
        self.history: list[dict[str, float]] = []
        """One entry a finished optimizer step: everything that was logged for it."""
        self.evaluations: list[dict[str, float]] = []
        """One entry a validation, the sanity check excepted: the optimizer step, and everything that was logged."""
        self.last_evaluation: Evaluation | None = None
        """The latest of them with its rollouts."""
        self._handed_out = _HandedOut(step=0, start=0, stop=0)
        self._policy = policy
        self._model_path = None if model_path is None else Path(model_path)
        self._log_rollouts = log_rollouts
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._stream: RolloutStream | None = None
        self._trainer_logprobs: TrainerLogprobs | None = None
        self._validation: tuple[EvaluationTasks, int] | None = None
        self._evaluation: Evaluation | None = None
        self._evaluation_log: RolloutLog | None = None
        self._is_up = False
        self._sigterm: Sigterm | None = None
        self._step_metrics: dict[str, float] = {}
        self._clock = metrics.PhaseClock()

    def finished_position(self, step: int) -> int:
        """Tasks dealt up to the last finished optimizer step.

        Args:
            step: the Trainer's ``global_step``, at whatever instant.
        """
        window = self._handed_out
        return window.stop if step > window.step else window.start

    def resume_at(self, position: int) -> None:
        """Called by `GymDataModule.load_state_dict`: tasks up to `position` were dealt to finished steps."""
        self._handed_out = _HandedOut(step=0, start=position, stop=position)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have a window that the checkpoint cut trained again whole."""
        saved = checkpoint.get(type(trainer.datamodule).__qualname__, {}).get("num_micro_batches")  # type: ignore[attr-defined]
        if saved is None or not pl_module.automatic_optimization:
            return
        again = rewind_fit_loop(
            checkpoint["loops"]["fit_loop"],
            saved_micro_batches=saved,
            micro_batches=trainer.accumulate_grad_batches,
        )
        if again:
            _log.info("the checkpoint cut a window after %d micro-batches; the window is trained again, whole", again)

    def attach(self, stream: RolloutStream) -> None:
        """Called by `GymDataModule.setup`: whose tasks are played."""
        self._stream = stream

    def attach_validation(self, tasks: EvaluationTasks, num_samples: int) -> None:
        """Called by `GymDataModule.setup`: what is played in validation, and how often each task."""
        self._validation = (tasks, num_samples)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage not in {"fit", "validate"}:
            return
        if (self._stream if stage == "fit" else self._validation) is None:
            raise ConfigError(
                "no GymDataModule is attached; pass one: trainer.fit(module, datamodule=GymDataModule(...))"
            )
        check_trainer(trainer, GymCallback)
        self._sigterm = Sigterm(trainer)
        self.find_policy(pl_module)
        if stage == "validate":
            return
        assert self._stream is not None
        max_lag = self._stream.settings.max_lag
        expect_lag: Callable[[int], None] | None = getattr(pl_module, "expect_lag", None)
        if expect_lag is not None:
            expect_lag(max_lag)
        corrected = getattr(pl_module, "correction", no_correction) is not no_correction
        check_sampling(self.colocation.profiles["train"], corrected=corrected)
        check_lag(max_lag, corrected=corrected)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._sigterm is not None
        self._sigterm.take_over()
        if isinstance(self.colocation, Colocation):
            self.colocation.heed(self._sigterm.check)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring up engine and Gym, with logs of what is going to be played."""
        model = self.find_policy(pl_module)
        # Rank 0's: a time in a path is another one on every rank that a launcher starts.
        run_dir = trainer.strategy.broadcast(Path(self._run_dir or trainer.log_dir or trainer.default_root_dir))
        run_dir = rank_dir(run_dir, trainer.global_rank)
        model_path = self.path_of(model)
        resume, tasks = trainer.ckpt_path is not None, list[Task]()
        if trainer.state.fn == TrainerFn.FITTING and self._stream is not None:
            tasks += self._stream.tasks
            if self._log_rollouts and not isinstance(self.colocation, Replay):
                path = run_dir / ROLLOUTS
                if self._log_rollouts is not True:
                    path = Path(self._log_rollouts)
                    path = rank_dir(path.parent, trainer.global_rank) / path.name
                sampling = self.colocation.profiles["train"]
                self._stream.log = RolloutLog(path, model_path, resume=resume, sampling=sampling)
                self._trainer_logprobs = TrainerLogprobs(run_dir / FILE_NAME, resume=resume)
        if self._validation is not None:
            tasks += self._validation[0].tasks
            if self._log_rollouts:
                sampling = self.colocation.profiles["eval"]
                path = run_dir / VAL_ROLLOUTS
                self._evaluation_log = RolloutLog(path, model_path, resume=resume, sampling=sampling)
        self._is_up = True
        self.colocation.start(
            model,
            model_path,
            tasks,
            run_dir=run_dir,
            run_id=uuid.uuid4().hex[:8],
            ranks=ranks_of(trainer),
            precision=_precision(trainer),
            max_tokens_per_micro_batch=0 if self._stream is None else self._stream.settings.max_tokens_per_micro_batch,
            max_lag=0 if self._stream is None else self._stream.settings.max_lag,
        )

    def evaluate(self, trainer: L.Trainer, *, max_tasks_per_rank: int) -> list[EvaluationGroup]:
        """Called by the validation loader: play the tasks with the weights of the moment."""
        assert self._validation is not None
        tasks, num_samples = self._validation
        self._evaluation = evaluate(
            self.colocation,
            tasks,
            version=trainer.global_step,
            num_samples=num_samples,
            max_tasks_per_rank=max_tasks_per_rank,
            log=None if trainer.sanity_checking else self._evaluation_log,
        )
        return list(self._evaluation.groups)

    def next_window(self, trainer: L.Trainer, stream: RolloutStream, *, last: bool = False) -> list[TrajectoryBatch]:
        """Called by the loader: the micro-batches of the next optimizer step.

        Args:
            trainer: whose loader it is.
            stream: of its data module.
            last: no window is going to follow, so none is played ahead.
        """
        _check_not_prefetched(trainer)
        assert self._sigterm is not None
        self._sigterm.check()
        start = stream.cursor.position
        batches = stream.window(
            self.colocation,
            version=trainer.global_step,
            num_micro_batches=trainer.accumulate_grad_batches,
            loss_divisor=trainer.accumulate_grad_batches,
            last=last,
        )
        if isinstance(self.colocation, Replay):
            with trainer.strategy.precision_plugin.forward_context():
                model = self.find_policy(trainer.lightning_module)
                self.colocation.compare(model, batches, step=trainer.global_step)
        self._step_metrics = stream.metrics | self.colocation.take_sync_metrics()
        self._handed_out = _HandedOut(step=trainer.global_step, start=start, stop=stream.cursor.position)
        self._clock = metrics.PhaseClock()
        return batches

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, TrajectoryBatch):
            raise ConfigError(
                f"expected a TrajectoryBatch from GymDataModule's loader, got {type(batch).__name__}; is it wrapped?"
            )
        assert self._stream is not None
        if not isinstance(self.colocation, Replay):  # which tells of its lag instead
            _check_on_policy(batch, trainer.global_step, max_lag=self._stream.settings.max_token_lag)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # Lightning's loggers see a window's last batch only
            values = dict(self._step_metrics)
            pl_module.log_dict({metrics.REWARD: values.pop(metrics.REWARD)}, prog_bar=True, batch_size=1)
            pl_module.log_dict(values, batch_size=1)
            metrics.log_histograms(trainer.loggers, self._stream.rewards, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logprobs = logprobs_of(outputs)
        if self._trainer_logprobs is not None and logprobs is not None:
            self._trainer_logprobs.add(batch, logprobs)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._trainer_logprobs is not None:
            self._trainer_logprobs.write(trainer.global_step - 1)  # the step was counted already
        pl_module.log_dict(self._clock.lap("train"), batch_size=1)
        logged = {
            name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith(f"{PREFIX}/")
        }
        self.history.append({"step": float(trainer.global_step)} | logged)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock.pause()
        if not self._is_up:  # trainer.validate(); Lightning's inference mode would leave its mark on the weights
            with torch.inference_mode(mode=False):
                self._start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluation is not None:
            values = self._evaluation.metrics()
            pl_module.log_dict({REWARD: values.pop(REWARD)}, prog_bar=True, batch_size=1, sync_dist=True)
            pl_module.log_dict(values, batch_size=1, sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluation is not None and not trainer.sanity_checking:
            self.last_evaluation = self._evaluation
            self.evaluations.append({"step": float(trainer.global_step)} | self._evaluation.metrics())
        self._evaluation = None
        self._clock.go_on()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What ``lightning-gym export`` needs beside the weights."""
        model = self.find_policy(pl_module)
        checkpoint[RECORD] = policy_record(model, attribute=self._policy, model_path=self.path_of(model))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1 and not isinstance(exception, Exception):  # the others only find that it has gone
            _log.warning("rank %d ends by %s", trainer.global_rank, type(exception).__name__)
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self.colocation.close()
        self._is_up = False
        for log in (self._evaluation_log, self._trainer_logprobs, None if self._stream is None else self._stream.log):
            if log is not None:
                log.close()

    def path_of(self, model: nn.Module) -> Path:
        """The directory with the policy's config, tokenizer and chat template."""
        return self._model_path or Path(model.config.name_or_path)  # type: ignore[union-attr]  a transformers model

    def find_policy(self, pl_module: L.LightningModule) -> nn.Module:
        """The causal language model that `policy` names.

        Raises:
            ConfigError: there is none under that name.
        """
        found: Any = pl_module
        for name in self._policy.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.Module) or not hasattr(found, "config"):
            raise ConfigError(
                f"{type(pl_module).__name__}.{self._policy} is {type(found).__name__}; expected the "
                "transformers causal language model being trained. Name its attribute: GymCallback(policy=...)"
            )
        return found


def _colocation(
    engine: Engine | None,
    gym: Gym | None,
    replay: str | Path | None,
    profiles: dict[Profile, SamplingProfile],
    settings: CollectSettings,
    sync_mode: SyncMode,
) -> Colocation:
    if replay is not None:
        return Replay(replay)
    if engine is None or gym is None:
        raise ConfigError(
            f"GymCallback was given engine={engine!r} and gym={gym!r}; it needs both to play, or replay=... to train "
            "on the rollouts of an earlier run"
        )
    return Colocation(engine, gym, profiles, settings, sync_mode=sync_mode)


@dataclass(frozen=True, slots=True)
class _HandedOut:
    """The latest window that the loader was given."""

    step: int
    """The Trainer's ``global_step`` then; it is finished when that has moved on."""
    start: int
    """Tasks dealt up to its first."""
    stop: int
    """Tasks dealt up to its last."""


def _check_not_prefetched(trainer: L.Trainer) -> None:
    # Lightning 2.6.6, loops/fetchers.py: a fetcher that found no length fetches one batch ahead.
    fetcher = trainer.fit_loop._data_fetcher  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    if fetcher is not None and fetcher.length is None:
        raise ConfigError(
            "the train loader has no length, so Lightning would fetch one step ahead and train on stale rollouts; "
            "give trainer.fit the GymDataModule itself, without wrapping its loader"
        )


def _precision(trainer: L.Trainer) -> Precision | None:
    """Of a Trainer that casts in the forward; where weights are as they compute, they say it themselves."""
    precision = trainer.precision
    return precision if precision in ("bf16-mixed", "16-mixed") else None


def _check_on_policy(batch: TrajectoryBatch, step: int, *, max_lag: int) -> None:
    versions = batch.weight_versions[batch.loss_mask & (batch.weight_versions >= 0)]
    if versions.numel() and not bool(((step - max_lag <= versions) & (versions <= step)).all()):
        raise StalePolicyError(
            f"a batch of optimizer step {step} holds tokens sampled by weights of step "
            f"{int(versions.min())} to {int(versions.max())}; something fetched it ahead of time"
        )
