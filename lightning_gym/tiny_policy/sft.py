"""Supervised warm start: an ordinary Lightning run over demonstrations."""

import contextlib
import logging
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_gym.tiny_policy.demonstrations import Encoded


class ImitationModule(L.LightningModule):
    """Next-token cross-entropy on what the teacher said, under a one-cycle learning rate.

    Args:
        model: a causal language model with Hugging Face's ``model`` and ``lm_head``.
        lr: peak learning rate.
        num_steps: length of the cycle.
    """

    def __init__(self, model: nn.Module, *, lr: float, num_steps: int) -> None:
        super().__init__()
        self.model: Any = model
        self.lr, self.num_steps = lr, num_steps
        self.losses: list[Tensor] = []
        """Mean loss of each step so far, in nats per trained token."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        input_ids, loss_mask = batch
        # Padding is on the right and attention is causal: no trained token can see it, so no mask is needed.
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        trained = loss_mask[:, 1:]
        loss = cross_entropy(self.model.lm_head(hidden[:, :-1][trained]), input_ids[:, 1:][trained])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DemonstrationData(L.LightningDataModule):
    """Demonstrations in the order given, `batch_size` at a time, padded on the right."""

    def __init__(self, demonstrations: Sequence[Encoded], *, batch_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.demonstrations, self.batch_size, self.pad_token_id = demonstrations, batch_size, pad_token_id

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        demonstrations: Any = self.demonstrations  # a sequence is what DataLoader takes, whatever its annotation says
        return DataLoader(demonstrations, batch_size=self.batch_size, collate_fn=self._batch)

    def _batch(self, demonstrations: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        shape = len(demonstrations), max(len(demonstration.token_ids) for demonstration in demonstrations)
        input_ids = torch.full(shape, self.pad_token_id)
        loss_mask = torch.zeros(shape, dtype=torch.bool)
        for row, demonstration in enumerate(demonstrations):
            input_ids[row, : len(demonstration.token_ids)] = torch.tensor(demonstration.token_ids)
            loss_mask[row, : len(demonstration.loss_mask)] = torch.tensor(demonstration.loss_mask)
        return input_ids, loss_mask


def fit(module: ImitationModule, data: DemonstrationData) -> float:
    """Train for one pass over `data` and return the mean loss of the last tenth of the steps, in nats."""
    with _quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=module.num_steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module.train()
        trainer.fit(module, datamodule=data)
    module.eval()
    last = module.losses[-max(1, len(module.losses) // 10) :]
    return torch.stack(last).mean().item()


@contextlib.contextmanager
def _quiet_lightning() -> Generator[None]:
    """A run of a minute inside another program should not announce devices and tips."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
