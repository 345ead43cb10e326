"""Validation inside a Trainer, all the way round with the fakes: when, with which weights, what is logged, what is left
alone."""

import random

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.errors import ConfigError
from lightning_gym.evaluation import EvaluationGroup, EvaluationTasks
from lightning_gym.gym.environments import Counter, ReverseString
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym

pytestmark = pytest.mark.usefixtures("one_thread", "varied_rewards")


def rows(count, environment=Counter, seed=0):
    rng = random.Random(seed)
    return [environment.row(rng) for _ in range(count)]


def parts(model_dir, run_dir, *, module=None, data=None, trainer=None, callback=None):
    policy = module or PolicyModule(model_dir, lr=1e-2)
    engine = FakeEngine(max_model_len=96)
    gym = GymCallback(
        **{
            "engine": engine,
            "gym": FakeGym(["counter", "reverse_string"], max_steps=2),
            "sampling": SamplingProfile(max_output_tokens=5),
            "model_path": model_dir,
            "run_dir": run_dir,
        }
        | (callback or {})
    )
    datamodule = GymDataModule(
        **({"train": rows(7), "val": rows(3, seed=1), "prompts_per_step": 2, "group_size": 2} | (data or {}))
    )
    options = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    options |= {"num_sanity_val_steps": 0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    options |= trainer or {}
    callbacks = [gym, *options.pop("callbacks", [])]
    return policy, gym, datamodule, L.Trainer(callbacks=callbacks, **options), engine


def fit(*arguments, **changes):
    policy, callback, datamodule, trainer, engine = parts(*arguments, **changes)
    trainer.fit(policy, datamodule=datamodule)
    return policy, callback, datamodule, trainer, engine


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


def val_lines(run_dir):
    return list(read_rollout_log(run_dir / "val_rollouts.jsonl")[1])


# -- when, and with which weights


def test_a_validation_plays_with_the_weights_of_the_step_and_the_engine_starts_once(model_dir, tmp_path):
    *_, engine = fit(model_dir, tmp_path)
    assert engine.events.count("start") == engine.events.count("close") == 1
    assert [event for event in engine.events if event.startswith("update")] == ["update:0", "update:1", "update:2"]
    lines = val_lines(tmp_path)
    assert [line["step"] for line in lines] == [1] * 3 + [2] * 3
    assert all(segment["weight_version"] == line["step"] for line in lines for segment in line["segments"])
    assert len({line["rollout_id"] for line in lines}) == 6, "ids are unique in the run"


def test_in_the_middle_of_a_window_a_validation_syncs_nothing_and_has_the_weights_of_the_window(model_dir, tmp_path):
    _, callback, _, _, engine = fit(model_dir, tmp_path, trainer={"accumulate_grad_batches": 3, "max_steps": 2})
    assert [event for event in engine.events if event.startswith("update")] == ["update:0", "update:1", "update:2"]
    assert [entry["step"] for entry in callback.evaluations] == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("changes", [{}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("data", [{}, {"updates_per_collection": 2}, {"zero_variance": "resample"}])
def test_training_is_bit_for_bit_the_same_with_and_without_validation(model_dir, tmp_path, changes, data):
    ends = []
    for name, val in (("with", rows(3, seed=1)), ("without", None)):
        torch.manual_seed(5)
        policy, callback, datamodule, _, _ = fit(
            model_dir,
            tmp_path / name,
            data={**data, "val": val, "train": rows(20)},
            trainer={**changes, "max_steps": 3, **({} if val else {"check_val_every_n_epoch": 1})},
        )
        logged = [
            {key: value for key, value in entry.items() if not key.startswith(("time/", "sync/", "rollout/slowest"))}
            for entry in callback.history
        ]
        ends.append((weights_of(policy), logged, datamodule.stream.cursor.position, torch.rand(3)))
    (weights, logged, position, drawn), other = ends
    assert torch.equal(weights, other[0])
    assert logged == other[1]
    assert position == other[2]
    assert torch.equal(drawn, other[3]), "the random state is left alone"


def test_the_time_of_a_validation_inside_a_window_is_no_training_time(model_dir, tmp_path, monkeypatch):
    import time

    from lightning_gym import callback as module

    played = module.evaluate

    def slow(*arguments, **changes):
        time.sleep(3)  # a busy machine's training step takes less
        return played(*arguments, **changes)

    monkeypatch.setattr(module, "evaluate", slow)
    _, callback, _, _, _ = fit(model_dir, tmp_path, trainer={"accumulate_grad_batches": 2, "max_steps": 1})
    assert callback.history[0]["time/train_s"] < 3


# -- what is logged


def test_a_checkpoint_follows_the_validation_reward(model_dir, tmp_path):
    keeper = ModelCheckpoint(tmp_path / "ckpt", monitor="val/reward_mean", mode="max", filename="{step}")
    _, callback, _, trainer, _ = fit(
        model_dir, tmp_path, trainer={"enable_checkpointing": True, "callbacks": [keeper], "max_steps": 3}
    )
    rewards = {entry["step"]: entry["val/reward_mean"] for entry in callback.evaluations}
    assert sorted(rewards) == [1, 2, 3]
    assert keeper.best_model_score.item() == pytest.approx(max(rewards.values()))
    best = next(step for step, reward in rewards.items() if reward == max(rewards.values()))
    assert keeper.best_model_path.endswith(f"step={best:.0f}.ckpt")
    assert trainer.callback_metrics["val/reward_mean"].item() == pytest.approx(rewards[3])
    assert not any(name.startswith("val/") for entry in callback.history for name in entry)


def test_what_is_logged_is_what_the_log_of_rollouts_says(model_dir, tmp_path):
    _, callback, _, _, _ = fit(model_dir, tmp_path, data={"val_samples": 3}, trainer={"max_steps": 1})
    lines = val_lines(tmp_path)
    by_task = {}
    for line in lines:
        by_task.setdefault(line["task_index"], []).append(line["reward"])
    assert [len(rewards) for rewards in by_task.values()] == [3, 3, 3]
    (entry,) = callback.evaluations
    assert entry["val/reward_mean"] == pytest.approx(sum(map(sum, by_task.values())) / 9)
    assert entry["val/avg_at_3"] == entry["val/pass_at_1"] == entry["val/reward_mean"]
    assert entry["val/pass_at_3"] == pytest.approx(sum(map(max, by_task.values())) / 3)
    assert (entry["val/tasks"], entry["val/attempts"], entry["val/failed"]) == (3, 9, 0)
    assert entry["val/sampled_tokens_max"] == max(
        sum(s["loss_mask"]) for line in lines for s in [*line["segments"]][-1:]
    )


def test_datasets_are_logged_by_name_and_environments_by_theirs(model_dir, tmp_path):
    val = {"easy": rows(2, seed=1), "hard": [*rows(1, seed=2), *rows(1, ReverseString)]}
    _, callback, _, _, _ = fit(model_dir, tmp_path, data={"val": val}, trainer={"max_steps": 1})
    entry = callback.evaluations[0]
    assert entry["val/tasks"] == 4
    assert entry["val/easy/tasks"] == entry["val/hard/tasks"] == 2
    assert entry["val/example_session_state_mgmt_simple_agent/tasks"] == 3
    assert "val/reverse_string_simple_agent/reward_mean" in entry
    mean = (entry["val/easy/reward_mean"] + entry["val/hard/reward_mean"]) / 2
    assert entry["val/reward_mean"] == pytest.approx(mean)


def test_evaluation_rollouts_are_sampled_as_their_own_profile_says_and_alike_every_time(model_dir, tmp_path):
    greedy = SamplingProfile(temperature=0.0, top_p=0.5, max_output_tokens=2)
    fit(
        model_dir,
        tmp_path,
        module=PolicyModule(model_dir, lr=0.0),
        callback={"eval_sampling": greedy},
        data={"val_samples": 2},
    )
    lines = val_lines(tmp_path)
    ids = [[segment["token_ids"] for segment in line["segments"]] for line in lines]
    assert max(sum(segment["loss_mask"]) for line in lines for segment in line["segments"]) <= 2 * 2
    assert ids[0::2] == ids[1::2], "greedy: both attempts are one"
    assert ids[:6] == ids[6:], "the second validation of the same weights"


def test_seeds_are_the_same_in_every_validation(model_dir, tmp_path):
    fit(model_dir, tmp_path, module=PolicyModule(model_dir, lr=0.0), data={"val_samples": 2})
    rewards = [line["reward"] for line in val_lines(tmp_path)]
    assert rewards[:6] == rewards[6:]
    assert len(set(rewards[:6])) > 1


# -- Lightning's own settings


def test_the_sanity_check_plays_as_many_tasks_as_it_has_steps_and_is_not_recorded(model_dir, tmp_path):
    gym = FakeGym(["counter"], max_steps=2)
    _, callback, _, _, engine = fit(
        model_dir,
        tmp_path,
        callback={"gym": gym},
        data={"val": rows(5, seed=1)},
        trainer={"num_sanity_val_steps": 2, "max_steps": 1, "val_check_interval": 5},
    )
    assert gym.num_runs == 2 + 4
    assert callback.evaluations == []
    assert val_lines(tmp_path) == []
    assert [event for event in engine.events if event.startswith("update")] == ["update:0"]
    assert callback.history[0]["sync/bytes"] > 0, "the first sync is told of in the first step"


def test_limits_count_tasks_and_take_some_of_every_dataset(model_dir, tmp_path):
    val = {"small": rows(2, seed=1), "large": rows(6, seed=2)}
    _, callback, _, _, _ = fit(
        model_dir, tmp_path, data={"val": val}, trainer={"limit_val_batches": 0.5, "max_steps": 1}
    )
    entry = callback.evaluations[0]
    assert (entry["val/tasks"], entry["val/small/tasks"], entry["val/large/tasks"]) == (4, 1, 3)


def test_validate_alone_starts_and_closes_everything(model_dir, tmp_path):
    policy, callback, datamodule, trainer, engine = parts(model_dir, tmp_path)
    (found,) = trainer.validate(policy, datamodule=datamodule, verbose=False)
    assert found["val/reward_mean"] == pytest.approx(callback.evaluations[0]["val/reward_mean"])
    turns = [event.partition(":")[0] for event in engine.events]
    assert turns == ["start", "update", "resume", "pause", "close"]
    assert datamodule.stream is None
    assert not any(parameter.is_inference() for parameter in policy.model.parameters())


def test_validate_takes_the_weights_of_a_checkpoint(model_dir, tmp_path):
    policy, _, datamodule, trainer, _ = parts(model_dir, tmp_path / "fit")
    trainer.fit(policy, datamodule=datamodule)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    last = [line["reward"] for line in val_lines(tmp_path / "fit")][-3:]
    policy, _, datamodule, trainer, _ = parts(model_dir, tmp_path / "val")
    trainer.validate(policy, datamodule=datamodule, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert [line["reward"] for line in val_lines(tmp_path / "val")] == last


def test_a_trainer_can_validate_what_it_has_fitted(model_dir, tmp_path):
    policy, callback, datamodule, trainer, engine = parts(model_dir, tmp_path)
    trainer.fit(policy, datamodule=datamodule)
    trainer.validate(policy, datamodule=datamodule, verbose=False)
    assert [event.partition(":")[0] for event in engine.events].count("start") == 2
    assert callback.evaluations[-1]["val/reward_mean"] == callback.evaluations[-2]["val/reward_mean"]
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(policy, datamodule=datamodule)
    assert trainer.global_step == 3


# -- modules


class Own(L.LightningModule):
    """As in the README: no validation_step."""

    def __init__(self, model_dir):
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_dir).train()

    def training_step(self, batch, batch_idx):
        return grpo(token_logprobs(self.model, batch), batch)[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_a_validation_step_is_validated_all_the_same(model_dir, tmp_path):
    _, callback, _, _, _ = fit(model_dir, tmp_path, module=Own(model_dir))
    assert len(callback.evaluations) == 2


def test_a_validation_step_of_ones_own_is_given_the_attempts_at_a_task(model_dir, tmp_path):
    seen = []

    class Watching(Own):
        def validation_step(self, batch, batch_idx):
            seen.append(batch)
            self.log("val/calls", float(sum(len(rollout.calls) for rollout in batch.rollouts)), batch_size=1)

    _, _, _, trainer, _ = fit(
        model_dir, tmp_path, module=Watching(model_dir), data={"val_samples": 2}, trainer={"max_steps": 1}
    )
    assert [len(group.rollouts) for group in seen] == [2, 2, 2]
    assert all(isinstance(group, EvaluationGroup) for group in seen)
    assert {group.task.row["initial_count"] for group in seen} == {row["initial_count"] for row in rows(3, seed=1)}
    assert trainer.callback_metrics["val/calls"] > 0


# -- bad input


@pytest.mark.parametrize(
    ("val", "said"), [({}, "names no dataset"), ({"a/b": "x"}, "a/b"), ("gone.jsonl", "gone.jsonl")]
)
def test_validation_data_that_cannot_be_used_are_named_before_anything_starts(model_dir, tmp_path, val, said):
    policy, _, datamodule, trainer, engine = parts(model_dir, tmp_path, data={"val": val})
    with pytest.raises(ConfigError, match=said):
        trainer.fit(policy, datamodule=datamodule)
    assert engine.events == []


def test_a_validation_task_of_an_unknown_agent_is_refused_at_the_start(model_dir, tmp_path):
    stray = [{**rows(1)[0], "agent_ref": {"name": "nobody"}}]
    with pytest.raises(ConfigError, match="nobody"):
        fit(model_dir, tmp_path, data={"val": stray})


def test_no_attempt_at_all_is_refused():
    with pytest.raises(ConfigError, match="val_samples is 0"):
        GymDataModule(rows(1), val=rows(1), val_samples=0)


def test_stages_without_data_are_named(model_dir, tmp_path):
    _, _, datamodule, trainer, _ = parts(model_dir, tmp_path, data={"val": None})
    datamodule.trainer = trainer
    for stage in ("validate", "test"):
        with pytest.raises(ConfigError, match=f"no {stage} data"):
            datamodule.setup(stage)


def test_the_datasets_take_turns_by_their_sizes():
    tasks = EvaluationTasks({"a": rows(2), "b": rows(4)})
    assert [tasks.dataset_of(dealt.group_id) for dealt in tasks.dealt] == ["b", "a", "b", "b", "a", "b"]
    assert [tasks.per_rank(size) for size in (1, 4, 6)] == [6, 2, 1]
