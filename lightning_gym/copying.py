"""Copying weights into the engine: whole ones by a plan made once, those of a sharded policy as they are gathered."""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gym.errors import WeightSyncError
from lightning_gym.ladder import SyncMode, synchronize
from lightning_gym.sharding import buckets, gather_into, whole
from lightning_gym.weights import Weight

_ONE_THREAD_BYTES = 1 << 20
"""What one core copies in the time in which it would wake others: tens of microseconds."""
_SHARE_BYTES = 4 << 20
"""What a thread of its own pays for: waking one takes longer than a core takes to copy less."""
_MAX_THREADS = 4
"""That copy small tensors, each its share of them: more find no more bandwidth in the time that it takes."""


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


_Pairs = tuple[list[Tensor], list[Tensor]]
"""The engine's tensors, and those that go there."""


@torch.no_grad()  # which is a thread's own
def _copy_all(pairs: _Pairs) -> None:
    """One call for all tensors; torch.optim's own foreach steps rest on it. torch 2.13, ``_foreach_copy_``."""
    if pairs[0]:
        torch._foreach_copy_(*pairs)  # pyright: ignore[reportPrivateUsage]


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
        self._threads = ThreadPoolExecutor(
            _MAX_THREADS, "lightning-gym-copy", initializer=torch.set_num_threads, initargs=(1,)
        )

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
        synchronize()
        for plan in self._due:
            plan.write(self._threads)
        synchronize()
        return sum(plan.num_bytes for plan in self._due), sum(plan.num_tensors for plan in self._due)

    def forget(self) -> None:
        self._frozen = _Frozen()

    def abstain(self) -> None:
        """Nothing is gathered: every rank holds all of it."""

    def close(self, weights: Sequence[Weight]) -> None:
        self._threads.shutdown()


class _Plan:
    """Which tensor goes where, worked out once.

    Args:
        weights: to be written.
        views: of the engine.
    """

    def __init__(self, weights: Sequence[Weight], views: Mapping[str, Tensor]) -> None:
        pairs = [(views[weight.name], weight.parameter) for weight in weights if weight.adapter is None]
        small = [pair for pair in pairs if pair[0].nbytes <= _ONE_THREAD_BYTES and pair[0].device.type == "cpu"]
        large = [pair for pair in pairs if pair[0].nbytes > _ONE_THREAD_BYTES or pair[0].device.type != "cpu"]
        self._small = _shares(small)
        self._large: _Pairs = ([view for view, _ in large], [source for _, source in large])
        self._adapted = [(views[weight.name], weight) for weight in weights if weight.adapter is not None]
        self.num_tensors = len(weights)
        self.num_bytes = sum(views[weight.name].nbytes for weight in weights)

    def write(self, threads: ThreadPoolExecutor) -> None:
        with _one_thread():
            others = [threads.submit(_copy_all, share) for share in self._small[1:]]
            _copy_all(self._small[0])
            for other in others:
                other.result()
        _copy_all(self._large)
        for view, weight in self._adapted:  # one at a time: a merged weight is a new tensor
            view.copy_(weight.tensor())


def _shares(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Pairs]:
    """Dealt to as many threads as torch uses, of about equal bytes; fewer where there is little to copy."""
    num_bytes = sum(view.nbytes for view, _ in pairs)
    num_shares = max(1, min(torch.get_num_threads(), _MAX_THREADS, num_bytes // _SHARE_BYTES))
    shares: list[_Pairs] = [([], []) for _ in range(num_shares)]
    filled = [0] * num_shares
    for view, source in sorted(pairs, key=lambda pair: -pair[0].nbytes):
        index = filled.index(min(filled))
        shares[index][0].append(view)
        shares[index][1].append(source)
        filled[index] += view.nbytes
    return shares


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
        synchronize()
        for bucket in self._buckets:
            self._gather(bucket, self._views)
        synchronize()
        return sum(self._views[weight.name].nbytes for weight in self._due), len(self._due)

    def forget(self) -> None:
        self._frozen = _Frozen()

    @torch.no_grad()
    def abstain(self) -> None:
        for bucket in self._buckets:
            self._gather(bucket, {weight.name: torch.empty_like(self._views[weight.name]) for weight in bucket})

    def close(self, weights: Sequence[Weight]) -> None:
        """Nothing of it stays."""

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
