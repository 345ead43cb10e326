"""Replay: training on a log is training on the run that wrote it, bit for bit; anything else is told."""

import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import fields

import lightning.pytorch as L
import msgspec
import pytest
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.cli import _overrides
from lightning_gym.configuration import compose_run
from lightning_gym.errors import ConfigError
from lightning_gym.gym.environments import Counter
from lightning_gym.replay import Replay
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import logged_rollout, read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPERATURE = 0.8


@pytest.fixture(autouse=True)
def varied(monkeypatch):
    def ids_decide(self, response):
        total = sum(sum(item.get("generation_token_ids", ())) for item in response["output"])
        return 1.0 if self.task["initial_count"] % 3 == 0 else float(total % 7)

    monkeypatch.setattr(Counter, "verify", ids_decide)


def rows(count, seed=0):
    rng = random.Random(seed)
    return [Counter.row(rng) for _ in range(count)]


class Watching(PolicyModule):
    """Keeps every batch and loss."""

    def __init__(self, *arguments, **changes):
        super().__init__(*arguments, **changes)
        self.seen = []

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        loss = out["loss"] if isinstance(out, dict) else out
        self.seen.append((batch, loss.detach().clone()))
        return out


def run(model_dir, run_dir, *, replay=None, module=None, data=None, trainer=None, log=True, model=None):
    policy = Watching(model or model_dir, **({"lr": 1e-2} | (module or {})))
    callback = GymCallback(
        engine=None if replay else FakeEngine(max_model_len=96),
        gym=None if replay else FakeGym(["counter"], max_steps=3, fault=lambda number: 500 if number == 7 else None),
        replay=replay,
        sampling=SamplingProfile(max_output_tokens=5, temperature=TEMPERATURE),
        model_path=model_dir,
        run_dir=run_dir,
        log_rollouts=log,
        max_failed_frac=0.5,
    )
    datamodule = GymDataModule(**({"train": rows(20), "prompts_per_step": 2, "group_size": 3} | (data or {})))
    options = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = L.Trainer(callbacks=[callback], **(options | (trainer or {})))
    trainer.fit(policy, datamodule=datamodule)
    return policy, callback


def same(one, other):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


SETTINGS = {
    "plain": ({}, {}, {}),
    "accumulated": ({}, {}, {"accumulate_grad_batches": 2}),
    "resampled": ({"zero_variance": "resample"}, {}, {}),
    "several updates": ({"updates_per_collection": 2}, {"correction": "token_tis"}, {}),
    "dropped and normalised": (
        {"zero_variance": "drop", "advantage_scale": "group_std", "prompts_per_step": 4},
        {"kl_coefficient": 0.1},
        {},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_from_the_log_is_the_run_that_wrote_it_bit_for_bit(model_dir, tmp_path, name):
    data, module, trainer = SETTINGS[name]
    first, played = run(model_dir, tmp_path / "first", data=data, module=module, trainer=trainer)
    again, replayed = run(
        model_dir, tmp_path / "again", replay=tmp_path / "first", data=data, module=module, trainer=trainer
    )
    assert len(first.seen) == len(again.seen) > 0
    for (batch, loss), (batch_again, loss_again) in zip(first.seen, again.seen, strict=True):
        same(batch, batch_again)
        assert torch.equal(loss, loss_again)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(entry["rollout/dropped"] for entry in played.history) > 0, "failures are replayed too"
    for a, b in zip(played.history, replayed.history, strict=True):
        for key in a:
            if key.startswith(("rollout/", "batch/", "train/", "env/")) and "slowest" not in key:
                assert a[key] == pytest.approx(b[key], rel=1e-6), key
        assert b["replay/lag_max"] == b["batch/lag"]
        assert b["replay/lag_max"] or b["replay/logprob_diff_mean"] < 1e-4


def test_every_rollout_of_a_log_is_the_rollout_that_was_played(model_dir, tmp_path, monkeypatch):
    from lightning_gym.rollout_log import RolloutLog

    written = []
    write = RolloutLog.write

    def watching(self, step, rollouts, *arguments):
        written.extend(rollouts)
        return write(self, step, rollouts, *arguments)

    monkeypatch.setattr(RolloutLog, "write", watching)
    run(model_dir, tmp_path)
    read = [logged_rollout(json.loads(json.dumps(line))) for line in read_rollout_log(tmp_path / "rollouts.jsonl")[1]]
    assert len(read) == len(written) == 24
    for one, other in zip(read, written, strict=True):
        for field in fields(one):
            if field.name not in {"calls", "seconds", "failure"}:
                a, b = (json.loads(msgspec.json.encode(getattr(side, field.name))) for side in (one, other))
                assert a == b, field.name
        assert (one.failure is None) == (other.failure is None)
        if one.failure is None:
            assert [
                (c.index, [*c.prompt_ids], [*c.token_ids], [*c.logprobs], c.finish_reason, c.weight_version)
                for c in one.calls
            ] == [
                (c.index, [*c.prompt_ids], [*c.token_ids], [*c.logprobs], c.finish_reason, c.weight_version)
                for c in other.calls
            ]


def test_control_another_temperature_makes_other_batches(model_dir, tmp_path):
    first, _ = run(model_dir, tmp_path / "first", trainer={"max_steps": 1})
    replay = Replay(tmp_path / "first")
    assert replay.profiles["train"].temperature == TEMPERATURE, "the log's, whatever this run's callback says"
    assert first.seen[0][0].temperature == TEMPERATURE


def test_a_replay_of_another_model_says_that_it_is_off_policy(model_dir, tmp_path, caplog):
    run(model_dir, tmp_path / "first", trainer={"max_steps": 2})
    other = tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1, seed=9)
    with caplog.at_level(logging.INFO, logger="lightning_gym"):
        _, callback = run(
            model_dir, tmp_path / "again", replay=tmp_path / "first", trainer={"max_steps": 2}, model=other
        )
    (said,) = [record.message for record in caplog.records if "off-policy" in record.message]
    assert "from step 0 on" in said
    assert str(model_dir) in said
    assert callback.history[0]["replay/logprob_diff_mean"] > 0.02


def test_a_replay_of_the_model_that_played_says_that_it_begins_on_policy(model_dir, tmp_path, caplog):
    run(model_dir, tmp_path / "first", trainer={"max_steps": 1})
    with caplog.at_level(logging.INFO, logger="lightning_gym"):
        run(model_dir, tmp_path / "again", replay=tmp_path / "first", trainer={"max_steps": 1})
    assert any("begins on-policy" in record.message for record in caplog.records)
    assert not any("off-policy" in record.message for record in caplog.records)


def test_another_learning_rate_is_told_of_from_the_step_on_at_which_it_matters(model_dir, tmp_path, caplog):
    run(model_dir, tmp_path / "first", module={"lr": 0.0})
    with caplog.at_level(logging.WARNING, logger="lightning_gym"):
        _, callback = run(model_dir, tmp_path / "again", replay=tmp_path / "first", module={"lr": 0.3})
    assert [record for record in caplog.records if "off-policy from step 1 on" in record.message]
    assert callback.history[0]["replay/logprob_diff_mean"] < 1e-4 < callback.history[1]["replay/logprob_diff_mean"]


def test_a_replay_leaves_the_log_that_it_reads_alone(model_dir, tmp_path):
    run(model_dir, tmp_path, trainer={"max_steps": 1})
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    run(model_dir, tmp_path, replay=tmp_path, trainer={"max_steps": 1})
    assert (tmp_path / "rollouts.jsonl").read_bytes() == before


def test_rollouts_are_saved_where_a_path_says(model_dir, tmp_path):
    run(model_dir, tmp_path / "run", log=tmp_path / "kept" / "mine.jsonl", trainer={"max_steps": 1})
    run(model_dir, tmp_path / "again", replay=tmp_path / "kept" / "mine.jsonl", trainer={"max_steps": 1})
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


# -- from the command line

ENVIRONMENT = """
from lightning_gym import Environment

class IdsDecide(Environment):
    name = "ids_decide"

    def verify(self, response):
        return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)
"""
FAKES = ["engine=fake", "engine.max_model_len=96", "gym=fake", "gym.environments=[ids_decide:IdsDecide]"]


def train(directory, *arguments):
    """``lightning-gym train`` in a directory of its user."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_gym.cli", "train", "counter", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def weights(run_dir):
    (path,) = run_dir.glob("csv/checkpoints/*.ckpt")
    return torch.load(path, weights_only=False)["state_dict"]


def test_a_run_saved_from_the_command_line_is_loaded_without_engine_or_gym_and_ends_at_the_same_weights(
    model_dir, tmp_path
):
    (tmp_path / "ids_decide.py").write_text(ENVIRONMENT)
    played = [
        row | {"agent_ref": {"type": "responses_api_agents", "name": "ids_decide_simple_agent"}} for row in rows(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in played))
    common = ["warm_start=null", f"policy.model={model_dir}", "policy.lr=1e-2", "data.train=rows.jsonl"]
    common += ["data.prompts_per_step=2", "data.group_size=3", "sampling.max_output_tokens=5", "trainer.max_steps=2"]
    common += ["trainer.enable_progress_bar=false"]
    saved = train(tmp_path, *common, *FAKES, "output_dir=saved", "--save-rollouts", "kept (1)/mine.jsonl")
    assert saved.returncode == 0, saved.stderr[-4000:]
    assert not (tmp_path / "saved" / "rollouts.jsonl").exists()
    loaded = train(tmp_path, *common, "output_dir=loaded", "--load-rollouts=kept (1)/mine.jsonl")
    assert loaded.returncode == 0, loaded.stderr[-4000:]
    assert "the replay begins on-policy" in loaded.stderr
    start = PolicyModule(model_dir).state_dict()
    ended, again = weights(tmp_path / "saved"), weights(tmp_path / "loaded")
    assert all(torch.equal(ended[name], again[name]) for name in ended)
    assert not all(torch.equal(ended[name], start[name]) for name in ended), (
        "rewards differ, so that there is a gradient"
    )


@pytest.mark.parametrize("path", ["kept/mine.jsonl", "my rollouts/of [one], it's (1).jsonl", "a=b.jsonl"])
@pytest.mark.parametrize(("option", "key"), [("--save-rollouts", "log_rollouts"), ("--load-rollouts", "replay")])
def test_any_path_can_follow_the_option_as_a_word_or_behind_an_equals_sign(option, key, path):
    for words in ([option, path], [f"{option}={path}"]):
        assert compose_run(_overrides(["counter", *words, "seed=3"])).callback[key] == path


def test_a_file_that_is_not_there_ends_the_command_in_one_line(model_dir, tmp_path):
    common = ["warm_start=null", f"policy.model={model_dir}", "data.train=rows.jsonl"]
    refused = train(tmp_path, *common, "--load-rollouts", "kept/mine.jsonl")
    assert refused.returncode == 1
    assert refused.stderr.startswith("lightning-gym: kept/mine.jsonl does not exist; a run writes `rollouts.jsonl`")
    assert "Traceback" not in refused.stderr


# -- bad input


@pytest.fixture(scope="module")
def logged(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("logged")
    run(model_dir, directory, trainer={"max_steps": 1})
    return directory


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer": {"max_steps": 2}}, r"holds 2 groups, and no group 2.*max_steps"),
        ({"data": {"group_size": 2}}, r"has attempts \[0, 1, 2\], and group_size is 2"),
        ({"data": {"seed": 1}}, r"played task \d+ .*, this run deals task \d+"),
        (
            {"data": {"val": "given"}, "trainer": {"val_check_interval": 1, "max_steps": 1}},
            "no engine to validate with",
        ),
    ],
)
def test_a_run_that_does_not_fit_the_log_says_what_to_change(model_dir, tmp_path, logged, changes, said):
    if "val" in changes.get("data", {}):
        changes = {**changes, "data": {"val": rows(1)}}
    changes = {"trainer": {"max_steps": 1}, **changes}
    with pytest.raises(ConfigError, match=said):
        run(model_dir, tmp_path, replay=logged, **changes)


def test_ids_that_the_model_does_not_have_are_refused(model_dir, tmp_path, logged):
    other = tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1)
    other.resize_token_embeddings(40)
    with pytest.raises(ConfigError, match="and the model has 40"):
        run(model_dir, tmp_path, replay=logged, trainer={"max_steps": 1}, model=other)


def test_half_a_line_is_named_by_its_number(model_dir, tmp_path, logged):
    text = (logged / "rollouts.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(text[:-40])
    with pytest.raises(ConfigError, match=r"cut\.jsonl:7 is no rollout.*delete it"):
        Replay(tmp_path / "cut.jsonl")


def test_a_log_of_before_says_that_it_cannot_be_replayed(tmp_path):
    (tmp_path / "old.jsonl").write_text('{"format": "lightning_gym.rollouts/1", "model": "m"}\n')
    with pytest.raises(ConfigError, match="does not say how its rollouts were sampled"):
        Replay(tmp_path / "old.jsonl")


def test_a_callback_needs_something_to_play_with():
    with pytest.raises(ConfigError, match="replay="):
        GymCallback(engine=FakeEngine())
