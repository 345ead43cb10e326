"""What packing saves over padding: tokens computed for nothing, and training time."""

import contextlib
import copy
import statistics
import time
from collections.abc import Generator

import numpy as np
import torch
from torch import nn

from benchmarks.table import Measurement
from lightning_gym.batch import TrajectoryBatch, loss_weights, pack_window
from lightning_gym.logprobs import padded_tokens, token_logprobs, use_padded_rows
from lightning_gym.losses import grpo
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.testing import tiny_model, tiny_tokenizer
from lightning_gym.trajectory import Trajectory

REPEATS = 5
NUM_MICRO_BATCHES = 4
SHORT, LONG = 64, 512


def measure() -> Measurement:
    """Waste on three length distributions; time of a training step on the last of them."""
    windows = {
        "NeMo Gym 0.4.0, one rollout an environment": _RECORDED_GYM,
        "demo, first optimizer step": _RECORDED_DEMO,
        f"log-uniform {SHORT}-{LONG}": _log_uniform(32),
    }
    with one_thread():
        rows = [_row(name, lengths, timed=name.startswith("log")) for name, lengths in windows.items()]
    return Measurement(
        name="packing",
        what=f"Recorded lengths of trajectories, and drawn ones with a spread of {LONG // SHORT}:1, in "
        f"{NUM_MICRO_BATCHES} micro-batches. Waste: computed tokens that belong to no trajectory, as a fraction of the "
        "computed ones; padded: the same micro-batches, each to its longest. Tokens/s count real tokens of a training "
        f"step (forward, backward, AdamW; 4 layers, hidden size 256, float32) and seconds of CPU time on one thread; "
        f"{REPEATS} steps of each arm in turn, medians.",
        rows=rows,
    )


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """CPU time then counts work, not waiting for the other thread on a machine that does other things too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(name: str, lengths: list[int], *, timed: bool) -> dict[str, object]:
    batches = pack(lengths, num_micro_batches=NUM_MICRO_BATCHES)
    real = sum(lengths)
    row: dict[str, object] = {
        "lengths": name,
        "trajectories": len(lengths),
        "longest / mean": max(lengths) / statistics.mean(lengths),
        "waste packed": 1 - real / sum(batch.num_tokens for batch in batches),
        "waste padded": 1 - real / sum(padded_tokens(batch) for batch in batches),
    }
    seconds = _seconds(batches) if timed else None
    for arm in ("packed", "padded"):
        row[f"{arm} tokens/s"] = real / seconds[arm] if seconds else "-"
    row["packed / padded"] = seconds["padded"] / seconds["packed"] if seconds else "-"
    return row


def _seconds(batches: list[TrajectoryBatch]) -> dict[str, float]:
    packed = tiny_model(tiny_tokenizer(), num_layers=4, hidden_size=256)
    padded = copy.deepcopy(packed)
    use_packed_attention(packed)
    use_padded_rows(padded)
    arms: dict[str, nn.Module] = {"packed": packed, "padded": padded}
    optimizers = {arm: torch.optim.AdamW(model.parameters(), lr=1e-6) for arm, model in arms.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(REPEATS + 1):
        for arm, model in arms.items():
            start = time.process_time()
            for batch in batches:
                grpo(token_logprobs(model, batch), batch)[0].backward()
            optimizers[arm].step()
            optimizers[arm].zero_grad()
            seconds[arm].append(time.process_time() - start)
    return {arm: statistics.median(values[1:]) for arm, values in seconds.items()}


def pack(lengths: list[int], *, num_micro_batches: int, trained: float = 0.25) -> list[TrajectoryBatch]:
    """Micro-batches of random trajectories of these lengths, the last quarter of each trained."""
    random = np.random.default_rng(0)
    window = [_trajectory(random, index, length, trained) for index, length in enumerate(lengths)]
    return pack_window(
        window,
        random.normal(size=len(window)).tolist(),
        loss_weights(window, aggregation="token_mean"),
        num_micro_batches=num_micro_batches,
        max_tokens_per_micro_batch=sum(lengths),
        weight_scale=num_micro_batches,
    )


def _trajectory(random: np.random.Generator, index: int, length: int, trained: float) -> Trajectory:
    mask = np.arange(length) >= max(1, round(length * (1 - trained)))
    return Trajectory(
        rollout_id=str(index),
        segment=0,
        group_id=index // 8,
        token_ids=random.integers(400, size=length),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -6.0, 0.0).astype(np.float32),
        weight_versions=np.where(mask, 0, -1),
    )


def _log_uniform(count: int) -> list[int]:
    draws = np.random.default_rng(0).uniform(np.log(SHORT), np.log(LONG), size=count)
    return [SHORT, LONG, *np.exp(draws).astype(int).tolist()[2:]]


# Prompt and completion of the last call of one recorded rollout each: math_with_judge, mcqa, multi_step,
# reasoning_gym, single_tool_call and four of its failures, tiny_copy, workplace_assistant.
_RECORDED_GYM = [336, 602, 11014, 425, 636, 635, 561, 392, 407, 91, 16365]

# 64 rollouts of `make demo`.
_RECORDED_DEMO = [13, *[48] * 9, *[50] * 27, *[51] * 8, 52, *[53] * 18]
