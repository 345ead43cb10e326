"""Ranks: who else trains on this data, sums over them, and agreement on failure.

A failure on one rank must raise on all of them at the same place: a rank that goes on alone waits in a collective for
the rest of the process group's timeout. Everything here runs on a gloo group of its own with a long timeout, because
rollouts of different ranks end minutes apart.
"""

import contextlib
import datetime as dt
from collections.abc import Generator, Sequence
from typing import Any

_TIMEOUT = dt.timedelta(hours=6)


class Ranks:
    """The data-parallel ranks.

    Args:
        rank: this process among those that train on different data.
        size: how many there are.

    Every method is collective: all ranks call it, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._group: Any = None

    def sums(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self._control_group())
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; the values are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control_group())
        return values

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank has an error; its own where it has one.

        Raises:
            RuntimeError: another rank failed; carries that rank's message.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")

    @contextlib.contextmanager
    def agreeing(self) -> Generator[None]:
        """Run a block that may fail on one rank alone: it then raises on all of them at the block's end.

        Interrupts (Ctrl-C, SIGTERM's exception) are not waited with: they end this rank at once.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  every rank has to hear of it before one may raise
            error = caught
        self.agree(error)

    def _control_group(self) -> Any:
        if self._group is None:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return self._group
