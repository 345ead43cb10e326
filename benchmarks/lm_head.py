"""Memory and time of the language-model head: all logits, those of trained tokens, and those in chunks."""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.packing import pack
from benchmarks.table import Measurement
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.logprobs import token_logprobs, token_logprobs_and_entropies
from lightning_gym.packed_attention import PackedLayout, forward_arguments, packed_forward, use_packed_attention

REPEATS = 5
VOCAB, HIDDEN = 151_936, 256
LENGTHS = [512] * 4


def measure() -> Measurement:
    """A process for every arm and repeat, the arms in turn."""
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in _ARMS}
    for _ in range(REPEATS):
        for arm, taken in results.items():
            command = [sys.executable, "-m", "benchmarks.lm_head", arm]
            root = Path(__file__).parent.parent
            done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
            taken.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        arm: {key: statistics.median(result[key] for result in taken) for key in taken[0]}
        for arm, taken in results.items()
    }
    full = medians["all positions"]
    rows = [
        {
            "logits of": arm,
            "peak GiB": found["bytes"] / 2**30,
            "peak / all": found["bytes"] / full["bytes"],
            "forward + backward CPU s": found["seconds"],
            "time / all": found["seconds"] / full["seconds"],
        }
        for arm, found in medians.items()
    ]
    return Measurement(
        name="lm_head",
        what=f"{sum(LENGTHS)} tokens, a quarter of them trained, vocabulary {VOCAB}, hidden size {HIDDEN}, one layer, "
        "tied head, float32. Peak: highest resident memory of the process (`ru_maxrss`) during the first forward and "
        "backward, over what was resident before it, so with the gradient of the head; time: CPU time of the second, "
        f"on one thread. {REPEATS} processes of each arm in turn, medians.",
        rows=rows,
    )


def _all_positions(model: nn.Module, batch: TrajectoryBatch) -> Tensor:
    """What a training step without any of our care does: logits of every token, normalised in float32."""
    layout = PackedLayout.of(batch.sequence_lengths)
    with packed_forward():
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **forward_arguments(model, layout),
        ).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, batch.input_ids[0, 1:, None])[:, 0]
    return torch.cat([logprobs.new_zeros(1), logprobs])[None] * batch.loss_mask


def _in_one_piece(model: nn.Module, batch: TrajectoryBatch) -> Tensor:
    return token_logprobs(model, batch, max_logits=None)


def _with_entropies(model: nn.Module, batch: TrajectoryBatch) -> Tensor:
    logprobs, entropies = token_logprobs_and_entropies(model, batch)
    return logprobs + 0.01 * entropies


_ARMS: dict[str, Any] = {
    "all positions": _all_positions,
    "trained positions": _in_one_piece,
    "trained positions, in chunks": token_logprobs,
    "trained positions, in chunks, with entropies": _with_entropies,
}


def _child(arm: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).float()
    use_packed_attention(model)
    (batch,) = pack(LENGTHS, num_micro_batches=1)
    torch.set_num_threads(1)
    before = _resident_bytes()
    _step(model, batch, arm)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    start = time.process_time()
    _step(model, batch, arm)
    print(json.dumps({"bytes": peak, "seconds": time.process_time() - start}))


def _step(model: nn.Module, batch: TrajectoryBatch, arm: str) -> None:
    model.zero_grad()
    (_ARMS[arm](model, batch) * batch.loss_weight).sum().backward()


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _child(sys.argv[1])
