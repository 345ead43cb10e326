"""What the Trainer costs: a Lightning step over a bare PyTorch loop, on the same packed tensors."""

import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from benchmarks.packing import one_thread, pack
from benchmarks.table import Measurement
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo
from lightning_gym.module import PolicyModule
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.testing import tiny_model, tiny_tokenizer

STEPS = 24
WARM_UP = 4
SIZES = {
    "tiny policy, 64 x 50 tokens": {"num_layers": 2, "hidden_size": 192, "lengths": [50] * 64},
    "4 layers of 256, 32 x 200 tokens": {"num_layers": 4, "hidden_size": 256, "lengths": [200] * 32},
}


def measure() -> Measurement:
    """Two sizes, with and without gradient accumulation."""
    with one_thread():
        rows = [_row(name, num_micro_batches, **size) for name, size in SIZES.items() for num_micro_batches in (1, 4)]
    return Measurement(
        name="trainer",
        what="Seconds of CPU time on one thread an optimizer step, from packed tensors to updated weights: "
        "`PolicyModule` under `L.Trainer` "
        "(metrics computed and logged to no logger) and a loop of token_logprobs, grpo, backward, AdamW. "
        f"{STEPS - WARM_UP} steps of each arm, one after the other in turn; medians, and the median of the ratios.",
        rows=rows,
    )


def _row(name: str, num_micro_batches: int, *, num_layers: int, hidden_size: int, lengths: list[int]) -> dict[str, Any]:
    batches = pack(lengths, num_micro_batches=num_micro_batches)
    model = tiny_model(tiny_tokenizer(), num_layers=num_layers, hidden_size=hidden_size).train()
    use_packed_attention(model)
    turns = _Turns(_Bare(copy.deepcopy(model), batches))
    _fit(model, batches, turns)
    ours, bare = turns.seconds[WARM_UP:], turns.bare_seconds[WARM_UP:]
    return {
        "model and window": name,
        "micro-batches": num_micro_batches,
        "bare CPU s": statistics.median(bare),
        "Lightning CPU s": statistics.median(ours),
        "Lightning / bare": statistics.median(mine / its for mine, its in zip(ours, bare, strict=True)),
    }


class _Bare:
    """The loop that one would write without a Trainer."""

    def __init__(self, model: nn.Module, batches: list[TrajectoryBatch]) -> None:
        self.model = model
        self.batches = batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self) -> None:
        for batch in self.batches:
            loss, _ = grpo(token_logprobs(self.model, batch), batch)
            (loss / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Steps:
    """The same window again and again, with the length that Lightning asks for."""

    def __init__(self, batches: list[TrajectoryBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return STEPS * len(self.batches)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return itertools.chain.from_iterable(itertools.repeat(self.batches, STEPS))


class _Turns(L.Callback):
    """Times the Trainer's steps, and after each of them one of the bare loop's."""

    def __init__(self, bare: _Bare) -> None:
        self.bare = bare
        self.seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.seconds):
            ended = time.process_time()
            self.bare.step()
            after = time.process_time()
            self.seconds.append(ended - self._began)
            self.bare_seconds.append(after - ended)
            self._began = after


def _fit(model: nn.Module, batches: list[TrajectoryBatch], turns: _Turns) -> None:
    trainer = L.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=len(batches),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on loaders and loggers
        trainer.fit(PolicyModule(model, lr=1e-6), train_dataloaders=_Steps(batches))
