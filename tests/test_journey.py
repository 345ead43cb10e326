"""One batch all the way round, with the public fakes: row, rollout, alignment, batch, loss, optimizer step, sync."""

import asyncio
import json
import logging
import os
import signal
import time

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.errors import CollectionError, ConfigError, StalePolicyError, WeightSyncError
from lightning_gym.gym.environments import Counter, ReverseString
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(directory)
    return directory


def rows(num, environment=Counter):
    import random

    rng = random.Random(0)
    return [environment.row(rng) for _ in range(num)]


def parts(model_dir, run_dir, *, data=None, engine=None, gym=None, trainer=None, callback=None, module=None):
    """A small run: 2 groups of 2 rollouts a step."""
    policy = PolicyModule(model_dir, **({"lr": 1e-2} | (module or {})))
    gym_callback = GymCallback(
        engine=engine or FakeEngine(max_model_len=96),
        gym=gym or FakeGym(["counter", "reverse_string"], max_steps=3),
        run_dir=run_dir,
        **({"sampling": SamplingProfile(max_output_tokens=6)} | (callback or {})),
    )
    settings = {"train": rows(5), "prompts_per_step": 2, "group_size": 2} | (data or {})
    datamodule = GymDataModule(**settings)
    options = {
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    } | (trainer or {})
    return policy, gym_callback, datamodule, L.Trainer(callbacks=[gym_callback], **options)


def fit(*arguments, **changes):
    policy, callback, datamodule, trainer = parts(*arguments, **changes)
    trainer.fit(policy, datamodule=datamodule)
    return policy, callback, trainer


def random_reward(self, response):
    """A reward that differs inside a group, so that an untrained policy has something to learn."""
    return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)


@pytest.fixture
def varied_rewards(monkeypatch):
    monkeypatch.setattr(Counter, "verify", random_reward)


@pytest.mark.usefixtures("varied_rewards")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_played_by_the_weights_it_trains_and_the_next_one_by_the_new_ones(model_dir, tmp_path, accumulate):
    engine = FakeEngine(max_model_len=96)
    policy, callback, trainer = fit(
        model_dir, tmp_path, engine=engine, trainer={"accumulate_grad_batches": accumulate, "max_steps": 3}
    )
    assert trainer.global_step == 3
    updates = [event for event in engine.events if event.startswith("update")]
    assert updates == ["update:0", "update:1", "update:2"], "once an optimizer step, never more"
    turns = [event.partition(":")[0] for event in engine.events]
    assert turns == ["start", *(["update", "resume", "pause"] * 3), "close"]
    assert [entry["step"] for entry in callback.history] == [1, 2, 3]
    for entry in callback.history:
        assert entry["train/logprob_diff_max"] < 1e-4
        assert entry["train/token_mult_prob_error"] < 1.001
        assert entry["rollout/count"] == 4
        assert entry["rollout/dropped"] == entry["rollout/misaligned"] == 0
    fresh = PolicyModule(model_dir).model
    moved = [not torch.equal(a, b) for a, b in zip(policy.model.parameters(), fresh.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.usefixtures("varied_rewards")
def test_the_gradient_does_not_depend_on_the_number_of_micro_batches(model_dir, tmp_path):
    trained = []
    for accumulate in (1, 2, 4):
        policy, _, _ = fit(
            model_dir, tmp_path / str(accumulate), trainer={"accumulate_grad_batches": accumulate, "max_steps": 1}
        )
        trained.append(torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()]))
    step = (trained[0] - torch.cat([p.detach().flatten() for p in PolicyModule(model_dir).model.parameters()])).norm()
    assert step > 0
    for other in trained[1:]:
        assert (other - trained[0]).norm() / step < 1e-3  # AdamW's first step is the gradient's sign: rounding shows


@pytest.mark.usefixtures("varied_rewards")
def test_two_runs_of_one_seed_are_one_run(model_dir, tmp_path):
    first, second = (fit(model_dir, tmp_path / str(run))[0] for run in range(2))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_rollout_is_in_the_log_with_what_trained(model_dir, tmp_path):
    _, callback, _ = fit(model_dir, tmp_path)
    model, lines = read_rollout_log(tmp_path / "rollouts.jsonl")
    logged = list(lines)
    assert model == model_dir
    assert len(logged) == 12
    assert {line["step"] for line in logged} == {0, 1, 2}
    sampled = sum(sum(segment["loss_mask"]) for line in logged for segment in line["segments"])
    assert sampled == sum(entry["batch/trained_tokens"] for entry in callback.history)


def test_one_run_plays_two_environments_and_reports_their_rewards_apart(model_dir, tmp_path):
    mixed = [*rows(3), *rows(3, ReverseString)]
    _, callback, _ = fit(model_dir, tmp_path, data={"train": mixed, "prompts_per_step": 6}, trainer={"max_steps": 1})
    names = {name.rpartition("/")[2] for name in callback.history[0] if name.startswith("rollout/reward_mean/")}
    assert names == {"example_session_state_mgmt_simple_agent", "reverse_string_simple_agent"}


def test_a_failed_rollout_is_left_out_and_counted_and_its_group_goes_on(model_dir, tmp_path):
    gym = FakeGym(["counter"], max_steps=2, fault=lambda number: 500 if number == 1 else None)
    _, callback, _ = fit(
        model_dir, tmp_path, gym=gym, data={"group_size": 4, "prompts_per_step": 1}, trainer={"max_steps": 1}
    )
    entry = callback.history[0]
    assert (entry["rollout/count"], entry["rollout/dropped"], entry["rollout/failed_environment"]) == (4, 1, 1)


def test_too_many_failed_rollouts_stop_the_run_with_the_innermost_cause(model_dir, tmp_path):
    gym = FakeGym(["counter"], fault=lambda number: 500)
    engine = FakeEngine(max_model_len=96)
    with pytest.raises(CollectionError, match="fault injected"):
        fit(model_dir, tmp_path, gym=gym, engine=engine)
    assert engine.events[-1] == "close", "an exception closes what was started"


def test_a_lost_answer_is_asked_for_again(model_dir, tmp_path):
    gym = FakeGym(["counter"], max_steps=2, fault=lambda number: 503 if number == 0 else None)
    _, callback, _ = fit(model_dir, tmp_path, gym=gym, trainer={"max_steps": 1})
    assert callback.history[0]["rollout/dropped"] == 0
    assert gym.num_runs == 5


def test_a_heartbeat_tells_how_far_the_collection_is(model_dir, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_gym"):
        fit(model_dir, tmp_path, callback={"heartbeat_s": 0.02}, trainer={"max_steps": 1})
    assert any("/4 rollouts after" in record.message for record in caplog.records)


def test_sigterm_gives_up_the_rollouts_that_are_waited_for(model_dir, tmp_path, monkeypatch):
    async def stopped_while_it_waits(self, response):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)
        return 0.0

    monkeypatch.setattr(Counter, "verify", stopped_while_it_waits)
    started = time.monotonic()
    with pytest.raises(SIGTERMException):
        fit(model_dir, tmp_path)
    assert time.monotonic() - started < 30


def test_a_run_continues_its_order_of_tasks_and_its_versions_from_a_checkpoint(model_dir, tmp_path):
    whole = parts(model_dir, tmp_path / "whole", trainer={"max_steps": 4})
    whole[3].fit(whole[0], datamodule=whole[2])
    first = parts(model_dir, tmp_path / "first", trainer={"max_steps": 2})
    first[3].fit(first[0], datamodule=first[2])
    first[3].save_checkpoint(tmp_path / "half.ckpt")
    engine = FakeEngine(max_model_len=96)
    second = parts(model_dir, tmp_path / "first", engine=engine, trainer={"max_steps": 4})
    second[3].fit(second[0], datamodule=second[2], ckpt_path=tmp_path / "half.ckpt")
    assert [event for event in engine.events if event.startswith("update")] == ["update:2", "update:3"]
    for a, b in zip(second[0].model.parameters(), whole[0].model.parameters(), strict=True):
        assert torch.equal(a, b)
    _, lines = read_rollout_log(tmp_path / "first" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, "a resumed run continues the log"


def test_a_new_run_replaces_the_log_of_an_earlier_one(model_dir, tmp_path):
    for _ in range(2):
        fit(model_dir, tmp_path, trainer={"max_steps": 1})
    _, lines = read_rollout_log(tmp_path / "rollouts.jsonl")
    assert len(list(lines)) == 4


# Bad input: each mistake is named, with its remedy, before a rollout is paid for.


def refused(model_dir, tmp_path, match, error=ConfigError, **changes):
    gym = FakeGym(["counter"])
    with pytest.raises(error, match=match):
        fit(model_dir, tmp_path, gym=gym, **changes)
    assert gym.num_runs == 0


def test_a_broken_row_is_named_by_file_line_and_key(model_dir, tmp_path):
    good = json.dumps(rows(1)[0])
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{good}\n{{"responses_create_params": {{}}}}\n')
    refused(model_dir, tmp_path, r"rows\.jsonl:2: .*input", data={"train": path})
    path.write_text(f"{good}\n{{oops\n")
    refused(model_dir, tmp_path, r"rows\.jsonl:2: not JSON", data={"train": path})
    refused(model_dir, tmp_path, "does not exist", data={"train": tmp_path / "none.jsonl"})


def test_a_task_of_an_unknown_agent_is_refused_with_the_agents_there_are(model_dir, tmp_path):
    stray = [*rows(1), {**rows(1)[0], "agent_ref": {"name": "nobody"}}]
    refused(model_dir, tmp_path, "nobody.*example_session_state_mgmt_simple_agent", data={"train": stray})


def test_an_occupied_port_is_refused(model_dir, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(model_dir, tmp_path, f"{port}.*another port", callback={"endpoint_port": port})


def test_a_model_directory_without_a_chat_template_is_refused(model_dir, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    (bare / "chat_template.jinja").unlink()
    refused(bare, tmp_path, "chat template")


def test_a_context_too_small_for_the_first_prompt_is_refused(model_dir, tmp_path):
    refused(model_dir, tmp_path, "max_model_len is 8", engine=FakeEngine(max_model_len=8))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_fork_or_spawn_this_process_are_refused(model_dir, tmp_path, strategy):
    policy, callback, datamodule, trainer = parts(model_dir, tmp_path, trainer={"strategy": strategy, "devices": 1})
    datamodule.trainer = trainer
    datamodule.setup("fit")
    with pytest.raises(ConfigError, match="strategy='ddp'"):
        callback.setup(trainer, policy, "fit")


class Unsized:
    """A loader wrapped by somebody who forgot its length."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_a_wrapped_loader_without_a_length_is_refused_before_it_can_run_ahead(model_dir, tmp_path):
    class Wrapping(GymDataModule):
        def train_dataloader(self):
            return Unsized(super().train_dataloader())

    policy, callback, _, trainer = parts(model_dir, tmp_path)
    gym = callback.colocation._gym
    with pytest.raises(ConfigError, match="length"):
        trainer.fit(policy, datamodule=Wrapping(rows(5), prompts_per_step=2, group_size=2))
    assert gym.num_runs == 0


def test_a_batch_of_other_weights_is_refused(model_dir, tmp_path):
    policy, _, datamodule, trainer = parts(model_dir, tmp_path)

    class Meddler(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                batch.weight_versions[batch.loss_mask] = 0

    trainer.callbacks.insert(0, Meddler())
    with pytest.raises(StalePolicyError, match="step 1 holds tokens sampled by weights of step 0"):
        trainer.fit(policy, datamodule=datamodule)


class Forgetful(FakeEngine):
    """Shows a copy of one of its tensors: what is written there is lost."""

    name = "model.embed_tokens.weight"
    copy = None

    def weight_views(self):
        views = super().weight_views()
        if self.copy is None:
            self.copy = views[self.name].clone()
        return views | {self.name: self.copy}


@pytest.mark.usefixtures("varied_rewards")
def test_an_engine_that_does_not_take_the_weights_stops_the_run(model_dir, tmp_path):
    with pytest.raises(WeightSyncError, match="disagree by"):
        fit(
            model_dir,
            tmp_path,
            engine=Forgetful(max_model_len=96),
            trainer={"max_steps": 3},
            module={"lr": 1e-1},
        )


def test_settings_that_cannot_work_are_refused_at_once(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="group of one"):
        GymDataModule(rows(2), group_size=1)
    with pytest.raises(ConfigError, match="no loss 'gpro'"):
        PolicyModule(model_dir, loss="gpro")
    refused(model_dir, tmp_path, "policy is .*expected", callback={"policy": "policy"})


def agent_of(environment):
    return rows(1, environment)[0]["agent_ref"]["name"]


@pytest.mark.usefixtures("varied_rewards")
def test_environments_are_blended_by_weight_and_each_ones_reward_is_logged(model_dir, tmp_path):
    blend = {
        "train": [*rows(1), *rows(9, ReverseString)],
        "agent_weights": {agent_of(Counter): 3, agent_of(ReverseString): 1},
        "prompts_per_step": 4,
    }
    _, callback, _ = fit(model_dir, tmp_path, data=blend)
    _, played = read_rollout_log(tmp_path / "rollouts.jsonl")
    agents = [rollout["agent"] for rollout in played]
    assert agents.count(agent_of(Counter)) == 3 * agents.count(agent_of(ReverseString)) > 0
    assert all(f"rollout/reward_mean/{agent}" in step for step in callback.history for agent in set(agents))


def test_a_truncated_distribution_is_trained_on_only_with_a_correction(model_dir, tmp_path):
    truncated = {"sampling": SamplingProfile(top_p=0.9, max_output_tokens=6)}
    refused(model_dir, tmp_path, "top_p=0.9.*switch a correction on", callback=truncated)
    _, callback, _ = fit(
        model_dir, tmp_path, callback=truncated, module={"correction": "token_tis"}, trainer={"max_steps": 1}
    )
    assert len(callback.history) == 1


def test_a_window_over_the_ceiling_names_the_accumulation_that_fits(model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=\d"):
        fit(model_dir, tmp_path, data={"max_tokens_per_micro_batch": 60})


def test_a_data_module_without_its_callback_says_so(model_dir, tmp_path):
    trainer = L.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ConfigError, match="GymCallback"):
        trainer.fit(PolicyModule(model_dir), datamodule=GymDataModule(rows(2)))
