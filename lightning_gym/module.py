"""PolicyModule: a reference LightningModule, short enough to copy.

Your own module works as well: hold the causal language model in an attribute, and in ``training_step`` call
`token_logprobs` and a loss on the batch.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.corrections import (
    Correction,
    check_composition,
    correction_named,
    token_tis,
    with_correction_scale,
)
from lightning_gym.errors import ConfigError, NotFiniteError
from lightning_gym.liger import use_liger
from lightning_gym.lm_head import use_float32_head
from lightning_gym.logprobs import check_packing, token_logprobs, token_logprobs_and_entropies
from lightning_gym.losses import Loss, distillation, loss_named
from lightning_gym.mismatch import entropy_estimate, mismatch_metrics, ratio_histogram
from lightning_gym.model_files import check_model
from lightning_gym.penalties import entropy_bonus, kl_in_reward, kl_penalty
from lightning_gym.ranks import Ranks
from lightning_gym.reference import frozen, has_adapter, with_old_logprobs, with_ref_logprobs
from lightning_gym.sharding import shard
from lightning_gym.window_metrics import WindowMetrics


class PolicyModule(L.LightningModule):
    """A causal language model trained by policy gradient.

    Args:
        model: directory or hub name to load, or a model; a PEFT model trains its adapter.
        peft_config: a `peft.PeftConfig`, such as ``LoraConfig(r=16, target_modules="all-linear")``: the model gets that
            adapter, which alone trains.
        loss: a name in `lightning_gym.losses.LOSSES`, or a function ``(logprobs, batch) -> (loss, metrics)``, such as
            ``functools.partial(dapo, clip_high=0.3)``.
        correction: for the mismatch of engine and trainer, a name in `lightning_gym.corrections.CORRECTIONS`, or a
            function ``(logprobs, batch) -> (batch, metrics)``. ``None``: ``"token_tis"`` where rollouts are played
            ahead (``GymDataModule(max_lag=1)``), else ``"none"``.
        normalise_correction: divide the correction's weights by their mean over the window; costs another forward.
        kl_coefficient: of the KL to the reference; 0: none.
        kl_in: ``loss``: `lightning_gym.penalties.kl_penalty`; ``reward``: `lightning_gym.penalties.kl_in_reward`.
        ref_model: the reference of the KL, or the teacher of ``loss="distillation"``: directory, hub name or model.
            ``None``: the policy as it starts, which for a PEFT model is its base, and otherwise a frozen copy.
        entropy_coefficient: of `lightning_gym.penalties.entropy_bonus`; 0: none.
        lr: peak learning rate of AdamW.
        warmup_steps: optimizer steps over which the rate rises linearly from ``lr / warmup_steps``.
        lr_scheduler: from the optimizer to a scheduler that steps once an optimizer step, instead of `warmup_steps`.
        betas: of AdamW.
        weight_decay: of AdamW.
        dtype: of the loaded weights, ``"float32"`` or ``"bfloat16"``.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        head_dtype: ``"float32"`` computes the LM head in float32 whatever the model is; set
            ``VLLMEngine(head_dtype=...)`` alike, so that both sides agree. ``None``: as the model.
        liger: Liger's Triton kernels for norms and MLPs, on a GPU; see `lightning_gym.liger.use_liger`.

    Raises:
        ConfigError: there is no such loss or correction, they do not go together, or there is no such model
            directory.
        NotFiniteError: the loss of a window is not a number; its optimizer step is not taken.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        peft_config: Any = None,
        loss: str | Loss = "grpo",
        correction: str | Correction | None = None,
        normalise_correction: bool = False,
        kl_coefficient: float = 0.0,
        kl_in: Literal["loss", "reward"] = "loss",
        ref_model: str | Path | nn.Module | None = None,
        entropy_coefficient: float = 0.0,
        lr: float = 1e-6,
        warmup_steps: int = 0,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        head_dtype: Literal["float32"] | None = None,
        liger: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss_named(loss) if isinstance(loss, str) else loss
        self._correction_is_given = correction is not None
        self.correction = correction_named(correction or "none") if isinstance(correction, str | None) else correction
        check_composition(self.loss, self.correction)
        if lr_scheduler is not None and warmup_steps:
            raise ConfigError("warmup_steps and lr_scheduler both set the learning rate; give one of them")
        self.model = (model if isinstance(model, nn.Module) else _load(model, dtype)).train()
        if liger:
            use_liger(self.model)
        if head_dtype is not None:
            use_float32_head(self.model)
        if peft_config is not None:
            self.model = _adapted(self.model, peft_config)
        self.needs_reference = kl_coefficient != 0 or self.loss is distillation
        if ref_model is not None and not self.needs_reference:
            raise ConfigError(
                "ref_model is given, but kl_coefficient is 0 and the loss is no distillation: nothing uses it"
            )
        self.reference: nn.Module | None = self._make_reference(ref_model, dtype)
        self.normalise_correction = normalise_correction
        self.kl_coefficient = kl_coefficient
        self.kl_in = kl_in
        self.entropy_coefficient = entropy_coefficient
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.lr_scheduler = lr_scheduler
        self.betas = betas
        self.weight_decay = weight_decay
        self._window = WindowMetrics()
        if gradient_checkpointing:
            checkpointed: Any = self.model
            checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def configure_model(self) -> None:
        """Cut policy and reference over the data-parallel ranks where the strategy is `ModelParallelStrategy` (FSDP2).

        Override it to cut them otherwise, with ``shard(self.model, mesh, mp_policy=...)`` or ``fully_shard`` itself;
        the outermost module that is cut must be the policy, not this one. Called for every strategy, and again by
        every ``fit``.
        """
        if self.device_mesh is not None:
            for model in (self.model, self.reference):
                if model is not None:
                    shard(model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        if self.reference is not None:
            check_packing(self.reference)

    def expect_lag(self, max_lag: int) -> None:
        """Called by `GymCallback.setup`: rollouts may be of weights so many optimizer steps old."""
        if max_lag and not self._correction_is_given:
            self.correction = token_tis

    def prepare_window(self, batches: list[TrajectoryBatch], ranks: Ranks) -> list[TrajectoryBatch]:
        """Called for every window before the first of its collection trains; collective."""
        if not self.normalise_correction:
            return batches
        if any(batch.old_logprobs is None for batch in batches):
            batches = with_old_logprobs(self.model, batches)
        return with_correction_scale(batches, self.correction, ranks)

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> dict[str, Tensor]:
        if self.needs_reference:
            batch = with_ref_logprobs(self.model, batch, reference=self.reference)
        if self.entropy_coefficient:
            logprobs, entropies = token_logprobs_and_entropies(self.model, batch)
        else:
            logprobs, entropies = token_logprobs(self.model, batch), None
        loss, values = self.objective(logprobs, entropies, batch)
        count = values.pop("num_trained")
        self._window.add(values, count=count)
        self._window.add({"loss": loss}, count=1)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._log_window()
        return {"loss": loss, "logprobs": logprobs.detach()}

    def objective(
        self, logprobs: Tensor, entropies: Tensor | None, batch: TrajectoryBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a corrected batch, and penalties on the batch as it came."""
        values = mismatch_metrics(logprobs.detach(), batch)
        values["ratio_hist"] = ratio_histogram(logprobs.detach(), batch)
        values["entropy_estimate"] = entropy_estimate(logprobs.detach(), batch)
        rewarded = batch
        if self.kl_coefficient and self.kl_in == "reward":
            rewarded, found = kl_in_reward(logprobs, batch, coefficient=self.kl_coefficient)
            values |= found
        corrected, found = self.correction(logprobs, rewarded)
        values |= found
        loss, found = self.loss(logprobs, corrected)
        values |= found
        if self.kl_coefficient and self.kl_in == "loss":
            term, found = kl_penalty(logprobs, batch, coefficient=self.kl_coefficient)
            loss, values = loss + term, values | found
        if entropies is not None:
            term, found = entropy_bonus(entropies, batch, coefficient=self.entropy_coefficient)
            loss, values = loss + term, values | found
        return loss, values

    def configure_optimizers(self) -> Any:
        # Leaves parameters that do not train out: their gradients are None for good.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        elif self.warmup_steps:
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps)
            )
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log_window(self) -> None:
        def reduce(tensor: Tensor, how: str) -> Tensor:
            return self.trainer.strategy.reduce(tensor, reduce_op=how)  # type: ignore[return-value]  a tensor stays one

        values = self._window.take(reduce)
        if not math.isfinite(values["loss"]):  # a sum is no number where a part of it, on any rank, is none
            raise NotFiniteError(
                f"the loss of optimizer step {self.trainer.global_step} is not finite ({values}); the step is not "
                "taken. Look at its rollouts (lightning-gym inspect), the learning rate, and gradient_clip_val"
            )
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    def _make_reference(self, given: str | Path | nn.Module | None, dtype: str) -> nn.Module | None:
        if not self.needs_reference or (given is None and has_adapter(self.model)):
            return None
        if isinstance(given, str | Path):
            given = _load(given, dtype)
        return frozen(copy.deepcopy(self.model) if given is None else given)


def _adapted(model: nn.Module, peft_config: Any) -> nn.Module:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConfigError('an adapter needs peft: pip install "lightning-gym[lora]"') from error
    adapted: Any = model
    return get_peft_model(adapted, peft_config)


def _load(model: str | Path, dtype: str) -> nn.Module:
    check_model(model, tokenizer=False)  # which may lie elsewhere: GymCallback(model_path=...)
    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
