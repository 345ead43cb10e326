"""The policy's weights under the names of its checkpoint, whatever wraps the module, LoRA adapters merged."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Size, Tensor, nn

from lightning_gym.policy.engine import LoRA
from lightning_gym.sharding import buckets, is_sharded, reshard, whole, whole_shapes

_WRAPPERS = {"_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Attributes under which torch.compile, Fabric, activation checkpointing and FSDP1 keep the module they wrap."""
_LEADING_WRAPPERS = ("module.", "base_model.model.")
"""DDP's and PEFT's, which stand in front only; a model may have parts called ``module`` of its own."""
_ADAPTER_PARTS = {
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "original_module",
}


@dataclass(slots=True)
class Weight:
    """One tensor of the policy's checkpoint."""

    name: str
    """As Hugging Face calls it."""
    parameter: nn.Parameter
    """What the trainer holds under that name, or this rank's part of it; of an adapted layer, its frozen base."""
    shape: Size
    """Of the whole tensor."""
    adapter: Any = None
    """The LoRA layer whose delta is added; ``None`` for nearly every tensor."""

    def parameters(self) -> list[nn.Parameter]:
        """All that the value is made from."""
        return [self.parameter] if self.adapter is None else list(self.adapter.parameters())

    def tensor(self) -> Tensor:
        """The value that the engine is to compute with: the parameter itself, or a new tensor with the delta added.

        Of a sharded policy: a DTensor under FSDP2, and otherwise whole only inside `whole_weights`.
        """
        weight = self.parameter.detach()
        if self.adapter is None or self.adapter.merged:
            return weight
        for name in self.adapter.active_adapters:
            weight = weight + self.adapter.get_delta_weight(name).detach()
        return weight.to(self.parameter.dtype)  # PEFT keeps adapters of half-precision models in float32


def without_adapters(weights: Iterable[Weight]) -> list[Weight]:
    """The same weights, of adapted layers the base alone."""
    return [replace(weight, adapter=None) for weight in weights]


def lora(weight: Weight) -> LoRA:
    """The adapter of a weight, as an engine takes it; only where `lora_refusal` has nothing to say."""
    (active,) = weight.adapter.active_adapters
    a, b = (getattr(weight.adapter, side)[active].weight.detach() for side in ("lora_A", "lora_B"))
    return LoRA(a=a, b=b, scaling=float(weight.adapter.scaling[active]))


def lora_refusal(weight: Weight) -> str | None:
    """Why an adapter is more than two matrices beside a linear layer's weight; ``None`` if it is not."""
    layer = weight.adapter
    if not isinstance(layer.base_layer, nn.Linear):
        return f"is adapted as the weight of a {type(layer.base_layer).__name__}"
    if len(layer.active_adapters) != 1:
        return f"has {len(layer.active_adapters)} active adapters"
    if any(part.bias is not None for part in layer.lora_B.values()):
        return "has an adapter with a bias"
    return None


def weights(model: nn.Module) -> Iterator[Weight]:
    """Every weight once; tied ones under their first name, as ``named_parameters`` has them.

    A LoRA layer is recognised by PEFT's layout: the adapted layer in ``base_layer``, the adapters beside it in
    ``lora_A``, ``lora_B``, and on the layer itself ``active_adapters``, ``merged`` and ``get_delta_weight(adapter)``.
    """
    yield from _weights(model, remove_duplicate=True)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Like `weights`, as (name, value); of a sharded policy the whole values, collective."""
    for weight, tensor in whole_weights(model, weights(model)):
        yield weight.name, tensor


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model holds: like `named_weights`, but tied weights under every name, and buffers."""
    for weight, tensor in whole_weights(model, _weights(model, remove_duplicate=False)):
        yield weight.name, tensor
    for raw, buffer in _persistent_buffers(model):
        place = _place(raw)
        if place is not None:
            yield place[0], whole(buffer)


def whole_weights(model: nn.Module, held: Iterable[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """Each weight with its whole value; collective for a sharded policy."""
    passes = is_sharded(model)  # FSDP1 and ZeRO-3 take back what they lend
    for bucket in buckets(model, held, Weight.parameters):
        for weight in bucket:
            value = weight.tensor()
            yield weight, value.clone() if passes and not hasattr(value, "full_tensor") else whole(value)


class Inventory:
    """The weights of one model, walked again only after something in it was replaced.

    A walk costs microseconds a tensor, which is what a sync of a small model takes.

    Args:
        model: the policy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._is_sharded = is_sharded(model)
        self._walk()

    def look(self) -> list[Weight]:
        """Like `weights`; the same list as long as modules, parameters, shapes and dtypes are the same."""
        if self._is_sharded:
            reshard(self._model)
        entries = list(chain.from_iterable(map(dict.values, self._tables)))
        unchanged = len(entries) == len(self._entries) and all(map(is_, entries, self._entries))
        if not unchanged or list(map(_form, self._parameters)) != self._forms:
            self._walk()
        return self._weights

    def _walk(self) -> None:
        self._weights = list(weights(self._model))
        self._parameters = [weight.parameter for weight in self._weights]
        self._forms = list(map(_form, self._parameters))
        self._tables: list[dict[str, Any]] = []
        for module in self._model.modules():
            self._tables += [module._parameters, module._modules]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        self._entries = list(chain.from_iterable(map(dict.values, self._tables)))


_form = attrgetter("shape", "dtype")


def _weights(model: nn.Module, *, remove_duplicate: bool) -> Iterator[Weight]:
    reshard(model)
    shape_of = whole_shapes(model)
    for raw, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        place = _place(raw)
        if place is not None:
            name, adapted = place
            adapter = None if adapted is None else model.get_submodule(adapted)
            yield Weight(name, parameter, shape_of(parameter), adapter)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those of a state dict."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                yield f"{prefix}.{name}" if prefix else name, buffer


@cache
def _place(raw: str) -> tuple[str, str | None] | None:
    """The checkpoint's name of a module's tensor, and the path of the LoRA layer around it; ``None`` for adapters.

    Of a part that PEFT trains whole, in ``modules_to_save``, its tensor takes the place of the ``original_module``'s.

    Example:
        >>> _place("module._orig_mod.model.norm.weight")
        ('model.norm.weight', None)
        >>> _place("base_model.model.lm_head.base_layer.weight")
        ('lm_head.weight', 'base_model.model.lm_head')
        >>> _place("base_model.model.lm_head.lora_A.default.weight") is None
        True
        >>> _place("base_model.model.lm_head.modules_to_save.default.weight")
        ('lm_head.weight', None)
    """
    parts = raw.split(".")
    if _ADAPTER_PARTS.intersection(parts):
        return None
    if "modules_to_save" in parts:  # followed by the adapter's name
        start = parts.index("modules_to_save")
        del parts[start : start + 2]
    adapted = ".".join(parts[:-2]) if parts[-2:] == ["base_layer", "weight"] else None
    name = ".".join(part for part in parts if part not in _WRAPPERS and part != "base_layer")
    while name.startswith(_LEADING_WRAPPERS):
        for wrapper in _LEADING_WRAPPERS:
            name = name.removeprefix(wrapper)
    return name, adapted
