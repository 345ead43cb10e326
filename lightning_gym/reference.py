"""Logprobs of policies that do not train: the trainer before the first update of a collection, and a reference."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import ConfigError
from lightning_gym.logprobs import token_logprobs
from lightning_gym.packed_attention import use_packed_attention


@torch.no_grad()
def with_old_logprobs(model: nn.Module, batches: Sequence[TrajectoryBatch]) -> list[TrajectoryBatch]:
    """Fill in `old_logprobs`: what the model says before it is updated.

    Args:
        model: the policy, in the precision context that it trains in.
        batches: on any device, where they stay; the model's forward runs on its own.
    """
    device = next(model.parameters()).device
    return [
        replace(batch, old_logprobs=token_logprobs(model, batch.to(device)).to(batch.input_ids.device))
        for batch in batches
    ]


@torch.no_grad()
def with_ref_logprobs(model: nn.Module, batch: TrajectoryBatch, *, reference: nn.Module | None) -> TrajectoryBatch:
    """Fill in `ref_logprobs`: what the reference says, at the temperature that was sampled at.

    Args:
        model: the policy.
        batch: on the model's device.
        reference: a `frozen` model; ``None``: the policy with its LoRA adapter off.

    Raises:
        ConfigError: there is no reference, and no adapter to switch off.
    """
    with nullcontext() if reference is not None else _adapter_off(model):
        return replace(batch, ref_logprobs=token_logprobs(reference if reference is not None else model, batch))


def frozen(model: nn.Module) -> nn.Module:
    """`model` itself, made a reference: it does not train, and computes packed rows."""
    use_packed_attention(model)
    return model.requires_grad_(False).eval()


def has_adapter(model: nn.Module) -> bool:
    """Whether the model's weights without its adapter are a reference that costs nothing (a PEFT model)."""
    return hasattr(model, "disable_adapter")


def _adapter_off(model: Any) -> AbstractContextManager[Any]:
    if not has_adapter(model):
        raise ConfigError(
            f"{type(model).__name__} has no adapter to switch off, so there is no reference to compare with; pass a "
            "frozen copy of the model"
        )
    return model.disable_adapter()
