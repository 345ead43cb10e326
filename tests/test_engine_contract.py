"""The fake engine and vLLM, held to one contract: what a colocated engine must do, and what it must leave alone."""

import os
import queue
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gym.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    RequestAbortedError,
    WeightSyncError,
)
from lightning_gym.lm_head import use_float32_head
from lightning_gym.policy.engine import EngineModel, Generation, SamplingParams
from lightning_gym.policy.vllm_engine import VLLMEngine
from lightning_gym.sync import WeightSync
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer
from lightning_gym.weights import checkpoint_weights, named_weights

PROMPT = [5, 9, 13, 21, 34, 55]
ENGINES = [pytest.param("fake"), pytest.param("vllm", marks=pytest.mark.vllm)]


def save_untrained(directory, *, tied):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    model = tiny_model(tokenizer, tie_word_embeddings=tied, num_layers=2, hidden_size=64)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    return model


def engine_model(directory, model):
    return EngineModel(path=directory, dtype="float32", weights=lambda: checkpoint_weights(model))


@pytest.fixture(scope="module", params=ENGINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def started(kind, request, tmp_path_factory):
    """An engine with a model's weights as version 0, paused; the model; and how engines of this kind are made."""
    directory = tmp_path_factory.mktemp("model")
    model = save_untrained(directory, tied=request.param)
    engine = make(kind)
    engine.start(engine_model(directory, model))
    sync = WeightSync(engine, model, mode="copy")
    sync.sync(0)
    yield engine, model, sync
    engine.close()


def make(kind):
    return FakeEngine(max_model_len=64) if kind == "fake" else VLLMEngine(max_model_len=64, max_num_seqs=32)


def sampling(**changes):
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 8, "seed": 1, "stop_token_ids": ()}
    return SamplingParams(**(values | changes))


def generate(engine, prompts, params, *, timeout_s=60.0):
    """Results in the order of `prompts`."""
    results = {}
    done = threading.Event()

    def deliver(index, result):
        results[index] = result
        if len(results) == len(prompts):
            done.set()

    engine.resume()
    for index, prompt in enumerate(prompts):
        request_id = f"{time.monotonic_ns()}-{index}"
        engine.generate(request_id, prompt, params[index], lambda result, i=index: deliver(i, result))
    assert done.wait(timeout_s), f"{len(results)} of {len(prompts)} arrived"
    engine.pause()
    return [results[index] for index in range(len(prompts))]


def trainer_logprobs(model, prompt, generation, temperature=1.0):
    ids = torch.tensor([[*prompt, *generation.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    chosen = torch.tensor(generation.token_ids)
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trainer_at_the_same_temperature(started, temperature):
    engine, model, _ = started
    params = [sampling(seed=seed, temperature=temperature) for seed in range(12)]
    for generation in generate(engine, [PROMPT] * 12, params):
        expected = trainer_logprobs(model, PROMPT, generation, temperature)
        assert (expected - torch.tensor(generation.logprobs)).abs().max() < 1e-4
        assert generation.weight_version == engine.weight_version


def test_after_a_sync_every_engine_tensor_is_the_trainers_bit_for_bit(started):
    engine, model, sync = started
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    report = sync.sync(engine.weight_version + 1)
    views = engine.weight_views()
    trained = dict(named_weights(model))
    assert views.keys() == trained.keys()
    assert all(torch.equal(views[name], tensor) for name, tensor in trained.items())
    assert report.num_bytes == sum(tensor.numel() * 4 for tensor in trained.values())
    assert report.canary_diff < 1e-4
    generation = generate(engine, [PROMPT], [sampling()])[0]
    assert (trainer_logprobs(model, PROMPT, generation) - torch.tensor(generation.logprobs)).abs().max() < 1e-4


def test_a_hundred_syncs_leave_no_memory_behind(started):
    engine, _, sync = started
    version = engine.weight_version
    for _ in range(5):
        sync.sync(version := version + 1)
    before = resident_bytes()
    for _ in range(100):
        sync.sync(version := version + 1)
    assert resident_bytes() - before < 8 << 20
    assert engine.weight_version == version


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_greedy_text_after_a_sync_is_that_of_a_fresh_engine_with_these_weights(started, kind, tmp_path):
    engine, model, sync = started
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    sync.sync(engine.weight_version + 1)
    greedy = sampling(temperature=0.0, max_tokens=16)
    synced = generate(engine, [PROMPT], [greedy])[0]
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        for _ in range(16):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert synced.token_ids == ids[0, len(PROMPT) :].tolist()


def test_the_canary_notices_any_single_tensor_that_was_forgotten(started):
    engine, model, sync = started
    version = engine.weight_version
    for name in [name for name, _ in named_weights(model)]:
        version += 1
        view = engine.weight_views()[name]
        kept = view.clone()
        noise = torch.randn(view.shape, generator=torch.Generator().manual_seed(version))
        engine.update_weights(lambda view=view, noise=noise: view.add_(0.5 * noise), version=version)
        assert sync._canary.difference() > 1e-3, name
        engine.update_weights(lambda view=view, kept=kept: view.copy_(kept), version=version)
    assert sync._canary.difference() < 1e-4


def test_a_turn_ends_with_its_stop_id_and_only_then_says_stop(started):
    engine, _, _ = started
    free = generate(engine, [PROMPT], [sampling(seed=5)])[0]
    assert (free.finish_reason, len(free.token_ids), len(free.logprobs)) == ("length", 8, 8)
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    stopped = generate(engine, [PROMPT], [sampling(seed=5, stop_token_ids=(stop,))])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]


def test_the_same_seed_samples_the_same_tokens_whatever_else_is_decoded(started):
    engine, _, _ = started
    alone = generate(engine, [PROMPT], [sampling(seed=11)])[0]
    crowd = generate(engine, [PROMPT] * 9, [sampling(seed=seed) for seed in (3, 4, 5, 6, 11, 7, 8, 9, 10)])
    assert crowd[4].token_ids == alone.token_ids
    assert len({tuple(generation.token_ids) for generation in crowd}) > 5


def test_nothing_is_sampled_while_the_engine_is_paused(started):
    engine, _, _ = started
    arrived = threading.Event()
    engine.generate("held", PROMPT, sampling(), lambda result: arrived.set())
    assert not arrived.wait(0.3)
    engine.resume()
    assert arrived.wait(30)
    engine.pause()


def test_a_pause_tells_whoever_waits_that_the_request_was_aborted(started):
    engine, _, _ = started
    results = queue.SimpleQueue()
    engine.generate("held", PROMPT, sampling(), results.put)
    engine.pause()
    assert isinstance(results.get(timeout=30), RequestAbortedError)
    assert isinstance(generate(engine, [PROMPT], [sampling()])[0], Generation)
    assert results.empty()


def test_an_aborted_request_is_never_delivered(started):
    engine, _, _ = started
    results = []
    engine.generate("gone", PROMPT, sampling(), results.append)
    engine.abort("gone")
    kept = generate(engine, [PROMPT], [sampling()])[0]
    assert isinstance(kept, Generation)
    assert results == []


def test_a_prompt_without_room_is_refused_and_the_engine_goes_on(started):
    engine, _, _ = started
    refused, served = generate(engine, [[7] * 200, PROMPT], [sampling(), sampling()])
    assert isinstance(refused, Exception)
    assert isinstance(served, Generation)


def test_weights_are_not_taken_while_requests_may_run(started):
    engine, _, _ = started
    engine.resume()
    with pytest.raises(WeightSyncError):
        engine.update_weights(lambda: None, version=99)
    engine.pause()
    assert engine.weight_version != 99


def test_an_engine_without_weights_cannot_be_resumed_and_a_closed_one_answers_with_an_error(kind, tmp_path):
    model = save_untrained(tmp_path, tied=True)
    engine = make(kind)
    engine.start(engine_model(tmp_path, model))
    with pytest.raises(WeightSyncError):
        engine.resume()
    engine.close()
    engine.close()
    results = []
    engine.generate("late", PROMPT, sampling(), results.append)
    assert isinstance(results[0], EngineDeadError)


def test_a_closed_engine_starts_again_with_the_weights_of_then_and_a_running_one_is_refused(kind, tmp_path):
    model = save_untrained(tmp_path, tied=True)
    engine = make(kind)
    params = [sampling(seed=seed) for seed in range(4)]
    try:
        for start in (0, 1):
            with torch.no_grad():
                model.model.norm.weight.mul_(1 + 0.5 * start)
            engine.start(engine_model(tmp_path, model))
            assert engine.weight_version is None, "none of an earlier life"
            with pytest.raises(EngineStartError, match="runs already"):
                engine.start(engine_model(tmp_path, model))
            WeightSync(engine, model, mode="copy").sync(start)
            for generation in generate(engine, [PROMPT] * 4, params):
                expected = trainer_logprobs(model, PROMPT, generation)
                assert (expected - torch.tensor(generation.logprobs)).abs().max() < 1e-4
                assert generation.weight_version == start
            engine.close()
    finally:
        engine.close()


def test_an_engine_that_cannot_sleep_says_so_and_goes_on(started):
    engine, _, sync = started
    assert not engine.can_sleep
    assert engine.asleep == frozenset()
    with pytest.raises(EngineError, match="cannot sleep"):
        engine.sleep(weights=False)
    engine.wake_up("weights")
    sync.rest()
    sync.wake()
    (result,) = generate(engine, [PROMPT], [sampling()])
    assert isinstance(result, Generation)


def test_a_model_that_cannot_be_built_is_an_error_that_names_it(kind, tmp_path):
    engine = make(kind)
    with pytest.raises(EngineStartError, match=str(tmp_path)):
        engine.start(EngineModel(path=tmp_path, dtype="float32", weights=lambda: iter(())))
    engine.close()


def test_the_trainers_world_is_intact_after_build_and_shutdown(kind, tmp_path):
    model = save_untrained(tmp_path, tied=True)
    trainers_own = not torch.distributed.is_initialized()  # else vLLM made one, for the engine that is still up
    if trainers_own:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002  the generator that vLLM seeds
        torch.manual_seed(1)
        before = world()
        engine = make(kind)
        engine.start(engine_model(tmp_path, model))
        assert world() == before
        engine.close()
        assert world() == before
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
        assert value.item() == 1
    finally:
        if trainers_own:
            torch.distributed.destroy_process_group()


def world():
    """What building an engine could change."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch": torch.random.get_rng_state().tolist(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "environment": dict(os.environ),
        "default dtype": torch.get_default_dtype(),
        "process group": torch.distributed.is_initialized(),
    }


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_an_engine_over_several_of_the_trainers_ranks_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=rf"{name}=2.*the same requests in the same order.*one whole engine a rank"):
        VLLMEngine(engine_args={name: 2})
    VLLMEngine(engine_args={name: 1})


@pytest.mark.vllm
def test_vllm_computes_the_head_of_a_bfloat16_model_in_float32_if_asked(tmp_path):
    model = save_untrained(tmp_path, tied=False).bfloat16()
    use_float32_head(model)
    tokens = list(range(5, 37))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    found = {}
    for head_dtype in (None, "float32"):
        engine = VLLMEngine(max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=8 << 20, head_dtype=head_dtype)
        engine.start(EngineModel(path=tmp_path, dtype="bfloat16", weights=lambda: checkpoint_weights(model)))
        try:
            engine.update_weights(lambda: None, version=0)
            found[head_dtype] = torch.tensor(engine.prompt_logprobs(tokens))
        finally:
            engine.close()
    assert (found["float32"] - expected).abs().max() < 2e-2
    assert not torch.equal(found["float32"], found[None])


@pytest.mark.vllm
def test_an_engine_whose_head_stays_in_another_dtype_is_refused(tmp_path, monkeypatch):
    from vllm.config import ModelConfig

    monkeypatch.setattr(ModelConfig, "head_dtype", property(lambda self: self.dtype))  # as 0.25.1 answers
    model = save_untrained(tmp_path, tied=True).bfloat16()
    engine = VLLMEngine(max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=8 << 20, head_dtype="float32")
    with pytest.raises(EngineStartError, match="computes the LM head in bfloat16"):
        engine.start(EngineModel(path=tmp_path, dtype="bfloat16", weights=lambda: checkpoint_weights(model)))


def test_generating_seeded_requests_leaves_the_global_generators_to_the_trainer(started):
    engine, _, _ = started
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    generate(engine, [PROMPT, PROMPT[:3]], [sampling(), sampling()])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # noqa: NPY002


def test_a_live_engine_is_found_alive(started):
    started[0].check_alive()
