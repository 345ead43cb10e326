"""The sections of `benchmarks.gpu`: each measures one thing, in a process of its own, and gives rows of the table."""

from collections.abc import Callable

from benchmarks._gpu import Row, Scale
from benchmarks._gpu_engine import gap, sync, throughput
from benchmarks._gpu_training import kernels, learning, mfu, step

SECTIONS: dict[str, Callable[[Scale], list[Row]]] = {
    section.__name__: section for section in (kernels, sync, gap, learning, throughput, step, mfu)
}
"""Most telling first."""
