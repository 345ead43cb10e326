"""GymCallback: colocates an engine with the policy of a Lightning Trainer and has it play on a Gym.

Hook bodies are a few lines; what they do is in `lightning_gym.colocation` and `lightning_gym.stream`.
"""

import logging
import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lightning_gym import metrics
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.colocation import CollectSettings, Colocation
from lightning_gym.errors import ConfigError, StalePolicyError
from lightning_gym.gym.servers import Gym
from lightning_gym.logprobs import check_packing, use_packed_attention
from lightning_gym.policy.engine import Engine
from lightning_gym.ranks import Ranks
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.stream import RolloutStream

_log = logging.getLogger(__name__)


class GymCallback(L.Callback):
    """Lets the policy being trained play on a Gym, with its own weights, in its own process.

    The engine starts in ``on_fit_start``. Weights are synced when the first micro-batch of a window is asked for and
    ``trainer.global_step`` has moved on: once an optimizer step, whatever ``accumulate_grad_batches`` is.

    Args:
        engine: what samples, for example `lightning_gym.VLLMEngine`.
        gym: what plays, for example `lightning_gym.EmbeddedGym`.
        policy: attribute of the LightningModule that holds the causal language model; dots reach deeper.
        model_path: directory with the model's config, tokenizer and chat template; ``None``: where the model was
            loaded from (``model.name_or_path``).
        sampling: of training rollouts.
        eval_sampling: of evaluation rollouts; ``None``: the same.
        seed: of sampling: together with a rollout's group and attempt it decides every token.
        rollout_timeout_s: a rollout that takes longer has failed.
        retries: further tries for a rollout that failed for reasons outside of it.
        max_failed_frac: above this fraction of failed rollouts a step is given up, and with it the run.
        heartbeat_s: a line of progress is logged this often while rollouts are being collected.
        endpoint_port: of the local OpenAI endpoint; 0 picks a free one.
        endpoint_api_key: its bearer token; ``None`` makes a random one. A Gym that was started before needs both known.
        log_rollouts: write ``rollouts.jsonl`` into the run directory.
        run_dir: where logs go; ``None``: the Trainer's ``log_dir``, or its ``default_root_dir``.

    Raises:
        ConfigError: in ``setup`` and ``on_fit_start``, before a rollout is paid for.
        StalePolicyError: a token to be trained on was sampled by other weights than the current ones.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        gym: Gym,
        policy: str = "model",
        model_path: str | Path | None = None,
        sampling: SamplingProfile | None = None,
        eval_sampling: SamplingProfile | None = None,
        seed: int = 0,
        rollout_timeout_s: float = 600.0,
        retries: int = 2,
        max_failed_frac: float = 0.25,
        heartbeat_s: float = 10.0,
        endpoint_port: int = 0,
        endpoint_api_key: str | None = None,
        log_rollouts: bool = True,
        run_dir: str | Path | None = None,
    ) -> None:
        train = sampling or SamplingProfile()
        if train.top_p != 1.0 or train.top_k != -1:
            raise ConfigError(
                f"sampling has top_p={train.top_p}, top_k={train.top_k}: tokens would come from a truncated "
                "distribution that the trainer does not compute; train with top_p=1 and top_k=-1"
            )
        settings = CollectSettings(
            seed=seed,
            rollout_timeout_s=rollout_timeout_s,
            retries=retries,
            max_failed_frac=max_failed_frac,
            heartbeat_s=heartbeat_s,
            endpoint_port=endpoint_port,
            endpoint_api_key=endpoint_api_key,
        )
        self.colocation = Colocation(engine, gym, {"train": train, "eval": eval_sampling or train}, settings)
        self.history: list[dict[str, float]] = []
        """One entry a finished optimizer step: everything that was logged for it."""
        self.finished_position = 0
        """Tasks dealt up to the last finished optimizer step."""
        self._policy = policy
        self._model_path = None if model_path is None else Path(model_path)
        self._log_rollouts = log_rollouts
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._stream: RolloutStream | None = None
        self._step_metrics: dict[str, float] = {}
        self._clock = metrics.PhaseClock()

    def attach(self, stream: RolloutStream) -> None:
        """Called by `GymDataModule.setup`: whose tasks are played."""
        self._stream = stream

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._stream is None:
            raise ConfigError(
                "no GymDataModule is attached; pass one: trainer.fit(module, datamodule=GymDataModule(...))"
            )
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _MultiProcessingLauncher):
            raise ConfigError(
                "the strategy forks or spawns its workers from this process (ddp_spawn, ddp_fork, ddp_notebook), which "
                "cannot carry an engine and get no clean-up; use strategy='ddp', torchrun or `fabric run`"
            )
        self._find_policy(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._stream is not None
        model = self._find_policy(pl_module)
        use_packed_attention(model)
        check_packing(model)
        run_dir = Path(self._run_dir or trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            run_dir = run_dir / f"rank_{trainer.global_rank}"
        model_path = self._model_path or Path(model.config.name_or_path)  # type: ignore[union-attr]
        if self._log_rollouts:
            self._stream.log = RolloutLog(run_dir / "rollouts.jsonl", model_path, resume=trainer.ckpt_path is not None)
        self.colocation.start(
            model, model_path, self._stream.tasks, run_dir=run_dir, run_id=uuid.uuid4().hex[:8], ranks=_ranks(trainer)
        )

    def next_window(self, trainer: L.Trainer, stream: RolloutStream) -> list[TrajectoryBatch]:
        """Called by the loader: the micro-batches of the next optimizer step."""
        _check_not_prefetched(trainer)
        self.finished_position = stream.cursor.position
        batches = stream.window(
            self.colocation, version=trainer.global_step, num_micro_batches=trainer.accumulate_grad_batches
        )
        self._step_metrics = dict(stream.metrics)
        for report in self.colocation.take_reports():
            self._step_metrics |= {
                "sync/copy_s": report.copy_seconds,
                "sync/bytes": float(report.num_bytes),
                "sync/canary_diff": report.canary_diff,
            }
        self._clock = metrics.PhaseClock()
        return batches

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, TrajectoryBatch):
            raise ConfigError(
                f"expected a TrajectoryBatch from GymDataModule's loader, got {type(batch).__name__}; is it wrapped?"
            )
        _check_on_policy(batch, trainer.global_step)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # Lightning's loggers see a window's last batch only
            values = dict(self._step_metrics)
            pl_module.log_dict({metrics.REWARD: values.pop(metrics.REWARD)}, prog_bar=True, batch_size=1)
            pl_module.log_dict(values, batch_size=1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert self._stream is not None
        self.finished_position = self._stream.cursor.position
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.history.append({"step": float(trainer.global_step)} | logged | self._clock.lap("train"))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self.colocation.close()
        if self._stream is not None and self._stream.log is not None:
            self._stream.log.close()

    def _find_policy(self, pl_module: L.LightningModule) -> nn.Module:
        found: Any = pl_module
        for name in self._policy.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.Module) or not hasattr(found, "config"):
            raise ConfigError(
                f"{type(pl_module).__name__}.{self._policy} is {type(found).__name__}; expected the "
                "transformers causal language model being trained. Name its attribute: GymCallback(policy=...)"
            )
        return found


def _check_not_prefetched(trainer: L.Trainer) -> None:
    # Lightning 2.6.6, loops/fetchers.py: a fetcher that found no length fetches one batch ahead.
    fetcher = trainer.fit_loop._data_fetcher  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    if fetcher is not None and fetcher.length is None:
        raise ConfigError(
            "the train loader has no length, so Lightning would fetch one step ahead and train on stale rollouts; "
            "give trainer.fit the GymDataModule itself, without wrapping its loader"
        )


def _ranks(trainer: L.Trainer) -> Ranks:
    sampler: dict[str, int] = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return Ranks(sampler["rank"], sampler["num_replicas"])


def _check_on_policy(batch: TrajectoryBatch, step: int) -> None:
    versions = batch.weight_versions[batch.loss_mask & (batch.weight_versions >= 0)]
    if versions.numel() and not bool((versions == step).all()):
        raise StalePolicyError(
            f"a batch of optimizer step {step} holds tokens sampled by weights of step "
            f"{int(versions.min())} to {int(versions.max())}; something fetched it ahead of time"
        )
