"""One rank against two on the same cores: what a second engine, endpoint and Gym bring."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.table import Measurement

STEPS = 20
OUT = Path("outputs/bench-ranks")
ARMS = {
    "1 rank": (),
    "2 ranks, ddp": ("--devices", "2", "+trainer.strategy=ddp"),
    "2 ranks, FSDP2": ("--devices", "2", "+trainer/strategy=fsdp2"),
}


def measure() -> Measurement:
    """The counter recipe's first steps, the same rollouts in every arm."""
    warm_start = [sys.executable, "-m", "lightning_gym.cli", "warm-start", "counter", "--out", str(OUT)]
    if not (OUT / "counter-seed0").is_dir():
        subprocess.run(warm_start, check=True, capture_output=True)
    cores = os.cpu_count() or 1
    return Measurement(
        name="ranks",
        what=f"The counter recipe, {STEPS} steps of 64 rollouts, one run an arm; {cores} cores in every arm, shared by "
        "the ranks. Rollouts a second are over the time that collecting took, and over all of the time.",
        rows=[_train(name, options, cores) for name, options in ARMS.items()],
    )


def _train(name: str, options: tuple[str, ...], cores: int) -> dict[str, object]:
    run = OUT / "run"
    shutil.rmtree(run, ignore_errors=True)
    threads = max(1, cores // 2) if options else cores
    overrides = [f"warm_start={OUT}/counter-seed0", f"output_dir={run}", f"trainer.max_steps={STEPS}"]
    subprocess.run(
        [sys.executable, "-m", "lightning_gym.cli", "train", "counter", *options, *overrides],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    summary = json.loads((run / "summary.json").read_text())
    seconds, steps = summary["seconds"], summary["steps"]
    return {
        "arm": name,
        "threads a rank": threads,
        "rollouts/s collecting": summary["rollouts"] / seconds["collect"],
        "rollouts/s": summary["rollouts"] / summary["train_seconds"],
        "collect s a step": seconds["collect"] / steps,
        "train s a step": seconds["train"] / steps,
        "sync ms a step": 1e3 * seconds["sync"] / steps,
        "reward": summary["reward_last10"],
        "max logprob diff": f"{summary['max_logprob_diff']:.1e}",
        "misaligned + dropped": summary["misaligned"] + summary["dropped"],
    }
