"""An engine's memory is the trainer's while it trains, and comes back in the one order that loses nothing."""

import random
import threading
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.errors import EngineError
from lightning_gym.gym.environments import Counter
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.vllm_engine import VLLMEngine
from lightning_gym.rollout import SamplingProfile
from lightning_gym.sync import WeightSync
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer
from lightning_gym.weights import checkpoint_weights, named_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model_dir(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_model(tiny_tokenizer(), hidden_size=64, num_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fit(model_dir, run_dir, engine, *, sync_mode, **data):
    rng = random.Random(0)
    tasks = GymDataModule([Counter.row(rng) for _ in range(4)], prompts_per_step=2, group_size=2, **data)
    gym = GymCallback(
        engine=engine,
        gym=FakeGym(max_steps=2),
        sync_mode=sync_mode,
        sampling=SamplingProfile(max_output_tokens=4),
        run_dir=run_dir,
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=2, accumulate_grad_batches=2, enable_model_summary=False, callbacks=[gym], **options)
    trainer.fit(PolicyModule(model_dir, lr=1e-2), datamodule=tasks)
    return gym


ORDER = {
    "copy": ["pause", "sleep:weights", "wake:weights", "update:1", "wake:kv_cache", "resume"],
    "share": ["pause", "sleep:kv_cache", "update:1", "wake:kv_cache", "resume"],
    "reload": ["pause", "sleep:weights", "wake:weights", "update:1", "wake:kv_cache", "resume"],
}


@pytest.mark.parametrize("sync_mode", ORDER)
def test_weights_wake_before_they_are_written_and_the_cache_only_afterwards(model_dir, tmp_path, sync_mode):
    engine = FakeEngine(max_model_len=96, can_sleep=True)
    gym = fit(model_dir, tmp_path / "run", engine, sync_mode=sync_mode)
    events = engine.events
    first = events.index("update:0")
    assert events[first : first + 2] == ["update:0", "resume"], "nothing sleeps before the first collection"
    assert events[first + 2 : first + 2 + len(ORDER[sync_mode])] == ORDER[sync_mode], "once for two micro-batches"
    assert events[-3:] == ["pause", ORDER[sync_mode][1], "close"]
    assert all(entry["sync/canary_diff"] < 1e-4 for entry in gym.history)


def test_a_second_round_of_a_collection_has_its_weights_again(model_dir, tmp_path, monkeypatch):
    num_verified = 0

    def equal_at_first(self, response):
        nonlocal num_verified
        num_verified += 1
        return 1.0 if num_verified <= 4 else float(num_verified)

    monkeypatch.setattr(Counter, "verify", equal_at_first)
    engine = FakeEngine(max_model_len=96, can_sleep=True)
    gym = fit(model_dir, tmp_path / "run", engine, sync_mode="copy", zero_variance="resample")
    assert [entry["rollout/count"] for entry in gym.history] == [8, 4]
    again = ["pause", "sleep:weights", "wake:weights", "update:0", "wake:kv_cache", "resume", "pause", "sleep:weights"]
    first = engine.events.index("pause")
    assert engine.events[first : first + len(again)] == again


def test_an_engine_that_cannot_sleep_is_not_asked_to(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=96)
    fit(model_dir, tmp_path / "run", engine, sync_mode="copy")
    assert not [event for event in engine.events if event.startswith(("sleep", "wake"))]


def started(model_dir, model):
    engine = FakeEngine(max_model_len=96, can_sleep=True)
    engine.start(EngineModel(path=model_dir, dtype="float32", weights=lambda: checkpoint_weights(model)))
    return engine


@pytest.mark.parametrize("mode", ["copy", "reload"])
def test_after_their_sleep_all_weights_are_written_frozen_ones_as_well(model_dir, mode):
    model = tiny_model(tiny_tokenizer(), hidden_size=64, num_layers=1)
    model.model.embed_tokens.requires_grad_(False)
    engine = started(model_dir, model)
    sync = WeightSync(engine, model, mode=mode)
    count = len(list(model.parameters()))
    assert sync.sync(0).num_tensors == count
    sync.rest()
    assert engine.asleep == {"kv_cache", "weights"}
    assert sync.sync(1).num_tensors == count
    assert all(torch.equal(engine.weight_views()[name], tensor) for name, tensor in named_weights(model))
    assert not engine.asleep
    engine.close()


def test_nothing_is_generated_while_a_part_sleeps(model_dir):
    model = tiny_model(tiny_tokenizer(), hidden_size=64, num_layers=1)
    engine = started(model_dir, model)
    sync = WeightSync(engine, model, mode="share")
    sync.sync(0)
    sync.rest()
    with pytest.raises(EngineError, match="resumed while its kv_cache slept"):
        engine.resume()
    sync.wake()
    engine.resume()
    with pytest.raises(EngineError, match="put to sleep while it runs"):
        sync.rest()
    engine.close()


# -- what vLLM is asked, in which order: on a stand-in for it, because it sleeps on CUDA only


class Recorded:
    """vLLM 0.32's `LLMEngine`, as far as sleeping goes."""

    def __init__(self):
        self.calls = []

    def sleep(self, level=1, mode="abort"):
        self.calls.append(f"sleep {level}")

    def release_kv_cache_memory(self):
        assert self.calls[-1] == "sleep 0", "vLLM refuses it unless its scheduler is paused"
        self.calls.append("release_kv_cache_memory")

    def wake_up(self, tags=None):
        self.calls.append(f"wake {' '.join(tags)}")

    def has_unfinished_requests(self):
        return False

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True


def vllm_of(recorded, *, can_sleep=True):
    """A `VLLMEngine` whose thread is this one."""
    engine = VLLMEngine()
    engine._engine = recorded
    engine._thread = threading.current_thread()
    engine._can_sleep = can_sleep
    return engine


@pytest.mark.parametrize("weights", [True, False])
def test_vllm_drops_and_maps_memory_in_the_order_of_its_interface(weights):
    recorded = Recorded()
    engine = vllm_of(recorded)
    engine.sleep(weights=weights)
    engine.wake_up("weights")
    engine.update_weights(lambda: recorded.calls.append("write"), version=1)
    with pytest.raises(EngineError, match="kv_cache slept"):
        engine.resume()
    engine.wake_up("kv_cache")
    engine.wake_up("kv_cache")
    dropped = ["sleep 2", "wake weights"] if weights else ["sleep 0", "release_kv_cache_memory"]
    assert recorded.calls == [*dropped, "write", "reset_prefix_cache", "wake kv_cache"]
    engine.resume()
    with pytest.raises(EngineError, match="pause it first"):
        engine.sleep(weights=weights)


def test_a_vllm_that_cannot_release_its_cache_alone_keeps_it():
    recorded = SimpleNamespace()  # 0.25
    engine = vllm_of(recorded)
    engine.sleep(weights=False)
    assert not engine.asleep


def test_a_vllm_without_sleep_mode_says_how_to_switch_it_on():
    with pytest.raises(EngineError, match=r"cannot sleep.*CUDA.*'enable_sleep_mode': True"):
        vllm_of(Recorded(), can_sleep=False).sleep(weights=True)
