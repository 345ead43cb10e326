"""What it costs to hand the weights over, on every rung, beside one flat copy of the same bytes and what others do."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Measurement

REPEATS = 7
SIZES = {
    "1 M": {"num_layers": 4, "hidden_size": 128, "intermediate_size": 512},
    "30 M": {"num_layers": 8, "hidden_size": 512, "intermediate_size": 2048},
    "150 M": {"num_layers": 16, "hidden_size": 832, "intermediate_size": 3168},
}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  what it is for


def measure() -> Measurement:
    """One process a size, because memory is part of the question."""
    rows: list[dict[str, object]] = []
    for size in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sync", size], check=True, capture_output=True, text=True
        )
        rows += json.loads(done.stdout.splitlines()[-1])
    return Measurement(
        name="sync",
        what=f"Random fp32 weights; medians of {REPEATS}, each arm in turn after a forward pass of both sides and "
        "a write to the weights, as in training. `memcpy` is `dst.copy_(src)` on one flat buffer of the same bytes; "
        "`share`, `copy` and `reload` are whole syncs without the canary, whose time stands beside them. The rest is "
        "what others do, by hand: per-tensor `load_weights`, and a safetensors file written and loaded. Memory is "
        "resident, over the process before any model existed, as a multiple of one copy of the weights. A sync's "
        "bookkeeping, which `share` is all of, stands in `us a tensor over memcpy` and not in the column after it.",
        rows=rows,
    )


def measure_size(size: str) -> list[dict[str, object]]:
    """All arms at one size, in this process."""
    arms = Arms(size)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms.by_name}
    canary: dict[str, list[float]] = {arm: [] for arm in arms.by_name}
    for repeat in range(REPEATS + 1):
        for name, arm in arms.by_name.items():
            arms.pretend_to_train()
            spent, looked = arm()
            if repeat:  # the first round is a warm-up
                seconds[name].append(spent)
                canary[name].append(looked)
    flat, bookkeeping = (statistics.median(seconds[name]) for name in ("memcpy", "share"))
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        spent = statistics.median(values)
        moves = name != "share"
        rows.append(
            {
                "parameters": f"{arms.num_parameters / 1e6:.1f} M",
                "arm": name,
                "tensors": arms.num_tensors,
                "MB": arms.num_bytes / 1e6 if moves else 0.0,
                "ms": spent * 1e3,
                "GB/s": arms.num_bytes / spent / 1e9 if moves else "",
                "of memcpy's bandwidth": flat / spent if moves else "",
                "us a tensor over memcpy": (spent - flat) / arms.num_tensors * 1e6 if moves else "",
                "over memcpy and `share`": (spent - flat - bookkeeping) / arms.num_tensors * 1e6
                if name in {"copy", "reload"}
                else "",
                "canary ms": statistics.median(canary[name]) * 1e3 if any(canary[name]) else "",
                "memory": arms.steady if name == "share" else "",
                "build's peak": arms.peak if name == "share" else "",
                "engine start s": arms.start_seconds if name == "share" else "",
            }
        )
    arms.close()
    return rows


class Arms:
    """One model, one engine, and every way from the one into the other; each returns its seconds and the canary's."""

    def __init__(self, size: str) -> None:
        from lightning_gym.policy.engine import EngineModel
        from lightning_gym.policy.vllm_engine import VLLMEngine
        from lightning_gym.sync import WeightSync
        from lightning_gym.testing import tiny_model, tiny_tokenizer
        from lightning_gym.weights import checkpoint_weights

        _import_what_an_engine_imports()
        tokenizer = tiny_tokenizer()
        before = _resident()
        _forget_peak()
        self.model = tiny_model(tokenizer, **SIZES[size])
        self.model.config.architectures = [type(self.model).__name__]
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name)
        self.model.config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        self.engine = VLLMEngine(max_model_len=64, max_num_seqs=8, kv_cache_memory_bytes=4 << 20)
        start = time.perf_counter()
        self.engine.start(EngineModel(path=path, dtype="float32", weights=lambda: checkpoint_weights(self.model)))
        self.start_seconds = time.perf_counter() - start
        parameters = list(self.model.parameters())
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self.num_tensors = len(parameters)
        self.num_bytes = sum(parameter.nbytes for parameter in parameters)
        self._version = 0
        sync = WeightSync(self.engine, self.model, mode="share")
        self._timed_sync(sync)
        self.peak = (_peak() - before) / self.num_bytes
        self.steady = (_resident() - before) / self.num_bytes
        sync.close()
        self._copy = WeightSync(self.engine, self.model, mode="copy")
        self._reload = WeightSync(self.engine, self.model, mode="reload")
        self._flat = (torch.randn(self.num_parameters), torch.empty(self.num_parameters))
        self.by_name: dict[str, Callable[[], tuple[float, float]]] = {
            "memcpy": self._memcpy,
            "share": self._share,
            "copy": lambda: self._timed_sync(self._copy),
            "reload": lambda: self._timed_sync(self._reload),
            "per-tensor load_weights": lambda: self._by_hand(lambda: checkpoint_weights(self.model)),
            "safetensors in shared memory": lambda: self._by_hand(lambda: self._through_file(SHARED_MEMORY)),
            "safetensors on disk": lambda: self._by_hand(lambda: self._through_file(path)),
        }

    @torch.no_grad()
    def pretend_to_train(self) -> None:
        """Leave the processor's caches as a training step does: forward passes, then the weights were written."""
        self._copy._canary.difference()
        torch._foreach_mul_([*self.model.parameters(), self._flat[0]], 1.0)

    def close(self) -> None:
        self.engine.close()
        self._folder.cleanup()

    def _timed_sync(self, sync: Any) -> tuple[float, float]:
        self._version += 1
        report = sync.sync(self._version)
        return report.seconds - report.canary_seconds, report.canary_seconds

    def _memcpy(self) -> tuple[float, float]:
        source, target = self._flat
        seconds: list[float] = []

        def copy() -> None:  # on the engine's thread, where the others write
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)

        self._version += 1
        self.engine.update_weights(copy, version=self._version)
        return seconds[0], 0.0

    def _share(self) -> tuple[float, float]:
        from lightning_gym.sync import WeightSync

        sync = WeightSync(self.engine, self.model, mode="share")
        self._timed_sync(sync)  # makes the parameters views
        spent = self._timed_sync(sync)
        sync.close()
        return spent

    def _by_hand(self, weights: Callable[[], Iterable[tuple[str, Any]]]) -> tuple[float, float]:
        from lightning_gym.policy.vllm_weights import driver_model

        self._version += 1
        start = time.perf_counter()
        self.engine.update_weights(
            lambda: driver_model(self.engine._engine).load_weights(iter(weights())), version=self._version
        )
        return time.perf_counter() - start, 0.0

    def _through_file(self, folder: Path) -> Iterable[tuple[str, Any]]:
        from safetensors.torch import load_file, save_file

        from lightning_gym.weights import named_weights

        with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors") as file:
            save_file(dict(named_weights(self.model)), file.name)
            if folder != SHARED_MEMORY:
                os.sync()
            yield from load_file(file.name).items()


def _import_what_an_engine_imports() -> None:
    """So that "before any model existed" is about models."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    import vllm.model_executor.models.qwen3
    import vllm.v1.worker.cpu_worker  # noqa: F401


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def _resident() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(measure_size(sys.argv[1])))
