"""Ranks: who else trains on this data, sums over them, and agreement on failure.

A failure on one rank must raise on all of them at the same place: a rank that goes on alone waits in a collective for
the rest of the process group's timeout. Everything here runs on a gloo group of its own with a long timeout, because
rollouts of different ranks end minutes apart.
"""

import contextlib
import datetime as dt
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError, RankLostError

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

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """The ranks of ``torch.distributed``'s default process group, which Fabric and Accelerate make as well.

        Raises:
            ConfigError: a launcher started several processes, but they have not joined a group.
        """
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        _, size = launched()
        if size > 1:
            raise ConfigError(
                f"a launcher started {size} processes, but there is no process group: each would train alone. Call "
                "torch.distributed.init_process_group() first (Fabric: fabric.launch(); Accelerate: Accelerator())"
            )
        return cls()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(values), dtype=torch.float64)
        with _naming_who_is_gone():
            dist.all_reduce(total, group=self._control_group())
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; the values are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _naming_who_is_gone():
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


@contextlib.contextmanager
def _naming_who_is_gone() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, of a connection
        raise RankLostError(
            "another rank has gone, or did not come within six hours: it was killed (by the kernel for memory?), or "
            "ended by an error that its own output tells"
        ) from error


def launched() -> tuple[int, int]:
    """This process's rank and their number, as torchrun (``fabric run``, ``accelerate launch``) or srun says.

    Example: a process that no launcher started.

        >>> launched()
        (0, 1)
    """
    environ = os.environ
    if "WORLD_SIZE" in environ and "RANK" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"])
    # A shell inside an allocation has the variables too; Lightning tells it by these job names.
    if "SLURM_PROCID" in environ and environ.get("SLURM_JOB_NAME") not in {"bash", "interactive"}:
        return int(environ["SLURM_PROCID"]), int(environ.get("SLURM_NTASKS", "1"))
    return 0, 1


def rank_dir(run_dir: Path, rank: int) -> Path:
    """Where a rank writes what each rank writes: rank 0 into the run's directory, others into folders inside.

    Example:
        >>> rank_dir(Path("run"), 0).as_posix(), rank_dir(Path("run"), 3).as_posix()
        ('run', 'run/rank_3')
    """
    return run_dir / f"rank_{rank}" if rank else run_dir
