"""The policy's weights under the names of its checkpoint, whatever wraps the module, LoRA adapters merged."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

_WRAPPERS = {"_orig_mod", "_forward_module", "_checkpoint_wrapped_module"}
"""Attributes under which torch.compile, Fabric and activation checkpointing keep the module they wrap."""
_LEADING_WRAPPERS = ("module.", "base_model.model.")
"""DDP's and PEFT's, which stand in front only; a model may have parts called ``module`` of its own."""
_ADAPTER_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


@dataclass(slots=True)
class Weight:
    """One tensor of the policy's checkpoint."""

    name: str
    """As Hugging Face calls it."""
    parameter: nn.Parameter
    """What the trainer holds under that name; of an adapted layer, the layer's frozen base."""
    adapter: Any = None
    """The LoRA layer whose delta is added; ``None`` for nearly every tensor."""

    def tensor(self) -> Tensor:
        """The value that the engine is to compute with: the parameter itself, or a new tensor with the delta added."""
        weight = self.parameter.detach()
        if self.adapter is None or self.adapter.merged:
            return weight
        for name in self.adapter.active_adapters:
            weight = weight + self.adapter.get_delta_weight(name).detach()
        return weight


def weights(model: nn.Module) -> Iterator[Weight]:
    """Every weight once; tied ones under their first name, as ``named_parameters`` has them.

    A LoRA layer is recognised by PEFT's layout: the adapted layer in ``base_layer``, the adapters beside it in
    ``lora_A``, ``lora_B``, and on the layer itself ``active_adapters``, ``merged`` and ``get_delta_weight(adapter)``.
    """
    for raw, parameter in model.named_parameters():
        place = _place(raw)
        if place is not None:
            name, adapted = place
            yield Weight(name, parameter, None if adapted is None else model.get_submodule(adapted))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Like `weights`, as (name, value)."""
    for weight in weights(model):
        yield weight.name, weight.tensor()


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model holds: like `named_weights`, but tied weights under every name, and buffers."""
    adapted = {weight.name: weight for weight in weights(model) if weight.adapter is not None}
    for name, tensor in _placed(model.state_dict().items()):
        yield name, adapted[name].tensor() if name in adapted else tensor


def _placed(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for raw, tensor in named:
        place = _place(raw)
        if place is not None:
            yield place[0], tensor


@cache
def _place(raw: str) -> tuple[str, str | None] | None:
    """The checkpoint's name of a module's tensor, and the path of the LoRA layer around it; ``None`` for adapters.

    Example:
        >>> _place("module._orig_mod.model.norm.weight")
        ('model.norm.weight', None)
        >>> _place("base_model.model.lm_head.base_layer.weight")
        ('lm_head.weight', 'base_model.model.lm_head')
        >>> _place("base_model.model.lm_head.lora_A.default.weight") is None
        True
    """
    parts = raw.split(".")
    if _ADAPTER_PARTS.intersection(parts):
        return None
    adapted = ".".join(parts[:-2]) if parts[-2:] == ["base_layer", "weight"] else None
    name = ".".join(part for part in parts if part not in _WRAPPERS and part != "base_layer")
    while name.startswith(_LEADING_WRAPPERS):
        for wrapper in _LEADING_WRAPPERS:
            name = name.removeprefix(wrapper)
    return name, adapted
