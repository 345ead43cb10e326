"""Every rung of the ladder on the fake engine and on vLLM: bit-exact, heard by the next generation, without leaks."""

import ctypes
import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_gym.errors import ConfigError, WeightSyncError
from lightning_gym.policy.engine import EngineModel, SamplingParams
from lightning_gym.policy.vllm_engine import VLLMEngine
from lightning_gym.sync import WeightSync
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer
from lightning_gym.weights import checkpoint_weights, named_weights

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["share", "copy", "reload"]
PROMPT = [3 + 7 * i % 200 for i in range(150)]  # longer than a block of vLLM's cache on CPU, which is 128 tokens


@pytest.fixture(scope="module", params=[pytest.param("fake"), pytest.param("vllm", marks=pytest.mark.vllm)])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=["tied-float32", "untied-float32", "tied-bfloat16", "untied-bfloat16"])
def started(kind, request, tmp_path_factory):
    """A paused engine and the model it was started from."""
    tied, _, dtype = request.param.partition("-")
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    model = tiny_model(tokenizer, tie_word_embeddings=tied == "tied", num_layers=2, hidden_size=64)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    for parameter in model.parameters():  # not `model.to`, which would round the rotary frequencies as well
        parameter.data = parameter.data.to(getattr(torch, dtype))
    engine = FakeEngine(max_model_len=192) if kind == "fake" else VLLMEngine(max_model_len=192, max_num_seqs=4)
    engine.start(EngineModel(path=directory, dtype=dtype, weights=lambda: checkpoint_weights(model)))
    yield engine, model
    engine.close()


@pytest.fixture
def sync_by(started):
    """Makes a sync in a mode, from the model's first weights on, and gives the model its own tensors back."""
    made = []
    _, model = started
    fresh = tiny_model(
        tiny_tokenizer(), tie_word_embeddings=model.config.tie_word_embeddings, num_layers=2, hidden_size=64
    )
    model.load_state_dict(fresh.state_dict())

    def make(mode):
        made.append(WeightSync(*started, mode=mode))
        return made[-1]

    yield make
    for sync in made:
        sync.close()


def shake(model, seed, *, by=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def equal(views, model):
    trained = dict(named_weights(model))
    return views.keys() == trained.keys() and all(torch.equal(views[name], tensor) for name, tensor in trained.items())


def greedy(engine):
    """Eight tokens after the prompt, and their logprobs."""
    arrived, results = threading.Event(), []
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=8, seed=0, stop_token_ids=())
    engine.resume()
    engine.generate(f"{time.monotonic_ns()}", PROMPT, params, lambda result: (results.append(result), arrived.set()))
    assert arrived.wait(60)
    engine.pause()
    return results[0]


def trainer_logprobs(model, token_ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *token_ids]]), use_cache=False).logits[0].float()
    return logits[len(PROMPT) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("mode", MODES)
def test_after_a_sync_the_engine_holds_and_samples_from_exactly_the_trainers_weights(started, sync_by, mode):
    engine, model = started
    sync = sync_by(mode)
    exact = next(model.parameters()).dtype == torch.float32
    whole = sum(tensor.nbytes for _, tensor in named_weights(model))
    before = None
    for version in range(3):
        shake(model, version)
        report = sync.sync(version)
        assert equal(engine.weight_views(), model)
        assert (report.mode, report.version, engine.weight_version) == (mode, version, version)
        assert report.num_bytes == (0 if version and mode == "share" else whole)
        assert report.canary_diff < (1e-4 if exact else 0.1)
        generation = greedy(engine)
        logprobs = trainer_logprobs(model, generation.token_ids)
        chosen = logprobs.gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert (chosen - torch.tensor(generation.logprobs)).abs().max() < (1e-4 if exact else 0.2)
        assert generation.weight_version == version
        assert generation.token_ids != before, "the weights changed by a tenth: so does the text"
        before = generation.token_ids
        sync.check_unchanged()


def test_one_engine_may_climb_down_and_up_the_ladder(started, sync_by):
    engine, model = started
    for version, mode in enumerate(["reload", "copy", "share", "reload", "share", "copy"]):
        sync = sync_by(mode)
        shake(model, version)
        sync.sync(version)
        assert equal(engine.weight_views(), model)
        sync.close()
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


@pytest.mark.vllm  # the fake's as well: seconds
@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_syncs_leave_no_memory_and_no_tensor_behind(started, sync_by, mode):
    sync = sync_by(mode)
    for version in range(20):
        sync.sync(version)
    tensors = num_tensors()
    growths = []
    for start in (20, 220, 420):  # what leaks grows every time; blocks that fall otherwise in a full heap do not
        num_bytes = resident_bytes()
        for version in range(start, start + 200):
            sync.sync(version)
        assert num_tensors() <= tensors
        growths.append(resident_bytes() - num_bytes)
        if growths[-1] < 8 << 20:
            break
    assert min(growths) < 8 << 20


def resident_bytes():
    """Without freed blocks that glibc keeps: their number depends on the tests that ran before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_tensors():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_an_optimizer_step_on_shared_weights_needs_a_sync_before_the_next_rollout(started, sync_by):
    engine, model = started
    sync = sync_by("share")
    sync.sync(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(3, 40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    with pytest.raises(WeightSyncError, match="changed after version 0"):
        sync.check_unchanged()
    report = sync.sync(1)
    assert report.num_bytes == 0
    assert equal(engine.weight_views(), model)
    generation = greedy(engine)
    difference = (
        trainer_logprobs(model, generation.token_ids).max(-1).values - torch.tensor(generation.logprobs)
    ).abs()
    assert difference.max() < (1e-4 if next(model.parameters()).dtype == torch.float32 else 0.2)


def test_a_sync_leaves_the_trainers_random_numbers_alone(started, sync_by):
    state = torch.random.get_rng_state()
    sync_by("copy").sync(0)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- LoRA


@pytest.fixture(params=["lora", "all linear layers", "rank-stabilised, two adapters"])
def adapted(started, request):
    """The started model with PEFT's adapters on it, taken off again afterwards."""
    import peft

    _, model = started
    fresh = tiny_model(
        tiny_tokenizer(), tie_word_embeddings=model.config.tie_word_embeddings, num_layers=2, hidden_size=64
    )
    model.load_state_dict(fresh.state_dict())
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}
    if request.param == "lora":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], **options))
    else:
        options["target_modules"] = "all-linear"
        options["use_rslora"] = "two" in request.param
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
        if "two" in request.param:
            wrapped.add_adapter("other", peft.LoraConfig(**options))
            wrapped.base_model.set_adapter(["default", "other"])
    yield wrapped
    wrapped.unload()
    model.requires_grad_(True)


@pytest.mark.parametrize("mode", ["copy", "reload"])
def test_adapters_reach_the_engine_merged_and_only_their_layers_move_again(started, adapted, mode):
    engine, model = started
    exact = next(model.parameters()).dtype == torch.float32
    frozen = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters() if "lora_" not in name}
    num_adapted = sum("base_layer" in name for name in frozen)
    sync = WeightSync(engine, adapted, mode=mode)
    for version in range(3):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.1)
        report = sync.sync(version)
        assert equal(engine.weight_views(), adapted)
        assert report.canary_diff < (1e-4 if exact else 0.2)
        whole = len(engine.weight_views())
        assert report.num_tensors == (num_adapted if version and mode == "copy" else whole)
    assert any(
        not torch.equal(engine.weight_views()[name.removeprefix("base_model.model.").replace(".base_layer", "")], value)
        for name, value in frozen.items()
        if "base_layer" in name
    ), "the engine has more than the base"
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in adapted.named_parameters() if name in frozen)


def test_a_model_with_adapters_cannot_be_shared_and_auto_copies(started, adapted):
    engine, _ = started
    with pytest.raises(ConfigError, match=r"has a LoRA adapter"):
        WeightSync(engine, adapted, mode="share")
    assert WeightSync(engine, adapted).sync(9).mode == "copy"


# -- what only vLLM can do wrong


vllm_only = pytest.mark.parametrize(
    "kind", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True, scope="module"
)


@pytest.fixture
def layer(started):
    from lightning_gym.policy import vllm_weights

    engine, _ = started
    return vllm_weights.driver_model(engine._engine).get_submodule("model.layers.1.mlp.down_proj")


@vllm_only
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_whose_weight_was_replaced_stops_the_run(started, sync_by, layer, mode):
    sync = sync_by(mode)
    sync.sync(0)
    kept, linear = layer.weight, layer.cpu_linear
    layer.weight = nn.Parameter(kept.data.as_subclass(torch.Tensor).clone(), requires_grad=False)
    try:
        with pytest.raises(WeightSyncError, match=r"model\.layers\.1\.mlp\.down_proj"):
            sync.sync(1)
    finally:
        layer.weight, layer.cpu_linear = kept, linear


@vllm_only
@pytest.mark.parametrize("mode", ["share", "copy"])
def test_a_layer_that_computes_with_a_private_copy_stops_the_run(started, sync_by, layer, mode):
    sync = sync_by(mode)
    sync.sync(0)
    kept = layer.cpu_linear
    private = kept.weight.clone()
    layer.cpu_linear = lambda x, _weight, bias: nn.functional.linear(x, private, bias)
    try:
        with pytest.raises(WeightSyncError, match=r"model\.layers\.1\.mlp\.down_proj with a private copy"):
            sync.sync(1)
    finally:
        layer.cpu_linear = kept


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_not_loaded(started, name):
    engine, model = started

    def load():
        engine.load_weights(item for item in checkpoint_weights(model) if item[0] != name)

    with pytest.raises(WeightSyncError, match=name.replace(".", r"\.")):
        engine.update_weights(load, version=50)
    assert engine.weight_version != 50
    WeightSync(engine, model, mode="copy").sync(51)


@vllm_only
def test_an_engine_loads_weights_only_while_it_is_being_updated(started):
    engine, model = started
    with pytest.raises(WeightSyncError, match="inside the `write`"):
        engine.load_weights(checkpoint_weights(model))
