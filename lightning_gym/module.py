"""PolicyModule: a reference LightningModule, short enough to copy.

Your own module works as well: hold the causal language model in an attribute, and in ``training_step`` call
`token_logprobs` and a loss on the batch.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import ConfigError
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import Loss, loss_named, mismatch_metrics
from lightning_gym.metrics import WindowMetrics


class PolicyModule(L.LightningModule):
    """A causal language model trained by policy gradient.

    Args:
        model: directory or hub name to load, or a model.
        loss: a name in `lightning_gym.losses.LOSSES`, or a function ``(logprobs, batch) -> (loss, metrics)``.
        lr: peak learning rate of AdamW.
        warmup_steps: optimizer steps over which the rate rises linearly from ``lr / warmup_steps``.
        betas: of AdamW.
        weight_decay: of AdamW.
        dtype: of the loaded weights, ``"float32"`` or ``"bfloat16"``.

    Raises:
        ConfigError: there is no such loss, or no such model directory.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        loss: str | Loss = "grpo",
        lr: float = 1e-6,
        warmup_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.model = (model if isinstance(model, PreTrainedModel) else _load(model, dtype)).train()
        self.loss = loss_named(loss) if isinstance(loss, str) else loss
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.betas = betas
        self.weight_decay = weight_decay
        self._window = WindowMetrics()

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:
        logprobs = token_logprobs(self.model, batch)
        loss, values = self.loss(logprobs, batch)
        mismatch = {name: value.item() for name, value in mismatch_metrics(logprobs.detach(), batch).items()}
        count = mismatch.pop("num_trained")
        self._window.add({name: value.item() for name, value in values.items()} | mismatch, count=count)
        self._window.add({"loss": loss.item()}, count=1)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            taken = {f"train/{name}": value for name, value in self._window.take().items()}
            self.log_dict(taken, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        # Leaves parameters that do not train out: their gradients are None for good.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        if not self.warmup_steps:
            return optimizer
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def _load(model: str | Path, dtype: str) -> PreTrainedModel:
    if isinstance(model, Path) and not (model / "config.json").is_file():
        raise ConfigError(f"{model} has no config.json; expected the directory of a transformers model")
    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
