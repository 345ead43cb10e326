"""What ``import lightning_gym`` costs over a bare interpreter, interleaved."""

import statistics
import subprocess
import sys
import time

from benchmarks.table import Measurement

REPEATS = 15


def measure() -> Measurement:
    """Time whole processes, the two arms in turn."""
    arms = {"bare python": "pass", "import lightning_gym": "import lightning_gym"}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(REPEATS):
        for arm, code in arms.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[arm].append(time.perf_counter() - start)
    bare = statistics.median(seconds["bare python"])
    rows = [
        {"arm": arm, "median s": statistics.median(values), "over bare s": statistics.median(values) - bare}
        for arm, values in seconds.items()
    ]
    return Measurement(name="imports", what=f"Whole processes, {REPEATS} of each in turn, medians.", rows=rows)
