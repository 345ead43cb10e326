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

import contextlib
import ctypes
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_gym.errors import WeightSyncError
from lightning_gym.policy.engine import Engine
from lightning_gym.sharding import buckets, gather_into, whole
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

    def abstain(self) -> None:
        """After a failure on this rank: take part in what the other ranks still gather, and write nothing."""
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
        _synchronize()
        if self._adopted:
            return 0, 0
        for weight in self._weights:
            view = self._views[weight.name]
            view.copy_(weight.parameter)
            weight.parameter.data = view
        self._adopted = True
        _give_freed_memory_back()
        return sum(view.nbytes for view in self._views.values()), len(self._views)

    def abstain(self) -> None:
        """Nothing is gathered: what is shared is whole."""

    def strays(self, weights: Sequence[Weight]) -> list[str]:
        """Names of parameters that were made views of the engine's tensors and are so no more."""
        if not self._adopted:
            return []
        return [w.name for w in weights if w.parameter.data_ptr() != self._views[w.name].data_ptr()]

    def release(self, weights: Sequence[Weight]) -> None:
        """Give the parameters storages of their own again."""
        if self._adopted:
            for weight in weights:
                weight.parameter.data = weight.parameter.data.clone()
            self._adopted = False


_ONE_THREAD_BYTES = 1 << 20
"""What one core copies in the time in which it would wake others: tens of microseconds."""


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One call for all tensors; torch.optim's own foreach steps rest on it. torch 2.13, ``_foreach_copy_``."""
    if pairs:
        torch._foreach_copy_([view for view, _ in pairs], [source for _, source in pairs])  # pyright: ignore[reportPrivateUsage]


def _give_freed_memory_back() -> None:
    """Let go of what the parameters' own storages occupied: glibc keeps freed blocks of up to 32 MB for itself."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Copy:
    """Writes the trainer's tensors into the engine's.

    Args:
        views: of the engine.
    """

    name: SyncMode = "copy"

    def __init__(self, views: Mapping[str, Tensor]) -> None:
        self._views = views
        self._frozen = _Frozen()
        self._planned: tuple[Sequence[Weight], list[bool]] = ((), [])
        """Weights and which of them train, that the plan was made for."""
        self._plan = _Plan((), views)
        self._at_rest: list[Weight] = []
        self._due: list[_Plan] = []

    def begin(self, weights: Sequence[Weight]) -> None:
        trains = [weight.parameter.requires_grad for weight in weights]
        if weights is not self._planned[0] or trains != self._planned[1]:
            self._planned = (weights, trains)
            self._plan = _Plan([weight for weight in weights if _Frozen.moves(weight)], self._views)
            self._at_rest = [weight for weight in weights if not _Frozen.moves(weight)]
        self._due = [self._plan]
        if due := self._frozen.due(self._at_rest):
            self._due.append(_Plan(due, self._views))

    @torch.no_grad()
    def write(self) -> tuple[int, int]:
        _synchronize()
        for plan in self._due:
            plan.write()
        _synchronize()
        return sum(plan.num_bytes for plan in self._due), sum(plan.num_tensors for plan in self._due)

    def abstain(self) -> None:
        """Nothing is gathered: every rank holds all of it."""


class _Plan:
    """Which tensor goes where, worked out once.

    Args:
        weights: to be written.
        views: of the engine.
    """

    def __init__(self, weights: Sequence[Weight], views: Mapping[str, Tensor]) -> None:
        pairs = [(views[weight.name], weight.parameter) for weight in weights if weight.adapter is None]
        small = [view.nbytes <= _ONE_THREAD_BYTES and view.device.type == "cpu" for view, _ in pairs]
        self._small = [pair for pair, is_small in zip(pairs, small, strict=True) if is_small]
        self._large = [pair for pair, is_small in zip(pairs, small, strict=True) if not is_small]
        self._adapted = [(views[weight.name], weight) for weight in weights if weight.adapter is not None]
        self.num_tensors = len(weights)
        self.num_bytes = sum(views[weight.name].nbytes for weight in weights)

    def write(self) -> None:
        with _one_thread():
            _copy_all(self._small)
        _copy_all(self._large)
        for view, weight in self._adapted:  # one at a time: a merged weight is a new tensor
            view.copy_(weight.tensor())


class GatheredCopy:
    """Writes a sharded policy's tensors into the engine's; collective.

    Args:
        model: the policy.
        views: of the engine.
    """

    name: SyncMode = "copy"

    def __init__(self, model: nn.Module, views: Mapping[str, Tensor]) -> None:
        self._model = model
        self._views = views
        self._frozen = _Frozen()
        self._due: Sequence[Weight] = ()
        self._buckets: Iterator[list[Weight]] = iter(())

    def begin(self, weights: Sequence[Weight]) -> None:
        self._due = self._frozen.due(weights)
        self._buckets = buckets(self._model, self._due, Weight.parameters)

    @torch.no_grad()
    def write(self) -> tuple[int, int]:
        _synchronize()
        for bucket in self._buckets:
            self._gather(bucket, self._views)
        _synchronize()
        return sum(self._views[weight.name].nbytes for weight in self._due), len(self._due)

    @torch.no_grad()
    def abstain(self) -> None:
        for bucket in self._buckets:
            self._gather(bucket, {weight.name: torch.empty_like(self._views[weight.name]) for weight in bucket})

    def _gather(self, bucket: Sequence[Weight], targets: Mapping[str, Tensor]) -> None:
        on_their_way: list[Any] = []
        for weight in bucket:
            target = targets[weight.name]
            work = None if weight.adapter is not None else gather_into(target, weight.parameter)
            if work is not None:
                on_their_way.append(work)
                continue
            value = whole(weight.tensor())
            if value.shape != target.shape:
                raise WeightSyncError(
                    f"{weight.name} has shape {tuple(value.shape)} when gathered, {tuple(target.shape)} in the engine"
                )
            target.copy_(value)
        for work in on_their_way:
            work.wait()


class _Frozen:
    """Which frozen parameters the engine has already."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[int, int]] = {}
        """Address and version counter at which a frozen parameter was last written."""

    @staticmethod
    def moves(weight: Weight) -> bool:
        """Whether training moves it; of an adapted layer the base rests, and the sum moves."""
        return weight.parameter.requires_grad or weight.adapter is not None

    def due(self, weights: Sequence[Weight]) -> list[Weight]:
        """Weights that have to be written; one at rest is once, and again after a change in place."""
        return [weight for weight in weights if self.moves(weight) or self._is_due(weight)]

    def _is_due(self, weight: Weight) -> bool:
        state = (weight.parameter.data_ptr(), weight.parameter._version)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if self._written.get(weight.name) == state:
            return False
        self._written[weight.name] = state
        return True


def _synchronize() -> None:
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
        _synchronize()
        self._engine.load_weights(self._stream)
        _synchronize()
        num_bytes = sum(weight.shape.numel() * weight.parameter.element_size() for weight in self._weights)
        return num_bytes, len(self._weights)

    @torch.no_grad()
    def abstain(self) -> None:
        for _ in self._stream:
            pass
