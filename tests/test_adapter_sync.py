"""LoRA adapters beside the engine's weights: computed as the trainer computes them, and all that a sync moves."""

import pytest
import torch

from lightning_gym import VLLMEngine
from lightning_gym.canary import Canary
from lightning_gym.errors import ConfigError, EngineStartError, WeightSyncError
from lightning_gym.policy.engine import EngineModel, LoRA
from lightning_gym.sync import WeightSync
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer
from lightning_gym.weights import named_weights, weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = [pytest.param("fake"), pytest.param("vllm", marks=pytest.mark.vllm)]
EVERYWHERE = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
"""Parts of what vLLM fuses, whole layers, and the head."""
RANK = 4


def base(seed=0):
    model = tiny_model(
        tiny_tokenizer(), hidden_size=32, num_layers=2, num_kv_heads=1, tie_word_embeddings=False, seed=seed
    )
    model.config.architectures = [type(model).__name__]
    return model


def adapted(*, seed=0, **changes):
    torch.manual_seed(seed)
    options = {"r": RANK, "lora_alpha": 16, "target_modules": EVERYWHERE, "init_lora_weights": False}
    return peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **(options | changes)))


def shake(model, *, by=0.05):
    """What an optimizer step does to what trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Makes a started engine of a kind, from other weights than the trainer's; closes them all."""
    engines = []

    def make(kind="fake", *, max_lora_rank=8):
        directory = tmp_path_factory.mktemp("model")
        tiny_tokenizer().save_pretrained(directory)
        other = base(seed=9)
        other.config.save_pretrained(directory)
        engine = (
            FakeEngine(max_model_len=64, max_lora_rank=max_lora_rank)
            if kind == "fake"
            else VLLMEngine(max_model_len=64, max_num_seqs=8, max_lora_rank=max_lora_rank)
        )
        engine.start(EngineModel(path=directory, dtype="float32", weights=lambda: named_weights(other)))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module", params=ENGINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(kind, room):
    return room(kind)


def bases(model):
    """Name -> the trainer's weight without its adapter."""
    return {weight.name: weight.parameter for weight in weights(model)}


# -- the engine


def test_an_adapter_is_computed_as_the_trainer_does_and_takes_the_place_of_the_one_before(engine):
    model = adapted()
    canary = Canary(engine, model)
    sync = WeightSync(engine, model)
    sync.sync(0)
    assert canary.difference() < 1e-4
    shake(model)
    assert canary.difference() > 1e-2, "the engine has a copy, not the trainer's tensors"
    sync.sync(1)
    assert canary.difference() < 1e-4
    engine.update_weights(lambda: engine.load_adapter({}), version=2)
    with model.disable_adapter():
        assert canary.difference() < 1e-4
    sync.close()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"model.layers.7.self_attn.q_proj": LoRA(a=torch.zeros(4, 32), b=torch.zeros(32, 4), scaling=1.0)},
            "layers.7",
        ),
        ({"model.layers.0.self_attn.q_proj": LoRA(a=torch.zeros(9, 32), b=torch.zeros(32, 9), scaling=1.0)}, "rank 9"),
    ],
    ids=["no such layer", "rank"],
)
def test_an_adapter_that_the_engine_cannot_keep_is_refused(engine, adapter, said):
    with pytest.raises(WeightSyncError, match=said):
        engine.update_weights(lambda: engine.load_adapter(adapter), version=3)


@pytest.mark.vllm
def test_vllm_says_which_ranks_it_takes(tmp_path):
    base().config.save_pretrained(tmp_path)
    with pytest.raises(EngineStartError, match="rank 512 at most, got 513"):
        VLLMEngine(max_model_len=64, max_lora_rank=513).start(
            EngineModel(path=tmp_path, dtype="float32", weights=lambda: named_weights(base()))
        )


# -- the rung


def test_the_base_is_in_memory_once_and_only_the_adapter_moves(engine):
    model = adapted()
    sync = WeightSync(engine, model)
    first = sync.sync(0)
    held = bases(model)
    shake(model)
    second = sync.sync(1)
    views = engine.weight_views()
    adapter_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (first.mode, second.mode) == ("adapter", "adapter")
    assert first.num_bytes == sum(view.nbytes for view in views.values()) + adapter_bytes
    assert second.num_bytes == adapter_bytes
    assert second.num_tensors == sum(p.requires_grad for p in model.parameters())
    assert {name: view.data_ptr() for name, view in views.items()} == {name: p.data_ptr() for name, p in held.items()}
    assert second.canary_diff < 1e-4
    sync.close()
    assert all(p.data_ptr() != views[name].data_ptr() for name, p in bases(model).items())


def test_with_a_lag_the_base_is_a_copy_that_is_written_once(engine):
    model = adapted()
    sync = WeightSync(engine, model, max_lag=1)
    first = sync.sync(0)
    shake(model)
    second = sync.sync(1)
    assert (first.mode, first.num_bytes > second.num_bytes > 0) == ("adapter", True)
    assert all(p.data_ptr() != engine.weight_views()[name].data_ptr() for name, p in bases(model).items())
    assert second.canary_diff < 1e-4


def test_an_adapter_that_the_user_merged_is_not_added_twice(engine):
    model = adapted()
    sync = WeightSync(engine, model, max_lag=1)
    sync.sync(0)
    model.merge_adapter()
    assert sync.sync(1).canary_diff < 1e-4
    model.unmerge_adapter()
    shake(model)
    assert sync.sync(2).canary_diff < 1e-4


def test_the_ranks_and_scalings_of_layers_may_differ(engine):
    model = adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3}, use_rslora=True)
    assert WeightSync(engine, model, max_lag=1).sync(0).canary_diff < 1e-4


def test_a_base_that_is_given_another_storage_is_copied_from_there_on(room, caplog):
    engine, model = room(), adapted()
    sync = WeightSync(engine, model)
    sync.sync(0)
    for parameter in bases(model).values():
        parameter.data = parameter.data.clone()
    shake(model)
    report = sync.sync(1)
    assert "from here on weights are copied" in caplog.text
    assert (report.mode, report.canary_diff < 1e-4) == ("adapter", True)


@pytest.mark.parametrize(
    ("changes", "max_lora_rank", "said"),
    [
        ({}, 0, r"the engine keeps no adapters \(VLLMEngine\(max_lora_rank=\.\.\.\) does\)"),
        ({"r": 9}, 8, "has an adapter of rank 9, and the engine takes at most 8"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, 8, r"embed_tokens\.weight is adapted as .* Embedding"),
    ],
    ids=["no room", "rank", "embedding"],
)
def test_an_adapter_that_cannot_be_kept_apart_is_merged_unless_that_was_asked_for(room, changes, max_lora_rank, said):
    engine, model = room(max_lora_rank=max_lora_rank), adapted(**changes)
    with pytest.raises(ConfigError, match=rf"sync_mode='adapter' cannot be used: .*{said}"):
        WeightSync(engine, model, mode="adapter")
    assert WeightSync(engine, model).sync(0).mode == "copy"


def test_a_policy_without_an_adapter_has_none_to_hand_over(room):
    with pytest.raises(ConfigError, match="sync_mode='adapter' cannot be used: the policy has no LoRA adapter"):
        WeightSync(room(), base(), mode="adapter")
    assert WeightSync(room(), base()).sync(0).mode == "share"


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_an_adapter_with_a_bias_is_refused(room):
    model = adapted(lora_bias=True, init_lora_weights=True)
    with pytest.raises(ConfigError, match="has an adapter with a bias"):
        WeightSync(room(), model, mode="adapter")


def test_two_adapters_at_once_are_merged(room):
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=EVERYWHERE))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="has 2 active adapters"):
        WeightSync(room(), model, mode="adapter")
    assert WeightSync(room(), model).sync(0).mode == "copy"


def test_a_second_adapter_that_is_switched_on_during_the_run_stops_it(room):
    model = adapted()
    sync = WeightSync(room(), model)
    sync.sync(0)
    model.add_adapter("second", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=EVERYWHERE))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(WeightSyncError, match=r"changed after the first sync: .* has 2 active adapters"):
        sync.sync(1)


def test_an_engine_with_room_for_adapters_is_not_loaded_again(room):
    with pytest.raises(ConfigError, match="sync_mode='reload' cannot be used: an engine with room for adapters"):
        WeightSync(room(), base(), mode="reload")
