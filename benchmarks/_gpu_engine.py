"""Sections of `benchmarks.gpu` that are about the engine: weight sync, the gap of logprobs, throughput."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._gpu import (
    Row,
    Scale,
    engine_beside,
    packed,
    prompts_of,
    random_policy,
    row,
    sampled,
    seconds,
    used_bytes,
)
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.ladder import SyncMode
from lightning_gym.lm_head import use_float32_head
from lightning_gym.logprobs import token_logprobs_and_entropies
from lightning_gym.mismatch import mismatch_metrics
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.policy.engine import Generation
from lightning_gym.sync import WeightSync
from lightning_gym.trajectory import Trajectory
from lightning_gym.weights import weights


def sync(scale: Scale) -> list[Row]:
    """Every rung of the ladder against one flat copy; bit-exactness, canary, sleep, and what cycles leak."""
    rows: list[Row] = []
    for name in scale.models:
        with random_policy(name, scale) as (model, path):
            flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=model.dtype, device=scale.device)
            copy_s = _flat_copy_s(scale, flat)
            num_bytes = flat.nbytes
            del flat
            can_sleep = {"engine_args": {"enable_sleep_mode": True}} if scale.device.startswith("cuda") else {}
            with engine_beside(model, path, scale, **can_sleep) as (engine, started_s):
                rows.append(row("sync", name, "engine start s", started_s))
                for mode in ("copy", "reload"):
                    rows += _rung(scale, name, model, engine, mode, copy_s, num_bytes)
                rows += _sleep(scale, name, model, engine)
            with engine_beside(model, path, scale) as (engine, _):  # what slept cannot be shared
                rows += _rung(scale, name, model, engine, "share", copy_s, num_bytes)
    return rows


def _flat_copy_s(scale: Scale, source: Tensor) -> float:
    target = torch.empty_like(source)
    return seconds(scale, lambda: target.copy_(source))


def _rung(
    scale: Scale, name: str, model: nn.Module, engine: Any, mode: SyncMode, copy_s: float, num_bytes: int
) -> list[Row]:
    handed_over = WeightSync(engine, model, mode=mode)
    versions = itertools.count(1)
    taken: list[float] = []
    report = handed_over.sync(0)
    for _ in range(scale.repeats):
        _nudge(model)
        report = handed_over.sync(next(versions))
        taken.append(report.seconds - report.canary_seconds)
    median = sorted(taken)[len(taken) // 2]
    views = engine.weight_views()
    exact = all(torch.equal(views[weight.name], weight.parameter.data) for weight in weights(model))
    rows = [
        row("sync", name, f"{mode}: ms", median * 1e3),
        row("sync", name, f"{mode}: canary, nats", report.canary_diff),
        row("sync", name, f"{mode}: every tensor bit for bit", int(exact), at_least=1),
    ]
    if mode == "share":
        rows.append(row("sync", name, "share: bytes moved", report.num_bytes, at_most=0))
    else:
        gated = mode == "copy" and scale.gates and num_bytes > 2e9
        what = f"{mode}: of a flat device copy of {num_bytes / 1e9:.3g} GB"
        rows.append(row("sync", name, what, copy_s / median, at_least=0.6 if gated else None))
    before = used_bytes(scale.device)
    for _ in range(scale.cycles):
        _nudge(model)
        handed_over.sync(next(versions))
    leaked = used_bytes(scale.device) - before
    rows.append(row("sync", name, f"{mode}: MB more after {scale.cycles} syncs", leaked / 1e6, at_most=1))
    handed_over.close()
    return rows


@torch.no_grad()
def _nudge(model: nn.Module) -> None:
    """As an optimizer step does: in place, every weight."""
    torch._foreach_mul_(list(model.parameters()), 1.0 + 2**-9)


def _sleep(scale: Scale, name: str, model: nn.Module, engine: Any) -> list[Row]:
    if not getattr(engine, "can_sleep", False):
        return [row("sync", name, "sleep", "this engine cannot")]
    handed_over = WeightSync(engine, model, mode="copy")
    handed_over.sync(100)
    awake = used_bytes(scale.device)
    engine.sleep(weights=True)
    returned = awake - used_bytes(scale.device)
    handed_over.sync(101)  # wakes it, writes the weights and looks at the canary
    before = used_bytes(scale.device)
    for version in range(102, 102 + scale.cycles):
        engine.sleep(weights=True)
        handed_over.sync(version)
    leaked = used_bytes(scale.device) - before
    return [
        row("sync", name, "sleep: GB returned, weights and KV cache", returned / 1e9, at_least=0.01),
        row("sync", name, "after waking: canary, nats", handed_over.sync(1000).canary_diff),
        row("sync", name, f"MB more after {scale.cycles} cycles of sleep and sync", leaked / 1e6, at_most=1),
    ]


def gap(scale: Scale) -> list[Row]:
    """Trainer against engine on what the engine sampled: dtypes, with and without a float32 head."""
    from lightning_gym.errors import EngineStartError

    rows: list[Row] = []
    for name, dtype, head in itertools.product(["warm", scale.middle], scale.gap_dtypes, [None, "float32"]):
        if head and dtype == "float32":
            continue
        label = f"{dtype}{', float32 head' if head else ''}"
        try:
            found, entropy = _gap(scale, name, dtype, head)
        except EngineStartError as error:
            rows.append(row("gap", name, f"{label}: not on this vLLM", str(error).partition(";")[0]))
            continue
        error = found["token_mult_prob_error"]
        is_gate = scale.gates and dtype == "bfloat16" and head is None
        rows += [
            row("gap", name, f"{label}: token_mult_prob_error", error, at_most=1.02 if is_gate else None),
            row("gap", name, f"{label}: mean |trainer - engine|, nats", found["logprob_diff_mean"]),
            row("gap", name, f"{label}: largest", found["logprob_diff_max"]),
            row("gap", name, f"{label}: KL(engine || trainer), nats", found["generator_kl"]),
            row("gap", name, f"{label}: mean entropy, nats", entropy),
        ]
    return rows


def _gap(scale: Scale, name: str, dtype: str, head: Any) -> tuple[dict[str, float], float]:
    policy = _warm_policy(scale, dtype) if name == "warm" else random_policy(name, scale, dtype)
    with policy as (model, path):
        if head:
            use_float32_head(model)
        with engine_beside(model, path, scale, head_dtype=head) as (engine, _):
            WeightSync(engine, model).sync(0)
            prompts = prompts_of(scale, 16, vocab_size=min(600, model.config.vocab_size))
            engine.resume()
            generations = sampled(engine, prompts, max_tokens=scale.sampled_tokens)
            engine.pause()
            batch = _batch(prompts, generations).to(scale.device)
            with torch.no_grad():
                logprobs, entropies = token_logprobs_and_entropies(model, batch)
    found = {key: float(value) for key, value in mismatch_metrics(logprobs, batch).items()}
    return found, entropies[batch.loss_mask].mean().item()


def _warm_policy(scale: Scale, dtype: str) -> Any:
    """The demo's warm start; where everything is small, a policy that was not trained."""
    import contextlib

    from transformers import AutoModelForCausalLM

    from lightning_gym.tiny_policy.build import TinyPolicy

    @contextlib.contextmanager
    def made() -> Any:
        if scale.device == "cpu":
            with random_policy(next(iter(scale.models)), scale, dtype) as policy:
                yield policy
            return
        path = TinyPolicy(environment="counter").ensure("outputs/tiny_policy")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(scale.device).eval()
        use_packed_attention(model)
        yield model, path

    return made()


def _batch(prompts: Sequence[Sequence[int]], generations: Sequence[Generation]) -> TrajectoryBatch:
    window: list[Trajectory] = []
    for number, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        zeros, ones = np.zeros(len(prompt)), np.ones(len(generation.token_ids))
        mask = np.concatenate([zeros, ones]).astype(bool)
        window.append(
            Trajectory(
                rollout_id=str(number),
                segment=0,
                group_id=number // 2,
                token_ids=np.array([*prompt, *generation.token_ids]),
                loss_mask=mask,
                rollout_logprobs=np.concatenate([zeros, np.array(generation.logprobs)]).astype(np.float32),
                weight_versions=np.where(mask, generation.weight_version, -1),
            )
        )
    return packed(window)


def throughput(scale: Scale) -> list[Row]:
    """Tokens/s through the endpoint, from a client in another process, against the engine asked directly."""
    from benchmarks.endpoint import behind_endpoint, chat_body

    rows: list[Row] = []
    name = scale.middle
    with random_policy(name, scale) as (model, path), engine_beside(model, path, scale) as (engine, _):
        engine.update_weights(lambda: None, version=0)
        engine.resume()
        with behind_endpoint(engine, path, max_output_tokens=scale.sampled_tokens) as (endpoint, _, ask):
            chat = endpoint.service.chat
            for concurrency in scale.concurrencies:
                rates: dict[str, list[float]] = {"over HTTP": [], "engine alone": []}
                for repeat in range(scale.repeats + 1):
                    bodies = [
                        chat_body(chat, f"{concurrency}.{repeat}.{i}", rollout=False, num_tokens=scale.prompt_tokens)
                        for i in range(concurrency)
                    ]
                    done = ask(bodies, concurrency)
                    rates["over HTTP"].append(done["tokens"] / done["seconds"])
                    prompts = prompts_of(scale, concurrency, vocab_size=600 + repeat)
                    start = time.perf_counter()
                    generations = sampled(engine, prompts, max_tokens=scale.sampled_tokens)
                    tokens = sum(len(generation.token_ids) for generation in generations)
                    rates["engine alone"].append(tokens / (time.perf_counter() - start))
                http, alone = (sorted(values[1:])[len(values) // 2 - 1] for values in rates.values())
                what, gate = f"over HTTP / engine alone, {concurrency} at once", 0.9 if scale.gates else None
                rows += [
                    row("throughput", name, f"engine alone, {concurrency} at once, tokens/s", alone),
                    row("throughput", name, f"over HTTP, {concurrency} at once, tokens/s", http),
                    row("throughput", name, what, http / alone, at_least=gate),
                ]
        engine.pause()
    return rows
