"""What vLLM's engine is built with: its arguments from this package's settings, the model, and the device's memory."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from lightning_gym.errors import EngineStartError
from lightning_gym.policy.engine import EngineModel

_log = logging.getLogger(__name__)
_CPU_KV_CACHE_BYTES = 256 << 20
_BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The arguments of `lightning_gym.VLLMEngine`, which documents them."""

    max_model_len: int
    max_num_seqs: int
    kv_cache_memory_bytes: int | None
    gpu_memory_utilization: float | None
    enforce_eager: bool | None
    head_dtype: str | None
    max_lora_rank: int
    seed: int
    engine_args: Mapping[str, Any]


def engine_arguments(settings: EngineSettings, model: EngineModel) -> dict[str, Any]:
    """Fields of ``vllm.EngineArgs``. Logs the memory budget where the device is a GPU.

    Raises:
        EngineStartError: this vLLM has no such argument, or it would be wrong for weights that are written in process.
        ConfigError: the engine does not fit beside the trainer.
    """
    import torch
    import vllm

    from lightning_gym.policy.vllm_weights import LOADER

    on_cpu = model.device.startswith("cpu")
    arguments: dict[str, Any] = {
        "model": str(model.path),
        "tokenizer": str(model.path),
        "load_format": LOADER,
        "dtype": model.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": settings.seed,
    }
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"
    if settings.max_lora_rank:
        arguments |= _lora_arguments(settings.max_lora_rank)
    if settings.head_dtype is not None:
        arguments["hf_overrides"] = {"head_dtype": settings.head_dtype}
    if on_cpu:
        arguments |= _cpu_arguments(settings)
    else:
        free, total = torch.cuda.mem_get_info(model.device)
        arguments |= cuda_arguments(settings, model, free_bytes=free, device_bytes=total)
    arguments |= settings.engine_args
    known = {field.name for field in fields(vllm.EngineArgs)}
    if unknown := sorted(arguments.keys() - known):
        raise EngineStartError(f"vllm {vllm.__version__} knows no engine argument {', '.join(unknown)}")
    _refuse(arguments, model.device)
    return arguments


def _lora_arguments(max_rank: int) -> dict[str, Any]:
    """Room for one adapter; vLLM's kernels take some ranks only, and a smaller one in the room of a larger."""
    from vllm.config.lora import MaxLoRARanks

    room = [rank for rank in get_args(MaxLoRARanks) if rank >= max_rank]
    if not room:
        raise EngineStartError(f"vLLM takes adapters of rank {max(get_args(MaxLoRARanks))} at most, got {max_rank}")
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": min(room)}


def _cpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    # vLLM 0.32 takes the random draw of a half-prefilled, seeded request back by the generator's offset, which CPU
    # generators do not have: prompts are prefilled whole.
    return {
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes or _CPU_KV_CACHE_BYTES,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_BATCHED_TOKENS, settings.max_model_len),
    }


def cuda_arguments(
    settings: EngineSettings, model: EngineModel, *, free_bytes: int, device_bytes: int
) -> dict[str, Any]:
    """What a GPU with that much memory needs beside the common arguments.

    Raises:
        ConfigError: the engine does not fit beside the trainer; with the budget.
    """
    from transformers import AutoConfig

    from lightning_gym.memory_budget import SMALLER, ModelSize, plan_engine

    plan = plan_engine(
        ModelSize.of_config(AutoConfig.from_pretrained(model.path)),
        dtype=model.dtype,
        device_bytes=device_bytes,
        free_bytes=free_bytes,
        trainer_bytes=model.trainer_bytes,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        max_batched_tokens=_BATCHED_TOKENS,
        kv_cache_bytes=settings.kv_cache_memory_bytes,
        cuda_graphs=not settings.enforce_eager,
    )
    if plan.budget.fits:
        _log.info("memory of %s:\n%s", model.device, plan.budget.table())
    else:
        _log.warning(
            "memory of %s may run out while the largest micro-batch trains:\n%s\n%s",
            model.device,
            plan.budget.table(),
            SMALLER,
        )
    return {
        "kv_cache_memory_bytes": plan.kv_cache_bytes,
        # Both: with explicit bytes vLLM still refuses to start where less than this share of the device is free.
        "gpu_memory_utilization": settings.gpu_memory_utilization or plan.utilization,
        "max_num_batched_tokens": _BATCHED_TOKENS,
        # One batch in flight between two steps would read weights while they are being written.
        "async_scheduling": False,
    }


def _refuse(arguments: Mapping[str, Any], device: str) -> None:
    """What vLLM would accept, and what would be wrong here."""
    if arguments.get("async_scheduling"):
        raise EngineStartError(
            "async_scheduling=True leaves a batch in flight between two steps, which would read weights while they are "
            "being written; leave it out of engine_args"
        )
    index = device.partition(":")[2]
    if index not in ("", "0") and "distributed_executor_backend" not in arguments:
        raise EngineStartError(
            f"the trainer is on {device}, and the engine of a single process takes the first visible device; start "
            f"with CUDA_VISIBLE_DEVICES={index} and one device"
        )
