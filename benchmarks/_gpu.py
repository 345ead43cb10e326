"""What the sections of `benchmarks.gpu` share: sizes, random policies on the device, an engine beside them, clocks."""

import contextlib
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_gym.batch import TrajectoryBatch, loss_weights, pack_window
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.policy.engine import Engine, EngineModel, Generation, SamplingParams
from lightning_gym.policy.vllm_engine import VLLMEngine
from lightning_gym.testing import FakeEngine, tiny_tokenizer
from lightning_gym.trajectory import Trajectory
from lightning_gym.weights import checkpoint_weights

Row = dict[str, Any]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16, by a word in the device's name."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    device: str
    dtype: str
    models: Mapping[str, Mapping[str, int]]
    """Name -> shape of a Qwen3; the middle one is that of single-model sections."""
    vocab_size: int
    packed_tokens: int
    sequence_tokens: int
    prompt_tokens: int
    sampled_tokens: int
    concurrencies: Sequence[int]
    gap_dtypes: Sequence[str]
    repeats: int
    cycles: int
    train_steps: int
    kv_cache_bytes: int | None
    fake_engine: bool = False
    """Only that the code runs, without vLLM."""

    @property
    def gates(self) -> bool:
        """Whether figures are held to bounds: toy sizes are not."""
        return self.device.startswith("cuda")

    @property
    def middle(self) -> str:
        """Of the models."""
        return list(self.models)[len(self.models) // 2]


def _shape(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


FULL = Scale(
    device="cuda",
    dtype="bfloat16",
    models={
        "0.5B": _shape(1024, 24, 3072, 16, 8, 64),
        "1.5B": _shape(1536, 28, 8960, 12, 2, 128),
        "4B": _shape(2560, 36, 9728, 32, 8, 128),
    },
    vocab_size=151_936,
    packed_tokens=16_384,
    sequence_tokens=2048,
    prompt_tokens=256,
    sampled_tokens=256,
    concurrencies=(64, 256),
    gap_dtypes=("bfloat16", "float16", "float32"),
    repeats=7,
    cycles=50,
    train_steps=120,
    kv_cache_bytes=None,
)
SMOKE = Scale(
    device="cpu",
    dtype="bfloat16",
    models={"S": _shape(64, 1, 96, 2, 1, 32), "M": _shape(64, 2, 96, 4, 2, 32)},
    vocab_size=1024,
    packed_tokens=256,
    sequence_tokens=64,
    prompt_tokens=24,
    sampled_tokens=8,
    concurrencies=(2, 4),
    gap_dtypes=("bfloat16", "float32"),
    repeats=2,
    cycles=3,
    train_steps=1,
    kv_cache_bytes=8 << 20,
)


def row(
    section: str, model: str, what: str, value: Any, *, at_least: float | None = None, at_most: float | None = None
) -> Row:
    """One line of the table, and whether a bound on the value holds."""
    wanted = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    verdict = {True: "yes", False: "NO"}[holds] if wanted else ""
    return {"section": section, "model": model, "what": what, "value": value, "wanted": wanted, "holds": verdict}


def synchronize(device: str) -> None:
    """Wait for everything that was asked of the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(scale: Scale, act: Callable[[], object]) -> float:
    """Median of `act`, the device waited for, after one round that warms up."""
    taken: list[float] = []
    for _ in range(scale.repeats + 1):
        synchronize(scale.device)
        start = time.perf_counter()
        act()
        synchronize(scale.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def used_bytes(device: str) -> int:
    """Of the device, by everybody."""
    if not device.startswith("cuda"):
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def forget_peak(device: str) -> None:
    """Begin a phase whose peak is of interest."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: str) -> float:
    """Of torch's allocator since `forget_peak`, trainer and engine together; 0 on CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else 0.0


@contextlib.contextmanager
def random_policy(name: str, scale: Scale, dtype: str | None = None) -> Generator[tuple[Any, Path]]:
    """A Qwen3 of random weights, made on the device, and a directory with its config and tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=scale.vocab_size,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **scale.models[name],
    )
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype or scale.dtype)).eval()
    use_packed_attention(model)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        yield model, Path(folder)


def new_engine(scale: Scale, *, max_model_len: int, **arguments: Any) -> Engine:
    """Not started."""
    if scale.fake_engine:
        return FakeEngine(max_model_len=max_model_len)
    return VLLMEngine(max_model_len=max_model_len, **arguments)


@contextlib.contextmanager
def engine_beside(
    model: nn.Module, path: Path, scale: Scale, *, dtype: str | None = None, **arguments: Any
) -> Generator[tuple[Engine, float]]:
    """A started, paused vLLM with the model's weights, and the seconds its start took."""
    arguments = {
        "max_model_len": scale.prompt_tokens + scale.sampled_tokens + 16,
        "max_num_seqs": max(scale.concurrencies),
        "kv_cache_memory_bytes": scale.kv_cache_bytes,
    } | arguments
    engine = new_engine(scale, **arguments)
    start = time.perf_counter()
    engine.start(
        EngineModel(
            path=path,
            dtype=dtype or str(next(model.parameters()).dtype).removeprefix("torch."),
            device=scale.device,
            weights=lambda: checkpoint_weights(model),
        )
    )
    try:
        yield engine, time.perf_counter() - start
    finally:
        engine.close()


def sampled(engine: Engine, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[Generation]:
    """Continuations of the prompts, at temperature 1; the engine has to be running."""
    results: queue.SimpleQueue[tuple[int, Generation | BaseException]] = queue.SimpleQueue()
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, seed=number, stop_token_ids=()
        )
        name = f"{time.monotonic_ns()}-{number}"
        engine.generate(name, prompt, sampling, lambda result, number=number: results.put((number, result)))
    found: dict[int, Generation] = {}
    for _ in prompts:
        number, result = results.get(timeout=300)
        if isinstance(result, BaseException):
            raise result
        found[number] = result
    return [found[number] for number in range(len(prompts))]


def prompts_of(scale: Scale, count: int, *, vocab_size: int) -> list[list[int]]:
    """Random prompts, different from each other."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (count, scale.prompt_tokens), generator=generator).tolist()


def packed(window: list[Trajectory]) -> TrajectoryBatch:
    """One micro-batch of all of them, every other one with a positive advantage."""
    (batch,) = pack_window(
        window,
        [1.0, -1.0] * (len(window) // 2),
        loss_weights(window, aggregation="token_mean"),
        num_micro_batches=1,
        max_tokens_per_micro_batch=sum(len(trajectory) for trajectory in window),
    )
    return batch
