"""The arithmetic of memory, against what torch allocates where that can be counted."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_gym.errors import ConfigError
from lightning_gym.logprobs import token_logprobs
from lightning_gym.memory_budget import (
    MemoryBudget,
    ModelSize,
    Part,
    Precision,
    compute_dtype,
    engine_parts,
    plan_engine,
    precision_of,
    trainer_bytes_to_come,
    trainer_parts,
    wanted_kv_cache_bytes,
)
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.testing import packed_batch, tiny_model, tiny_tokenizer

SIZES = [
    {"hidden_size": 128, "num_kv_heads": 2, "intermediate_size": 384},
    {"hidden_size": 256, "num_kv_heads": 2, "intermediate_size": 512},
    {"hidden_size": 128, "num_kv_heads": 4, "intermediate_size": 1024},
]
NUM_SEQUENCES, LENGTH = 4, 60


def model_of(num_layers: int, **size: int) -> Any:
    model = tiny_model(tiny_tokenizer(), num_layers=num_layers, **size)
    use_packed_attention(model)
    return model.train()


def kept_bytes(model: nn.Module, precision: Precision) -> int:
    """Bytes of the storages that a packed forward keeps for its backward pass, weights and their casts left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weights = {parameter.shape for parameter in model.parameters()} | {
        parameter.T.shape for parameter in model.parameters() if parameter.ndim == 2
    }
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.shape not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = packed_batch(mask=[[False] + [True] * (LENGTH - 1)] * NUM_SEQUENCES)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        token_logprobs(model, batch)
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size.values())))
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_activations_of_a_layer_are_what_autograd_keeps(precision: Precision, size: dict[str, int]):
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    one, three = (kept_bytes(model_of(layers, **size).to(dtype), precision) for layers in (1, 3))
    counted = (three - one) / 2 / (NUM_SEQUENCES * LENGTH)

    said = ModelSize.of_model(model_of(1, **size)).activation_bytes_per_token(precision)

    assert said == pytest.approx(counted, rel=0.03)


def test_gradient_checkpointing_keeps_the_input_of_each_layer_and_all_of_one():
    model = model_of(4, hidden_size=128)
    size = ModelSize.of_model(model)

    checkpointed = size.activation_bytes_per_token("32-true", gradient_checkpointing=True)

    assert checkpointed == 4 * 4 * 128 + size.activation_bytes_per_token("32-true") // 4


def test_a_model_that_was_never_built_has_the_size_of_the_one_that_was():
    model = model_of(2)

    assert ModelSize.of_config(model.config) == ModelSize.of_model(model)


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
    model = model_of(1)
    model.model.embed_tokens.requires_grad_(False)
    size = ModelSize.of_model(model)

    parts = {p.name: p.num_bytes for p in trainer_parts(size, precision="32-true", max_tokens_per_micro_batch=1)}

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert parts["gradients"] == 4 * trained < parts["weights"]
    assert parts["optimizer state"] == 2 * parts["gradients"]


def test_mixed_precision_holds_float32_weights_and_their_casts():
    size = ModelSize.of_model(model_of(1))

    parts = {p.name: p.num_bytes for p in trainer_parts(size, precision="bf16-mixed", max_tokens_per_micro_batch=1)}

    assert parts["weights"] == 4 * size.num_parameters
    assert parts["weights cast for the forward"] == 2 * size.num_parameters


def test_shared_weights_are_in_memory_once():
    size = ModelSize.of_model(model_of(1))
    plan: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_bytes": 7, "max_num_seqs": 2, "max_batched_tokens": 8}

    copied, shared = (MemoryBudget(parts=engine_parts(size, **plan, shared=shared)) for shared in (False, True))

    assert copied.total_bytes - shared.total_bytes == 2 * size.num_parameters


def test_a_kv_cache_holds_keys_and_values_of_every_layer():
    size = ModelSize.of_model(model_of(3, num_kv_heads=2))

    num_bytes = wanted_kv_cache_bytes(size, dtype="bfloat16", max_num_seqs=5, max_model_len=100)

    assert num_bytes == 5 * 100 * 3 * 2 * (2 * 32) * 2  # requests, tokens, layers, K and V, heads x 32, bytes


def test_a_plan_that_does_not_fit_is_refused_with_its_table_and_a_way_out():
    budget = MemoryBudget(parts=[Part("engine", "KV cache", 3 << 30)], device_bytes=2 << 30)

    with pytest.raises(ConfigError, match=r"KV cache +3\.00 GiB[\s\S]*1\.00 GiB TOO MUCH[\s\S]*kv_cache_memory_bytes"):
        budget.check()


def test_a_plan_for_an_unknown_device_is_only_told():
    budget = MemoryBudget(parts=[Part("engine", "KV cache", 3 << 30)])

    budget.check()

    assert budget.table().endswith("3.00 GiB")


GB = 1 << 30
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 1000, "max_batched_tokens": 16}


def one_layer() -> ModelSize:
    """A model with a KV cache of 1 MiB a token, so that a gigabyte is a thousand tokens."""
    return ModelSize(
        num_parameters=GB // 2,
        num_trained=GB // 2,
        num_layers=1,
        hidden_size=8,
        query_size=8,
        kv_size=1 << 18,
        intermediate_size=16,
        vocab_size=10,
    )


def test_the_kv_cache_holds_every_request_where_there_is_room():
    plan = plan_engine(
        one_layer(), dtype="bfloat16", device_bytes=80 * GB, free_bytes=79 * GB, trainer_bytes=4 * GB, **LIMITS
    )

    assert plan.kv_cache_bytes == 4 * 1000 << 20
    assert plan.budget.fits


def test_the_kv_cache_is_what_the_trainer_leaves():
    device = {"device_bytes": 10 * GB, "free_bytes": 9 * GB, "trainer_bytes": 4 * GB}

    plan = plan_engine(one_layer(), dtype="bfloat16", **device, **LIMITS)

    assert 1000 << 20 < plan.kv_cache_bytes < 4 * 1000 << 20
    assert plan.budget.total_bytes == 10 * GB
    assert plan.utilization == pytest.approx(plan.budget.of("engine") / (10 * GB))


def test_a_trainer_that_may_need_too_much_leaves_room_for_one_request_and_is_told_of():
    device = {"device_bytes": 10 * GB, "free_bytes": 9 * GB, "trainer_bytes": 20 * GB}

    plan = plan_engine(one_layer(), dtype="bfloat16", **device, **LIMITS)

    assert plan.kv_cache_bytes == 1000 << 20
    assert not plan.budget.fits


def test_an_engine_that_does_not_fit_now_is_refused():
    device = {"device_bytes": 10 * GB, "free_bytes": 2 * GB, "trainer_bytes": 0}

    with pytest.raises(ConfigError, match="more memory is needed than there is"):
        plan_engine(one_layer(), dtype="bfloat16", **device, **LIMITS)


def test_a_kv_cache_too_small_for_one_request_is_refused():
    device = {"device_bytes": 80 * GB, "free_bytes": 79 * GB, "trainer_bytes": 0}

    with pytest.raises(ConfigError, match=r"one request of max_model_len=1000 tokens needs 0\.977 GiB"):
        plan_engine(one_layer(), dtype="bfloat16", **device, **LIMITS, kv_cache_bytes=5 << 20)


def test_what_is_to_come_is_all_of_the_trainer_but_its_weights():
    model = model_of(2)
    size = ModelSize.of_model(model)

    to_come = trainer_bytes_to_come(model, precision="32-true", max_tokens_per_micro_batch=100)

    parts = MemoryBudget(parts=trainer_parts(size, precision="32-true", max_tokens_per_micro_batch=100))
    assert to_come == parts.total_bytes - 4 * size.num_parameters


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-true")])
def test_a_model_says_the_precision_it_trains_in(dtype: str, precision: str):
    model = model_of(1).to(getattr(torch, dtype))

    assert precision_of(model) == precision
    assert compute_dtype(precision_of(model)) == dtype
