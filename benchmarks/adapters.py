"""A LoRA policy's sync: its merged weights copied, or the adapter alone beside a base that is in memory once."""

import json
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.sync import SIZES, _import_what_an_engine_imports, _resident
from benchmarks.table import Measurement

ROUNDS, REPEATS = 3, 5
RANK = 16
ARMS = {"merged, copied": 0, "kept apart": RANK}
PROMPTS, TOKENS = 32, 64


def measure() -> Measurement:
    """A process an arm, because memory is part of the question; arms in turn."""
    rows: list[dict[str, object]] = []
    for size in ("30 M", "150 M"):
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(ROUNDS):
            for arm, results in found.items():
                command = [sys.executable, "-m", "benchmarks.adapters", size, arm]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        for arm, results in found.items():
            parts = {part: statistics.median(result[part] for result in results) for part in results[0]}
            rows.append({"parameters": f"{parts.pop('parameters') / 1e6:.1f} M", "arm": arm, **parts})
    return Measurement(
        name="adapters",
        what=f"LoRA of rank {RANK} on every linear layer but the head, float32; {ROUNDS} processes an arm in turn, "
        f"medians, of {REPEATS} syncs each, after the first, without the canary. Memory is resident after the first "
        "sync, over the process before any model existed, as a multiple of one copy of the base. Tokens/s: "
        f"{PROMPTS} generations of {TOKENS} tokens at once on the bare engine.",
        rows=rows,
    )


def measure_arm(size: str, arm: str) -> dict[str, float]:
    """One arm at one size, in this process."""
    import peft

    from lightning_gym.policy.engine import EngineModel
    from lightning_gym.policy.vllm_engine import VLLMEngine
    from lightning_gym.sync import WeightSync
    from lightning_gym.testing import tiny_model, tiny_tokenizer
    from lightning_gym.weights import named_weights

    _import_what_an_engine_imports()
    tokenizer = tiny_tokenizer()
    before = _resident()
    base = tiny_model(tokenizer, **SIZES[size])
    base.config.architectures = [type(base).__name__]
    num_bytes = sum(parameter.nbytes for parameter in base.parameters())
    num_parameters = base.num_parameters()
    config = peft.LoraConfig(r=RANK, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        base.config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        engine = VLLMEngine(
            max_model_len=128, max_num_seqs=PROMPTS, kv_cache_memory_bytes=64 << 20, max_lora_rank=ARMS[arm]
        )
        engine.start(EngineModel(path=path, dtype="float32", weights=lambda: named_weights(model)))
        sync = WeightSync(engine, model)
        sync.sync(0)
        steady = (_resident() - before) / num_bytes
        seconds: list[float] = []
        for version in range(1, REPEATS + 1):
            _pretend_to_train(model)
            report = sync.sync(version)
            seconds.append(report.seconds - report.canary_seconds)
        tokens_per_s = _generate(engine)
        engine.close()
    return {
        "parameters": num_parameters,
        "tensors": report.num_tensors,
        "MB": report.num_bytes / 1e6,
        "ms": statistics.median(seconds) * 1e3,
        "memory": steady,
        "tokens/s": tokens_per_s,
    }


@torch.no_grad()
def _pretend_to_train(model: torch.nn.Module) -> None:
    model(input_ids=torch.arange(8)[None], use_cache=False)
    torch._foreach_mul_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)


def _generate(engine: Any) -> float:
    from lightning_gym.policy.engine import SamplingParams

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.resume()
    start = 0.0
    for repeat in range(2):  # the first is a warm-up
        start = time.perf_counter()
        for number in range(PROMPTS):
            sampling = SamplingParams(
                temperature=1.0, top_p=1.0, top_k=-1, max_tokens=TOKENS, seed=number, stop_token_ids=()
            )
            engine.generate(f"{repeat}-{number}", list(range(1, 17)), sampling, results.put)
        for _ in range(PROMPTS):
            results.get(timeout=300)
    seconds = time.perf_counter() - start
    engine.pause()
    return PROMPTS * TOKENS / seconds


if __name__ == "__main__":
    print(json.dumps(measure_arm(*sys.argv[1:])))
