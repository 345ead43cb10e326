"""What vLLM is built with on a GPU: worked out without one, against the vLLM that is installed."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from lightning_gym.errors import ConfigError, EngineStartError
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.vllm_arguments import EngineSettings, cuda_arguments, engine_arguments

GB = 1 << 30
SETTINGS = EngineSettings(
    max_model_len=128,
    max_num_seqs=8,
    kv_cache_memory_bytes=None,
    gpu_memory_utilization=None,
    enforce_eager=None,
    head_dtype=None,
    max_lora_rank=0,
    seed=0,
    engine_args={},
)


def model_at(path: Any, **changes: Any) -> EngineModel:
    return replace(EngineModel(path=path, dtype="bfloat16", weights=lambda: ()), **changes)


def on_gpu(path: Any, settings: EngineSettings = SETTINGS, *, free: int = 79 * GB, **changes: Any) -> dict[str, Any]:
    return cuda_arguments(settings, model_at(path, device="cuda", **changes), free_bytes=free, device_bytes=80 * GB)


def test_a_gpu_gets_explicit_cache_bytes_and_a_share_that_holds_them(policy_dir):
    arguments = on_gpu(policy_dir)

    assert arguments["kv_cache_memory_bytes"] == 8 * 128 * 2 * 1 * 32 * 2  # requests, tokens, K and V, head, bytes
    assert arguments["kv_cache_memory_bytes"] < arguments["gpu_memory_utilization"] * 80 * GB < 79 * GB


def test_no_batch_is_in_flight_between_two_steps(policy_dir):
    assert on_gpu(policy_dir)["async_scheduling"] is False


def test_the_users_own_sizes_win(policy_dir):
    settings = replace(SETTINGS, kv_cache_memory_bytes=GB, gpu_memory_utilization=0.5)

    arguments = on_gpu(policy_dir, settings)

    assert (arguments["kv_cache_memory_bytes"], arguments["gpu_memory_utilization"]) == (GB, 0.5)


def test_the_budget_is_told_before_the_engine_is_built(policy_dir, caplog):
    with caplog.at_level("INFO", logger="lightning_gym"):
        on_gpu(policy_dir, trainer_bytes=3 * GB)

    assert "at most still to come             3.00 GiB" in caplog.text


def test_a_trainer_that_may_not_fit_is_warned_of(policy_dir, caplog):
    on_gpu(policy_dir, trainer_bytes=300 * GB)

    assert "may run out" in caplog.text


def test_an_engine_beside_a_full_gpu_is_refused_with_the_budget(policy_dir):
    with pytest.raises(ConfigError, match="KV cache"):
        on_gpu(policy_dir, free=0)


@pytest.mark.vllm
def test_vllm_knows_every_argument_of_a_gpu(policy_dir):
    import vllm

    assert on_gpu(policy_dir).keys() <= {field.name for field in fields(vllm.EngineArgs)}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("engine_args", "device", "said"),
    [
        ({"async_scheduling": True}, "cpu", "in flight"),
        ({"flux_capacitor": 1}, "cpu", "knows no engine argument flux_capacitor"),
    ],
)
def test_arguments_that_would_be_wrong_are_refused(policy_dir, engine_args, device, said):
    with pytest.raises(EngineStartError, match=said):
        engine_arguments(replace(SETTINGS, engine_args=engine_args), model_at(policy_dir, device=device))


@pytest.mark.vllm
def test_a_single_process_on_another_than_the_first_gpu_is_refused(policy_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (79 * GB, 80 * GB))

    with pytest.raises(EngineStartError, match="CUDA_VISIBLE_DEVICES=1"):
        engine_arguments(SETTINGS, model_at(policy_dir, device="cuda:1"))


@pytest.mark.vllm
@pytest.mark.parametrize(("wanted", "room"), [(0, None), (1, 1), (9, 16), (512, 512)])
def test_room_for_an_adapter_is_the_smallest_that_vllm_has(tmp_path, wanted, room):
    arguments = engine_arguments(replace(SETTINGS, max_lora_rank=wanted), model_at(tmp_path))
    assert (arguments.get("enable_lora", False), arguments.get("max_lora_rank")) == (room is not None, room)
