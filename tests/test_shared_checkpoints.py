"""A Trainer whose weights are the engine's: checkpoints, resuming, saving, and what the callback's setting does."""

import random
from dataclasses import replace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.errors import ConfigError, WeightSyncError
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "varied_rewards")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=32, num_kv_heads=1, num_layers=1).save_pretrained(directory)
    return directory


@pytest.fixture
def varied_rewards(monkeypatch):
    """A reward that differs inside a group, so that an untrained policy has something to learn."""

    def verify(self, response):
        return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)

    monkeypatch.setattr(Counter, "verify", verify)


def fit(model_dir, run_dir, *, steps, engine=None, gym=None, sync_mode="auto", ckpt_path=None, callbacks=()):
    callback = GymCallback(
        engine=engine or FakeEngine(max_model_len=96),
        gym=gym or FakeGym(["counter"], max_steps=2),
        sampling=SamplingProfile(max_output_tokens=4),
        sync_mode=sync_mode,
        run_dir=run_dir,
    )
    rng = random.Random(0)
    data = GymDataModule([Counter.row(rng) for _ in range(4)], prompts_per_step=2, group_size=2)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[callback, ModelCheckpoint(run_dir, every_n_train_steps=1, save_top_k=-1), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    policy = PolicyModule(model_dir, lr=1e-2)
    trainer.fit(policy, datamodule=data, ckpt_path=ckpt_path)
    return policy, callback


def parameters(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def test_sharing_copying_and_reloading_train_the_same_policy(model_dir, tmp_path):
    trained = {}
    for mode in ("share", "copy", "reload"):
        policy, callback = fit(model_dir, tmp_path / mode, steps=3, sync_mode=mode)
        trained[mode] = parameters(policy)
        whole = sum(parameter.nbytes for parameter in policy.model.parameters())
        assert [entry["sync/bytes"] for entry in callback.history] == [whole, *([0 if mode == "share" else whole] * 2)]
        assert all(entry["sync/canary_diff"] < 1e-4 for entry in callback.history)
        assert all(entry["sync/canary_s"] > 0 for entry in callback.history)
    for mode in ("copy", "reload"):
        assert all(torch.equal(tensor, trained["share"][name]) for name, tensor in trained[mode].items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the run that is resumed
def test_a_run_with_shared_weights_is_checkpointed_resumed_and_saved_as_any_other(model_dir, tmp_path):
    whole, _ = fit(model_dir, tmp_path / "whole", steps=4, sync_mode="share")
    fit(model_dir, tmp_path / "cut", steps=2, sync_mode="share")
    checkpoint = next((tmp_path / "cut").glob("*step=2.ckpt"))
    policy, callback = fit(model_dir, tmp_path / "cut", steps=4, sync_mode="share", ckpt_path=checkpoint)
    assert [entry["sync/bytes"] > 0 for entry in callback.history] == [True, False]
    assert parameters(policy).keys() == parameters(whole).keys()
    assert all(torch.equal(tensor, parameters(whole)[name]) for name, tensor in parameters(policy).items())
    held = torch.load(next((tmp_path / "cut").glob("*step=4.ckpt")), weights_only=True)["state_dict"]
    for name, tensor in parameters(policy).items():
        assert torch.equal(held[f"model.{name}"], tensor)


def test_after_the_fit_the_policy_has_tensors_of_its_own(model_dir, tmp_path):
    policy, _ = fit(model_dir, tmp_path / "run", steps=1, sync_mode="share")
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in policy.model.parameters())
    policy.model.save_pretrained(tmp_path / "saved")
    again = PolicyModule(tmp_path / "saved")
    assert all(torch.equal(tensor, parameters(policy)[name]) for name, tensor in parameters(again).items())


class Averaging(L.Callback):
    """Swaps other weights in by exchanging storages, and leaves them there."""

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        for parameter in pl_module.model.parameters():
            parameter.data = parameter.data.clone()


def test_a_callback_that_swaps_storages_stops_a_run_that_insists_on_sharing(model_dir, tmp_path):
    with pytest.raises(WeightSyncError, match="were given another storage than the engine's"):
        fit(model_dir, tmp_path / "share", steps=2, sync_mode="share", callbacks=[Averaging()])
    _, callback = fit(model_dir, tmp_path / "auto", steps=3, callbacks=[Averaging()])
    assert all(entry["sync/bytes"] > 0 for entry in callback.history)


class Meddling(FakeEngine):
    """Has somebody train while it samples."""

    def resume(self):
        super().resume()
        self.shared.add_(0.01)


def test_weights_that_change_during_a_collection_stop_a_run_that_shares_them(model_dir, tmp_path):
    class Training(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            engine.shared = pl_module.model.model.norm.weight.detach()

    engine = Meddling(max_model_len=96)
    with pytest.raises(WeightSyncError, match="changed after version 0 was synced"):
        fit(model_dir, tmp_path, steps=1, engine=engine, sync_mode="share", callbacks=[Training()])


def test_a_precision_that_cannot_share_is_refused_before_a_rollout(model_dir, tmp_path):
    class Rounding(FakeEngine):
        """Computes in bfloat16, whatever it is asked for."""

        def start(self, model):
            super().start(replace(model, dtype="bfloat16"))

    gym = FakeGym(["counter"])
    with pytest.raises(ConfigError, match=r"torch\.float32 on cpu in the trainer and torch\.bfloat16 on cpu"):
        fit(model_dir, tmp_path, steps=1, engine=Rounding(max_model_len=96), gym=gym, sync_mode="share")
    assert gym.num_runs == 0
