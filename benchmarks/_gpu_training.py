"""Sections of `benchmarks.gpu` that are about training: kernels, learning, a whole step, the FLOPs used."""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._gpu import (
    PEAK_FLOPS,
    Row,
    Scale,
    forget_peak,
    new_engine,
    packed,
    peak_gb,
    random_policy,
    row,
    seconds,
)
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.logprobs import check_packing, token_logprobs
from lightning_gym.losses import grpo
from lightning_gym.memory_budget import ModelSize
from lightning_gym.packed_attention import PackedLayout, packed_attention, varlen_kernel
from lightning_gym.trajectory import Trajectory


def kernels(scale: Scale) -> list[Row]:
    """Packed attention on the device: against float64 on its grids, and its time against the grids'."""
    rows: list[Row] = []
    tokens = lengths(scale)
    layout = PackedLayout.of(tokens, scale.device)
    shape = scale.models[scale.middle]
    dtype = getattr(torch, scale.dtype)
    generator = torch.Generator(scale.device).manual_seed(0)

    def heads(count: int) -> Tensor:
        size = (1, count, sum(tokens), shape["head_dim"])
        return torch.randn(size, generator=generator, device=scale.device, dtype=dtype)

    query, key, value = (heads(shape[name]) for name in ("num_attention_heads", *["num_key_value_heads"] * 2))
    module = nn.Identity()

    def attend(*qkv: Tensor, layout: PackedLayout = layout) -> Tensor:
        return packed_attention(module, *qkv, None, packed_layout=layout, is_causal=True)[0]

    without_borders = PackedLayout(layout.grids, layout.cells, None, layout.longest)  # which keeps the kernel out
    exact = attend(query.double(), key.double(), value.double(), layout=without_borders)
    used = "variable-length flash" if varlen_kernel(query) else "grids of SDPA"
    error = ((attend(query, key, value).double() - exact).norm() / exact.norm()).item()
    name = f"packed attention ({used}), {sum(tokens)} tokens"
    rows.append(row("kernels", "", f"{name}: relative error", error, at_most=0.01))
    for arm, arranged in (("ours", layout), ("grids", without_borders)):

        def both(arranged: PackedLayout = arranged) -> None:
            parts = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            attend(*parts, layout=arranged).sum().backward()

        rows.append(row("kernels", "", f"{name}: {arm}, forward and backward ms", seconds(scale, both) * 1e3))
    with random_policy(scale.middle, scale) as (model, _):
        check_packing(model)  # raises where packed sequences see each other
        rows.append(row("kernels", scale.middle, "a packed row is that of its sequences alone", 1, at_least=1))
    return rows


def learning(scale: Scale) -> list[Row]:
    """The demo on this device: from its warm start to the reward it has to reach."""
    from lightning_gym.gym.environments import Counter

    with tempfile.TemporaryDirectory() as folder:
        overrides = ["counter", f"output_dir={folder}/run", f"trainer.max_steps={scale.train_steps}"]
        if scale.device == "cpu":  # a step of an untrained policy
            rows_path = Path(folder) / "rows.jsonl"
            generator = random.Random(0)
            rows_path.write_text("".join(json.dumps(Counter.row(generator)) + "\n" for _ in range(4)))
            with random_policy(next(iter(scale.models)), scale, "float32") as (model, path):
                model.save_pretrained(path)
                overrides += [f"policy.model={path}", f"data.train={rows_path}", "warm_start=null"]
                overrides += ["data.prompts_per_step=1", "data.group_size=2", "sampling.max_output_tokens=8"]
                fake = ["engine._target_=lightning_gym.testing.FakeEngine"] if scale.fake_engine else []
                _train([*overrides, *fake])
        else:
            from lightning_gym.tiny_policy.build import TinyPolicy

            path = TinyPolicy(environment="counter").ensure("outputs/tiny_policy")
            _train([*overrides, f"warm_start={path}", "trainer=default", "++trainer.accelerator=gpu"])
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    gate = 0.9 if scale.gates else None
    return [
        row("learning", "demo", "mean reward of the last 10 steps", summary["reward_last10"], at_least=gate),
        row("learning", "demo", "steps", summary["steps"]),
        row("learning", "demo", "training s", summary["train_seconds"]),
        row("learning", "demo", "largest |trainer - engine|, nats", summary["max_logprob_diff"]),
    ]


def _train(overrides: list[str]) -> None:
    command = [sys.executable, "-m", "lightning_gym.cli", "train", *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")


def step(scale: Scale) -> list[Row]:
    """GRPO steps under a Trainer, through the embedded Gym: where the time goes, and each phase's peak of memory."""
    import lightning.pytorch as L

    from lightning_gym import EmbeddedGym, GymCallback, GymDataModule, PolicyModule
    from lightning_gym.gym.environments import Counter
    from lightning_gym.rollout import SamplingProfile

    name, peaks = scale.middle, dict[str, float]()

    class Watching(GymCallback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            forget_peak(scale.device)
            super().on_fit_start(trainer, pl_module)
            peaks["engine build"] = peak_gb(scale.device)

        def next_window(self, trainer: L.Trainer, stream: Any, *, last: bool = False) -> Any:
            forget_peak(scale.device)
            window = super().next_window(trainer, stream, last=last)
            peaks["sync and collect"] = peak_gb(scale.device)
            forget_peak(scale.device)
            return window

        def on_train_batch_end(self, *arguments: Any) -> None:  # type: ignore[override]
            super().on_train_batch_end(*arguments)
            peaks["train"] = peak_gb(scale.device)

    generator = random.Random(0)
    rows_of_gym = [Counter.row(generator) for _ in range(16)]
    with random_policy(name, scale) as (model, path), tempfile.TemporaryDirectory() as folder:
        callback = Watching(
            engine=new_engine(
                scale,
                max_model_len=max(512, 4 * scale.sampled_tokens),
                max_num_seqs=max(scale.concurrencies),
                kv_cache_memory_bytes=scale.kv_cache_bytes,
            ),
            gym=EmbeddedGym(["counter"]),
            sampling=SamplingProfile(max_output_tokens=scale.sampled_tokens),
            model_path=path,
            run_dir=folder,
        )
        trainer = L.Trainer(
            max_steps=scale.repeats + 1,
            accelerator="gpu" if scale.device.startswith("cuda") else "cpu",
            devices=1,
            precision="bf16-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        data = GymDataModule(rows_of_gym, prompts_per_step=max(1, max(scale.concurrencies) // 16), group_size=8)
        trainer.fit(PolicyModule(model, lr=1e-6, gradient_checkpointing=True), datamodule=data)
    later = callback.history[1:]

    def median(key: str) -> float:
        return sorted(entry[key] for entry in later)[len(later) // 2]

    split = {phase: median(f"time/{phase}_s") for phase in ("sync", "collect", "prepare", "train")}
    return [
        *(row("step", name, f"{phase} s", taken) for phase, taken in split.items()),
        row("step", name, "step s", sum(split.values())),
        row("step", name, "trained tokens a step", median("batch/trained_tokens")),
        *(row("step", name, f"peak GB: {phase}", peak) for phase, peak in peaks.items()),
    ]


def mfu(scale: Scale) -> list[Row]:
    """A bare packed training step: tokens/s, model FLOPs utilisation, peak memory."""
    rows: list[Row] = []
    for name in scale.models:
        with random_policy(name, scale) as (model, _):
            size = ModelSize.of_model(model)
            whole = scale.packed_tokens * size.activation_bytes_per_token("bf16-true")
            room = torch.cuda.mem_get_info()[0] - 8 * size.num_parameters if scale.device.startswith("cuda") else 0
            checkpointed = whole > room
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            batch = packed([made_up(number, length) for number, length in enumerate(lengths(scale))])
            batch = batch.to(scale.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=scale.device.startswith("cuda"))

            def train(model: Any = model, batch: Any = batch, optimizer: Any = optimizer) -> None:
                loss, _ = grpo(token_logprobs(model, batch), batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            forget_peak(scale.device)
            taken = seconds(scale, train)
            rows.append(
                row("mfu", name, f"packed step of {batch.num_tokens} tokens, tokens/s", batch.num_tokens / taken)
            )
            rows.append(row("mfu", name, "gradient checkpointing", "yes" if checkpointed else "no"))
            rows.append(row("mfu", name, "peak GB", peak_gb(scale.device)))
            if (peak := _peak_flops(scale)) is not None:
                used = useful_flops(size, batch) / taken / peak
                gate = 0.4 if name == scale.middle else None
                rows.append(row("mfu", name, f"MFU of {peak / 1e12:.0f} TFLOP/s", used, at_least=gate))
    return rows


def useful_flops(size: ModelSize, batch: TrajectoryBatch) -> float:
    """Of forward and backward: matrices, causal attention, the head at trained tokens; recomputation is none."""
    layers = size.num_parameters - size.vocab_size * size.hidden_size
    matrices = 6 * layers * batch.num_tokens
    attention = 6 * size.num_layers * size.query_size * sum(length**2 for length in batch.sequence_lengths)
    head = 6 * size.hidden_size * size.vocab_size * int(batch.loss_mask.sum())
    return float(matrices + attention + head)


def _peak_flops(scale: Scale) -> float | None:
    if not scale.device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)


def lengths(scale: Scale) -> tuple[int, ...]:
    """Of an even number of sequences, ragged 2:1, that fill the packed row."""
    longest = scale.sequence_tokens
    count = 2 * math.ceil(scale.packed_tokens / (1.5 * longest) / 2)
    spread = np.linspace(longest // 2, longest, count).astype(int)
    spread[-1] += scale.packed_tokens - spread.sum()
    return tuple(int(length) for length in spread)


def made_up(number: int, length: int) -> Trajectory:
    mask = np.arange(length) >= length // 2
    return Trajectory(
        rollout_id=str(number),
        segment=0,
        group_id=number // 2,
        token_ids=np.random.default_rng(number).integers(500, size=length),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -6.0, 0.0).astype(np.float32),
        weight_versions=np.where(mask, 0, -1),
    )
