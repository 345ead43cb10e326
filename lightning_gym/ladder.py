"""The ways in which an engine gets the trainer's weights, fastest first: share, copy, reload.

``share``
    The trainer's parameters are made views of the engine's tensors. Nothing moves any more, and the weights are in
    memory once; an optimizer step changes the engine's weights as it changes the trainer's.
``copy``
    Every tensor is written into the engine's own with one fused call, cast on the way where the engine computes in
    another dtype. Frozen tensors are written once. Of a sharded policy, ranks gather them there, a bucket at a time.
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
from lightning_gym.weights import Weight, checkpoint_weights

SyncMode = Literal["auto", "share", "copy", "reload"]


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
