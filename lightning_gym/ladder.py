"""The ways in which an engine gets the trainer's weights: adapter, share, copy, reload.

``share``
    The trainer's parameters are made views of the engine's tensors. Nothing moves any more, and the weights are in
    memory once; an optimizer step changes the engine's weights as it changes the trainer's.
``copy``
    Every tensor is written into the engine's own with one fused call, cast on the way where the engine computes in
    another dtype. Frozen tensors are written once. Of a sharded policy, ranks gather them there, a bucket at a time.
``adapter``
    The weights under a LoRA adapter are shared or copied, once; after that the adapter's own matrices are all that
    moves, and the engine adds their product as the trainer does. For engines that keep adapters.
``reload``
    Everything goes through the engine's own loader by name, for engines that hold weights in a form of their own
    (quantised, mixture of experts, sharded).
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_gym.errors import WeightSyncError
from lightning_gym.policy.engine import Engine
from lightning_gym.weights import Weight, checkpoint_weights, lora, lora_refusal, without_adapters

SyncMode = Literal["auto", "adapter", "share", "copy", "reload"]


class Rung(Protocol):
    """One way of handing weights over."""

    name: SyncMode

    def begin(self, weights: Sequence[Weight]) -> None:
        """Say what is to be written next; moves nothing, and does not fail on one rank alone."""
        ...

    def write(self) -> tuple[int, int]:
        """Give the engine these weights; runs inside `Engine.update_weights`.

        Returns:
            Bytes and tensors that were written.
        """
        ...

    def forget(self) -> None:
        """The engine lost what it had: write all of it next time."""
        ...

    def abstain(self) -> None:
        """After a failure on this rank: take part in what the other ranks still gather, and write nothing."""
        ...

    def close(self, weights: Sequence[Weight]) -> None:
        """Leave the model with tensors of its own, and nothing behind."""
        ...


class Share:
    """Makes the trainer's parameters views of the engine's tensors.

    Args:
        views: of the engine.
    """

    name: SyncMode = "share"

    def __init__(self, views: Mapping[str, Tensor]) -> None:
        self._views = views
        self._weights: Sequence[Weight] = ()
        self._adopted = False

    @staticmethod
    def refusal(weights: Sequence[Weight], views: Mapping[str, Tensor]) -> str | None:
        """Why these parameters cannot be views of the engine's tensors; ``None`` if they can."""
        storages: set[int] = set()
        for weight in weights:
            data, view = weight.parameter.data, views[weight.name]
            if weight.adapter is not None:
                return f"{weight.name} has a LoRA adapter: the engine needs the sum, which the trainer does not hold"
            if type(data) is not torch.Tensor or type(view) is not torch.Tensor:
                return (
                    f"{weight.name} is a {type(data).__name__} in the trainer and a {type(view).__name__} in the engine"
                )
            if (data.dtype, data.device) != (view.dtype, view.device):
                return (
                    f"{weight.name} is {data.dtype} on {data.device} in the trainer and {view.dtype} on {view.device} "
                    "in the engine"
                )
            if not (data.is_contiguous() and view.is_contiguous()):
                return f"{weight.name} is not contiguous"
            storage = data.untyped_storage().data_ptr()
            if storage in storages:
                return f"{weight.name} is part of a buffer that an optimizer or a wrapper flattened the parameters into"
            storages.add(storage)
        return None

    def begin(self, weights: Sequence[Weight]) -> None:
        self._weights = weights

    @torch.no_grad()
    def write(self) -> tuple[int, int]:
        synchronize()
        if self._adopted:
            return 0, 0
        for weight in self._weights:
            view = self._views[weight.name]
            view.copy_(weight.parameter)
            weight.parameter.data = view
        self._adopted = True
        _give_freed_memory_back()
        return sum(view.nbytes for view in self._views.values()), len(self._views)

    def forget(self) -> None:
        """Not possible: what is lost is the trainer's."""
        raise WeightSyncError("the engine lost weights that it shares with the trainer")

    def abstain(self) -> None:
        """Nothing is gathered: what is shared is whole."""

    def strays(self, weights: Sequence[Weight]) -> list[str]:
        """Names of parameters that were made views of the engine's tensors and are so no more."""
        if not self._adopted:
            return []
        return [w.name for w in weights if w.parameter.data_ptr() != self._views[w.name].data_ptr()]

    def close(self, weights: Sequence[Weight]) -> None:
        if self._adopted:
            for weight in weights:
                weight.parameter.data = weight.parameter.data.clone()
            self._adopted = False


def _give_freed_memory_back() -> None:
    """Let go of what the parameters' own storages occupied: glibc keeps freed blocks of up to 32 MB for itself."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def synchronize() -> None:
    """Trainer and engine use streams of their own: what one wrote must be there before the other reads."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Adapter:
    """Hands a LoRA adapter over beside the weights that it adapts, which another rung hands over without it.

    Args:
        base: what the engine gets the weights by.
        engine: keeps adapters.
    """

    name: SyncMode = "adapter"

    def __init__(self, base: Rung, engine: Engine) -> None:
        self.base = base
        self._engine = engine
        self._weights: Sequence[Weight] = ()
        self._bare: Sequence[Weight] = ()
        self._merged: list[bool] = []

    @staticmethod
    def refusal(weights: Sequence[Weight], max_rank: int) -> str | None:
        """Why an engine that takes ranks up to `max_rank` cannot keep the adapters of these weights apart."""
        if max_rank == 0:
            return "the engine keeps no adapters (VLLMEngine(max_lora_rank=...) does)"
        for weight in weights:
            if weight.adapter is None:
                continue
            if (reason := lora_refusal(weight)) is not None:
                return f"{weight.name} {reason}"
            rank = max(layer.out_features for layer in weight.adapter.lora_A.values())
            if rank > max_rank:
                return f"{weight.name} has an adapter of rank {rank}, and the engine takes at most {max_rank}"
        return None

    def begin(self, weights: Sequence[Weight]) -> None:
        if weights is not self._weights:
            self._weights, self._bare = weights, without_adapters(weights)
        merged = [bool(weight.adapter.merged) for weight in weights if weight.adapter is not None]
        if merged != self._merged and not isinstance(self.base, Share):
            self.base.forget()  # PEFT merges into `.data`, which no version counter sees
        self._merged = merged
        self.base.begin(self._bare)

    @torch.no_grad()
    def write(self) -> tuple[int, int]:
        if (reason := self.refusal(self._weights, self._engine.max_lora_rank)) is not None:
            raise WeightSyncError(f"the policy's adapter changed after the first sync: {reason}")
        num_bytes, num_tensors = self.base.write()
        adapter = {w.name.removesuffix(".weight"): lora(w) for w in self._weights if w.adapter and not w.adapter.merged}
        self._engine.load_adapter(adapter)
        synchronize()
        tensors = [tensor for part in adapter.values() for tensor in (part.a, part.b)]
        return num_bytes + sum(tensor.nbytes for tensor in tensors), num_tensors + len(tensors)

    def forget(self) -> None:
        self.base.forget()

    def abstain(self) -> None:
        self.base.abstain()

    def close(self, weights: Sequence[Weight]) -> None:
        self.base.close(weights)


class Reload:
    """Sends everything through the engine's own loader.

    Args:
        engine: that loads.
        model: whose checkpoint it is given.
    """

    name: SyncMode = "reload"

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self._engine = engine
        self._model = model
        self._weights: Sequence[Weight] = ()
        self._stream: Iterator[tuple[str, Tensor]] = iter(())

    def begin(self, weights: Sequence[Weight]) -> None:
        self._weights = weights
        self._stream = checkpoint_weights(self._model)

    @torch.no_grad()
    def write(self) -> tuple[int, int]:
        synchronize()
        self._engine.load_weights(self._stream)
        synchronize()
        num_bytes = sum(weight.shape.numel() * weight.parameter.element_size() for weight in self._weights)
        return num_bytes, len(self._weights)

    def forget(self) -> None:
        """It never counts on what the engine has."""

    @torch.no_grad()
    def abstain(self) -> None:
        for _ in self._stream:
            pass

    def close(self, weights: Sequence[Weight]) -> None:
        """Nothing of it stays."""
