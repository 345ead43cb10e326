"""PolicyModule and the windows of a collection, all the way round with the fakes."""

import logging
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.errors import CollectionError, ConfigError, NotFiniteError, StalePolicyError
from lightning_gym.gym.environments import Counter
from lightning_gym.losses import grpo, reinforce
from lightning_gym.policy_checks import check_no_dropout, check_vocabulary
from lightning_gym.ranks import Ranks
from lightning_gym.reference import frozen, with_old_logprobs, with_ref_logprobs
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym, tiny_batch, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent


def rows(count):
    import random

    rng = random.Random(0)
    return [Counter.row(rng) for _ in range(count)]


def parts(model_dir, run_dir, *, module=None, data=None, trainer=None, engine=None):
    policy = (
        module if isinstance(module, L.LightningModule) else PolicyModule(model_dir, **({"lr": 1e-2} | (module or {})))
    )
    callback = GymCallback(
        engine=engine or FakeEngine(max_model_len=96),
        gym=FakeGym(["counter"], max_steps=2),
        sampling=SamplingProfile(max_output_tokens=5),
        model_path=model_dir,
        run_dir=run_dir,
    )
    options = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    datamodule = GymDataModule(**({"train": rows(7), "prompts_per_step": 2, "group_size": 3} | (data or {})))
    return policy, callback, datamodule, L.Trainer(callbacks=[callback], **(options | (trainer or {})))


def fit(*arguments, **changes):
    policy, callback, datamodule, trainer = parts(*arguments, **changes)
    trainer.fit(policy, datamodule=datamodule)
    return policy, callback, datamodule


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


# -- every objective trains


OBJECTIVES = {
    "penalised": {"correction": "token_tis", "kl_coefficient": 0.1, "entropy_coefficient": 0.01},
    "kl in reward": {"kl_coefficient": 0.1, "kl_in": "reward", "loss": "gspo_token"},
    "distillation": {"loss": "distillation"},
    "normalised": {"correction": "sequence_tis", "normalise_correction": True, "kl_coefficient": 0.1},
    "in ratio": {"correction": "in_ratio", "loss": "cispo"},
    "own function": {"loss": partial(grpo, clip=0.1, dual_clip=3.0)},
    "checkpointed": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.usefixtures("varied_rewards")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_and_reports_itself(model_dir, tmp_path, name):
    changes = OBJECTIVES[name]
    trainer = {"precision": "bf16-true"} if name == "bfloat16" else {}
    policy, callback, _ = fit(model_dir, tmp_path, module=changes, trainer={"accumulate_grad_batches": 2, **trainer})
    logged = callback.history[0]
    names = {"loss", "ratio_mean", "ratio_ess_frac", "weight_ess_frac", "out_of_band_frac", "ratio_p50"}
    names |= {"logprob_diff_max", "generator_kl", "token_mult_prob_error", "entropy_estimate"}
    names |= {"ref_kl"} if changes.get("kl_coefficient") else set()
    names |= {"entropy"} if changes.get("entropy_coefficient") else set()
    assert {f"train/{name}" for name in names} <= logged.keys()
    assert logged["batch/lag"] == 0
    assert 0 <= logged["batch/padding_waste_frac"] < 0.1
    if name != "bfloat16":
        assert logged["train/token_mult_prob_error"] < 1.001
        assert logged["train/ratio_ess_frac"] == pytest.approx(1, abs=1e-3)
    if name != "distillation":  # a student that is its own teacher has nothing to learn in its first step
        assert not torch.equal(
            weights_of(policy), weights_of(PolicyModule(model_dir, dtype=changes.get("dtype", "float32")))
        )


def test_the_objective_is_the_loss_of_the_corrected_batch_and_the_penalties_of_the_batch_as_it_came(model_dir):
    batch = replace(tiny_batch(advantage=0.5), ref_logprobs=torch.tensor([[0.0, -2.0]]))
    four_times = torch.tensor([[0.0, -1.0 + math.log(4)]], requires_grad=True)
    entropies = torch.tensor([[0.0, 0.7]])
    policy = PolicyModule(model_dir, correction="token_tis", kl_coefficient=0.1, entropy_coefficient=0.01)
    loss, values = policy.objective(four_times, entropies, batch)
    distance = -1.0 + math.log(4) + 2.0
    assert loss.item() == pytest.approx(2 * -0.5 + 0.1 * distance**2 / 2 - 0.01 * 0.7, rel=1e-5)
    assert values["weight_mean"].item() == pytest.approx(2)
    assert values["ratio_mean"].item() == pytest.approx(4)
    in_reward = PolicyModule(model_dir, correction="token_tis", kl_coefficient=0.1, kl_in="reward")
    loss, _ = in_reward.objective(four_times, None, batch)
    assert loss.item() == pytest.approx(2 * -(0.5 - 0.1 * distance), rel=1e-5)


def test_a_normalised_correction_is_scaled_before_the_window_trains(model_dir):
    policy = PolicyModule(model_dir, correction="token_tis", normalise_correction=True)
    window = [tiny_batch(old_logprob=-1 + math.log(2)), tiny_batch(old_logprob=-1 - math.log(2))]
    prepared = policy.prepare_window(window, Ranks())
    assert [batch.correction_scale for batch in prepared] == pytest.approx([2 / 2.5] * 2)
    plain = PolicyModule(model_dir, correction="token_tis").prepare_window(window, Ranks())
    assert [batch.correction_scale for batch in plain] == [1, 1]


@pytest.mark.usefixtures("varied_rewards")
def test_a_model_in_bfloat16_gets_its_batches_in_float32(model_dir, tmp_path):
    seen = []

    class Watching(PolicyModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    policy, *_ = fit(
        model_dir, tmp_path, module=Watching(model_dir), trainer={"precision": "bf16-true", "max_steps": 1}
    )
    assert policy.model.dtype == torch.bfloat16
    assert {seen[0].loss_weight.dtype, seen[0].advantages.dtype, seen[0].rollout_logprobs.dtype} == {torch.float32}


@pytest.mark.usefixtures("varied_rewards")
def test_mixed_precision_clipping_and_a_scheduler_of_ones_own_work_together(model_dir, tmp_path):
    seen = []

    def halving(optimizer):
        seen.append(optimizer)
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    policy, callback, _ = fit(
        model_dir,
        tmp_path,
        module={"lr": 0.1, "lr_scheduler": halving, "kl_coefficient": 0.1},
        trainer={"precision": "bf16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    )
    assert seen[0].param_groups[0]["lr"] == pytest.approx(0.025)
    assert len(callback.history) == 2
    assert policy.model.dtype == torch.float32


class Remembering(FakeEngine):
    """Keeps what it was started with."""

    def start(self, model):
        self.started_with = model
        super().start(model)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-true", "bfloat16"), ("bf16-mixed", "bfloat16")]
)
def test_the_engine_computes_in_what_the_trainers_forward_computes_in(model_dir, tmp_path, precision, dtype):
    engine = Remembering(max_model_len=96)
    policy, *_ = fit(model_dir, tmp_path, engine=engine, trainer={"precision": precision, "max_steps": 1})
    assert engine.started_with.dtype == dtype
    assert engine.started_with.trainer_bytes > 3 * policy.model.num_parameters() * policy.model.dtype.itemsize


def test_a_float32_head_is_the_policys_and_that_of_its_reference(model_dir):
    policy = PolicyModule(model_dir, dtype="bfloat16", head_dtype="float32", kl_coefficient=0.1)
    hidden = torch.ones(1, 32, dtype=torch.bfloat16)
    assert policy.model.lm_head(hidden).dtype == policy.reference.lm_head(hidden).dtype == torch.float32


def test_liger_that_is_not_installed_is_asked_for_by_name(model_dir):
    with pytest.raises(ConfigError, match=r"lightning-gym\[liger\]"):
        PolicyModule(model_dir, liger=True)


@pytest.mark.usefixtures("varied_rewards")
def test_gradient_checkpointing_changes_no_weight(model_dir, tmp_path):
    ends = []
    for flag in (False, True):
        policy, *_ = fit(model_dir, tmp_path / str(flag), module={"gradient_checkpointing": flag})
        assert policy.model.is_gradient_checkpointing == flag
        ends.append(weights_of(policy))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("varied_rewards")
def test_everything_at_once_does_not_depend_on_the_number_of_micro_batches(model_dir, tmp_path):
    changes = {
        "kl_coefficient": 0.3,
        "entropy_coefficient": 0.1,
        "correction": "token_tis",
        "normalise_correction": True,
    }

    class Plain(PolicyModule):
        # AdamW's first step is the sign of the gradient, in which rounding shows; SGD shows the gradient.
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    start = weights_of(PolicyModule(model_dir))
    moved, losses = [], []
    for accumulate in (1, 3):
        policy, callback, _ = fit(
            model_dir,
            tmp_path / str(accumulate),
            module=Plain(
                model_dir, ref_model=tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, seed=9), **changes
            ),
            trainer={"accumulate_grad_batches": accumulate, "max_steps": 1},
        )
        moved.append(weights_of(policy) - start)
        losses.append({name: value for name, value in callback.history[0].items() if name.startswith("train/")})
    assert ((moved[0] - moved[1]).norm() / moved[0].norm()).item() < 1e-5
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-4, abs=1e-6), name


# -- several updates a collection


@pytest.mark.usefixtures("varied_rewards")
def test_three_updates_share_one_collection_with_the_old_logprobs_of_its_start(model_dir, tmp_path):
    seen = []

    class Watching(PolicyModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    engine = FakeEngine(max_model_len=96)
    policy = Watching(model_dir, lr=1e-2)
    start = PolicyModule(model_dir).model.eval()
    _, callback, datamodule = fit(
        model_dir,
        tmp_path,
        module=policy,
        engine=engine,
        data={"updates_per_collection": 3, "train": rows(20)},
        trainer={"max_steps": 6},
    )
    assert [event for event in engine.events if event.startswith("update")] == ["update:0", "update:3"]
    assert [entry["batch/lag"] for entry in callback.history] == [0, 1, 2, 0, 1, 2]
    assert [entry["rollout/count"] for entry in callback.history] == [6.0] * 6
    assert datamodule.stream.cursor.position == 12
    assert all("time/collect_s" in entry for entry in (callback.history[0], callback.history[3]))
    for batch in seen[:3]:
        assert batch.weight_versions.max() == 0
        (expected,) = with_old_logprobs(start, [batch])
        torch.testing.assert_close(batch.old_logprobs, expected.old_logprobs, rtol=1e-4, atol=1e-5)
    assert sorted(groups_of(tmp_path)) == sorted(3 * list(range(12))), "every task once"


@pytest.mark.usefixtures("varied_rewards")
def test_a_run_resumed_inside_a_collection_goes_on_with_the_task_after_the_last_finished_update(model_dir, tmp_path):
    data = {"updates_per_collection": 3, "train": rows(20)}
    policy, callback, datamodule, trainer = parts(model_dir, tmp_path, data=data, trainer={"max_steps": 2})
    trainer.fit(policy, datamodule=datamodule)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert callback.finished_position(trainer.global_step) == 4
    policy, callback, datamodule, trainer = parts(model_dir, tmp_path, data=data, trainer={"max_steps": 3})
    trainer.fit(policy, datamodule=datamodule, ckpt_path=tmp_path / "half.ckpt")
    assert callback.history[0]["batch/lag"] == 0, "collected anew, with the weights of the checkpoint"
    assert callback.finished_position(trainer.global_step) == 6


@pytest.mark.usefixtures("varied_rewards")
def test_more_updates_of_lag_than_were_asked_for_are_refused(model_dir, tmp_path):
    policy, _, datamodule, trainer = parts(
        model_dir, tmp_path, data={"updates_per_collection": 2}, trainer={"max_steps": 3}
    )

    class Meddler(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                batch.weight_versions[batch.loss_mask] = 0

    trainer.callbacks.insert(0, Meddler())
    with pytest.raises(StalePolicyError, match="step 2 holds tokens sampled by weights of step 0"):
        trainer.fit(policy, datamodule=datamodule)


# -- groups without variance


@pytest.fixture
def every_other_group_is_equal(monkeypatch, varied_rewards):
    """Tasks whose count is even always get reward 1."""

    def verify(self, response):
        return 1.0 if self.task["initial_count"] % 2 == 0 else varied_rewards(self, response)

    monkeypatch.setattr(Counter, "verify", verify)


def alternating(count):
    """Tasks that are alternately equal and varied."""
    return [{**row, "initial_count": index} for index, row in enumerate(rows(count))]


@pytest.mark.usefixtures("every_other_group_is_equal")
def test_groups_without_variance_are_kept_dropped_or_played_again_elsewhere(model_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_gym")
    counts, positions, fractions = {}, {}, {}
    for how in ("keep", "drop", "resample"):
        _, callback, datamodule = fit(
            model_dir,
            tmp_path / how,
            data={"train": alternating(16), "prompts_per_step": 4, "shuffle": False, "zero_variance": how},
            trainer={"max_steps": 1},
        )
        entry = callback.history[0]
        counts[how] = entry["batch/rollouts"]
        positions[how] = datamodule.stream.cursor.position
        fractions[how] = entry["rollout/zero_variance_frac"]
    assert counts["keep"] == 12
    assert counts["drop"] <= 6
    assert counts["resample"] == 12
    assert positions["keep"] == positions["drop"] == 4
    assert positions["resample"] >= 7
    assert fractions["keep"] == fractions["drop"] >= 0.5
    assert "do not count for the step" in caplog.text


def groups_of(run_dir):
    _, lines = read_rollout_log(run_dir / "rollouts.jsonl")
    return [line["group_id"] for line in lines]


@pytest.mark.usefixtures("every_other_group_is_equal")
def test_a_resumed_run_goes_on_after_the_tasks_that_were_played_in_place_of_others(model_dir, tmp_path):
    data = {"train": alternating(32), "prompts_per_step": 2, "shuffle": False, "zero_variance": "resample"}
    whole = parts(model_dir, tmp_path / "whole", data=data, trainer={"max_steps": 4})
    whole[3].fit(whole[0], datamodule=whole[2])
    first = parts(model_dir, tmp_path / "first", data=data, trainer={"max_steps": 2})
    first[3].fit(first[0], datamodule=first[2])
    first[3].save_checkpoint(tmp_path / "half.ckpt")
    second = parts(model_dir, tmp_path / "first", data=data, trainer={"max_steps": 4})
    second[3].fit(second[0], datamodule=second[2], ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights_of(second[0]), weights_of(whole[0]))
    played = [groups_of(tmp_path / run) for run in ("whole", "first")]
    assert played[0] == played[1]
    assert sorted(played[0]) == sorted(3 * list(range(max(played[0]) + 1))), "every task once, none left out"


def test_where_no_group_ever_varies_the_run_ends_and_says_so(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Counter, "verify", lambda self, response: 1.0)
    for how in ("drop", "resample"):
        policy, callback, datamodule, trainer = parts(
            model_dir, tmp_path / how, data={"zero_variance": how, "max_resample_rounds": 2}
        )
        with pytest.raises(CollectionError, match="too easy or too hard"):
            trainer.fit(policy, datamodule=datamodule)
        assert callback.colocation._gym.num_runs == (6 if how == "drop" else 18)


@pytest.mark.usefixtures("varied_rewards")
def test_a_step_that_is_cut_short_entirely_has_nothing_to_train_on(model_dir, tmp_path):
    policy, _, datamodule, trainer = parts(model_dir, tmp_path, data={"truncated": "mask"})
    with pytest.raises(CollectionError, match="truncated rollouts are left out"):
        trainer.fit(policy, datamodule=datamodule)  # an untrained policy never ends a turn in five tokens


# -- references


class Adapted(nn.Module):
    """A model with an adapter that can be switched off, by PEFT's name for it."""

    def __init__(self, model):
        super().__init__()
        self.base = model
        self.config = model.config
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.on = True

    def disable_adapter(self):
        import contextlib

        @contextlib.contextmanager
        def off():
            self.on = False
            yield
            self.on = True

        return off()

    def forward(self, **arguments):
        output = self.base(**arguments)
        if self.on:
            output.logits = output.logits * (1 + self.scale)
        return output


def test_the_reference_of_an_adapter_is_the_model_without_it():
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1)
    adapted, batch = Adapted(model), tiny_batch()
    expected = with_ref_logprobs(model, batch, reference=frozen(model)).ref_logprobs
    found = with_ref_logprobs(adapted, batch, reference=None)
    assert torch.equal(found.ref_logprobs, expected)
    (own,) = with_old_logprobs(adapted, [batch])
    assert not torch.equal(own.old_logprobs, expected)
    assert adapted.on


def test_without_an_adapter_there_is_no_reference_to_fall_back_to():
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1)
    with pytest.raises(ConfigError, match="no adapter"):
        with_ref_logprobs(model, tiny_batch(), reference=None)


def test_the_reference_is_a_frozen_copy_that_does_not_train_and_is_saved_with_the_module(model_dir):
    policy = PolicyModule(model_dir, kl_coefficient=0.1)
    assert not any(parameter.requires_grad for parameter in policy.reference.parameters())
    assert any(name.startswith("reference.") for name in policy.state_dict())
    trained = {id(p) for group in policy.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in policy.model.parameters()}
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(1.0)
    fresh = PolicyModule(model_dir).model.get_input_embeddings().weight
    assert torch.equal(policy.reference.get_input_embeddings().weight, fresh)


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": "ppo2"}, "no loss 'ppo2'"),
        ({"correction": "tis"}, "no correction 'tis'"),
        ({"loss": "reinforce", "correction": "in_ratio"}, "has none"),
        ({"loss": reinforce, "correction": "in_ratio"}, "has none"),
        ({"warmup_steps": 3, "lr_scheduler": lambda optimizer: None}, "give one of them"),
        ({"ref_model": "somewhere"}, "nothing uses it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(model_dir, changes, match):
    with pytest.raises(ConfigError, match=match):
        PolicyModule(model_dir, **changes)


def test_a_policy_with_dropout_is_refused_before_a_rollout_is_paid_for(model_dir, tmp_path):
    policy, callback, datamodule, trainer = parts(model_dir, tmp_path)
    for module in policy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"self_attn .* has dropout 0\.1 and is in training mode"):
        trainer.fit(policy, datamodule=datamodule)
    assert callback.colocation._gym.num_runs == 0


def test_dropout_that_is_off_is_no_dropout():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    with pytest.raises(ConfigError, match=r"1 \(Dropout\)"):
        check_no_dropout(model.train())
    check_no_dropout(model.eval())
    check_no_dropout(nn.Dropout(0.0))


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(model_dir, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=32, num_layers=1, num_kv_heads=1)
    check_vocabulary(model, len(tokenizer))
    with pytest.raises(ConfigError, match=f"ids up to {len(tokenizer)}, .* {len(tokenizer)} rows"):
        check_vocabulary(model, len(tokenizer) + 1)
    model.resize_token_embeddings(len(tokenizer) - 5)
    policy, callback, datamodule, trainer = parts(model_dir, tmp_path, module=PolicyModule(model))
    with pytest.raises(ConfigError, match="different models"):
        trainer.fit(policy, datamodule=datamodule)
    assert callback.colocation._gym.num_runs == 0


@pytest.mark.usefixtures("varied_rewards")
def test_a_loss_that_is_not_a_number_ends_the_run_before_the_weights_are_touched(model_dir, tmp_path):
    def broken(logprobs, batch):
        return logprobs.sum() * torch.nan, {}

    policy, _, datamodule, trainer = parts(
        model_dir, tmp_path, module={"loss": broken}, trainer={"accumulate_grad_batches": 2}
    )
    start = weights_of(policy)
    with pytest.raises(NotFiniteError, match="step 0 is not finite"):
        trainer.fit(policy, datamodule=datamodule)
    assert torch.equal(weights_of(policy), start)


# -- two ranks

JOB = """
import random, sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym

model_dir, run_dir, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])


def ids_decide(self, response):
    if self.task["initial_count"] % 3 == 0:
        return 1.0
    return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)


Counter.verify = ids_decide
rng = random.Random(0)
rows = [{**Counter.row(rng), "initial_count": index} for index in range(40)]


class Plain(PolicyModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


policy = Plain(
    model_dir, loss="cispo", correction="token_tis", normalise_correction=True, kl_coefficient=0.2,
    entropy_coefficient=0.05,
)
start = torch.cat([p.detach().flatten().clone() for p in policy.model.parameters()])
callback = GymCallback(
    engine=FakeEngine(max_model_len=96), gym=FakeGym(max_steps=2), sampling=SamplingProfile(max_output_tokens=5),
    run_dir=run_dir,
)
trainer = L.Trainer(
    max_steps=4, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    accumulate_grad_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, log_every_n_steps=1, callbacks=[callback],
)
data = GymDataModule(
    rows, prompts_per_step=4, group_size=2, zero_variance="resample", updates_per_collection=2, shuffle=False,
    advantage_scale="batch_std",
)
trainer.fit(policy, datamodule=data)
if trainer.is_global_zero:
    end = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    torch.save(
        {"moved": end - start, "history": callback.history, "position": data.stream.cursor.position}, run_dir / "end.pt"
    )
"""


@pytest.mark.ranks
def test_two_ranks_resample_update_correct_and_measure_as_one_does(model_dir, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    ends = []
    for devices in (1, 2):
        run_dir = tmp_path / str(devices)
        run_dir.mkdir()
        done = subprocess.run(
            [sys.executable, script, model_dir, run_dir, str(devices)],
            check=False,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(run_dir / "end.pt"))
    one, two = ends
    assert one["position"] == two["position"] > 16, "tasks without variance were played again elsewhere"
    assert (one["moved"] - two["moved"]).norm() / one["moved"].norm() < 1e-4
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in a:
            if name.startswith(("train/", "rollout/", "batch/")) and name not in UNLIKE:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


UNLIKE = {"rollout/slowest_s", "batch/tokens", "batch/padding_waste_frac"}
"""What two ranks may differ in: time, and the fillers of a rank that has fewer sequences than micro-batches."""


def test_a_peft_config_gives_the_model_an_adapter_that_alone_trains(tmp_path):
    from peft import LoraConfig

    from lightning_gym.memory_budget import ModelSize
    from lightning_gym.plan import _with_adapter
    from lightning_gym.template_families import tiny_checkpoint

    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    policy = PolicyModule(tiny_checkpoint(tmp_path / "model"), peft_config=LoraConfig(**settings))
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    (group,) = policy.configure_optimizers().param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in trained.values()}
    config = policy.model.config
    planned = _with_adapter(ModelSize.of_config(config), config, settings)
    assert planned.num_trained == sum(parameter.numel() for parameter in trained.values())
