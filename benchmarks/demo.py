"""The demo on three seeds, each in a process of its own: reward, and where the seconds went."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.table import Measurement

SEEDS = (0, 1, 2)
OUT = Path("outputs/bench-demo")


def measure() -> Measurement:
    """Build the warm start afresh and train, as ``make demo`` does."""
    rows = [_demo(seed) for seed in SEEDS]
    return Measurement(
        name="demo",
        what="`make demo` with the warm start built afresh; one run a seed. Seconds are wall (CPU of the trainer's "
        "process in brackets). `training` is everything from the first rollout to the last optimizer step.",
        rows=rows,
    )


def _demo(seed: int) -> dict[str, object]:
    policies, run = OUT / "tiny_policy", OUT / f"run-{seed}"
    warm_start = [sys.executable, "-m", "lightning_gym.cli", "warm-start", "counter", "--seed", str(seed)]
    for stale in (policies / f"counter-seed{seed}", run):
        shutil.rmtree(stale, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run([*warm_start, "--out", str(policies)], check=True, capture_output=True)
    warmed = time.perf_counter()
    train = [sys.executable, "-m", "lightning_gym.cli", "train", "counter", f"seed={seed}", f"output_dir={run}"]
    subprocess.run([*train, f"warm_start={policies}/counter-seed{seed}"], check=True, capture_output=True)
    done = time.perf_counter()
    summary = json.loads((run / "summary.json").read_text())
    history = _rewards(run / "csv" / "metrics.csv")
    reached = next((i + 1 for i in range(9, len(history)) if sum(history[i - 9 : i + 1]) / 10 >= 0.9), None)
    wall, cpu = summary["seconds"], summary["cpu_seconds"]
    return {
        "seed": seed,
        "predicted start": summary["reward_predicted"],
        "last 10 steps": summary["reward_last10"],
        "0.90 reached at step": reached,
        "warm start s": warmed - start,
        "training s": summary["train_seconds"],
        "whole s": done - start,
        **{f"{phase} s": f"{wall[phase]:.1f} ({cpu[phase]:.1f})" for phase in cpu},
        "engine start s": wall["engine"],
        "max logprob diff": f"{summary['max_logprob_diff']:.1e}",
        "misaligned + dropped": summary["misaligned"] + summary["dropped"],
    }


def _rewards(path: Path) -> list[float]:
    header, *lines = path.read_text().splitlines()
    column = header.split(",").index("rollout/reward_mean")
    return [float(value) for line in lines if (value := line.split(",")[column])]
