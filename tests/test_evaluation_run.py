"""lightning-gym eval and generate: models and checkpoints over a dataset, rollouts for a later run; nothing trains."""

import json
import random
import shutil
from pathlib import Path

import pytest

from lightning_gym.cli import main
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
FAKE_ENGINE = ["~engine", "+engine={_target_: lightning_gym.testing.FakeEngine, max_model_len: 96}"]
FAKE_GYM = ["~gym", "+gym={_target_: lightning_gym.testing.FakeGym, max_steps: 2}"]
SHORT = ["sampling.max_output_tokens=5", "++trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=32, num_layers=1, num_kv_heads=1).save_pretrained(directory)
    rng = random.Random(0)
    lines = [json.dumps(Counter.row(rng)) for _ in range(4)]
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(autouse=True)
def varied(monkeypatch):
    def ids_decide(self, response):
        return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 2)

    monkeypatch.setattr(Counter, "verify", ids_decide)


def recipe(model_dir, out, *further):
    return ["counter", f"warm_start={model_dir}", f"output_dir={out}", *FAKE_ENGINE, *FAKE_GYM, *SHORT, *further]


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_recipes_policy_over_its_own_rows(model_dir, tmp_path, capsys):
    out = run(capsys, "eval", *recipe(model_dir, tmp_path), "--samples", 4)
    head, line, where = out.splitlines()
    assert head.split()[:6] == ["tasks", "attempts", "failed", "reward", "pass@1", "pass@2"]
    assert line.split()[:4] == ["all", "4", "16", "0"]
    assert where == str(tmp_path / "eval" / "val_rollouts.jsonl")
    result = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    (score,) = result["scores"]
    lines = list(read_rollout_log(tmp_path / "eval" / "val_rollouts.jsonl")[1])
    assert score["reward"]["mean"] == pytest.approx(sum(line["reward"] for line in lines) / 16)
    assert score["reward"]["error"] > 0
    (by_gym,) = result["gym_metrics"].values()
    assert by_gym["mean/reward"] == pytest.approx(score["reward"]["mean"])
    assert not (tmp_path / "eval" / "rollouts.jsonl").exists(), "nothing was trained on"


def test_json_for_machines_and_a_limit(model_dir, tmp_path, capsys):
    out = run(capsys, "eval", *recipe(model_dir, tmp_path), "--json", "--limit", 3, "--out", tmp_path / "here")
    result = json.loads(out)
    assert (result["samples"], result["scores"][0]["num_tasks"]) == (1, 3)
    assert result == json.loads((tmp_path / "here" / "evaluation.json").read_text())
    assert result["sampling"]["max_output_tokens"] == 5


def checkpoint_of(model_dir, path):
    """A checkpoint of other weights than the directory's, as the Trainer writes one."""
    import lightning.pytorch as L
    import torch

    from lightning_gym import GymCallback, PolicyModule
    from lightning_gym.testing import FakeEngine, FakeGym

    policy = PolicyModule(model_dir)
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(20.0)
    callback = GymCallback(engine=FakeEngine(), gym=FakeGym())
    trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(policy)
    policy.trainer = trainer
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_is_the_same_by_its_recipe_by_itself_and_as_what_it_exports(model_dir, tmp_path, capsys):
    path = checkpoint_of(model_dir, tmp_path / "a.ckpt")
    main(["export", str(path), str(tmp_path / "exported")])
    common = ["--json", "--samples", 3, "--rows", model_dir / "train.jsonl"]
    alone = [*FAKE_ENGINE, *FAKE_GYM, *SHORT]
    capsys.readouterr()
    found = {
        "recipe": run(capsys, "eval", *recipe(model_dir, tmp_path / "1", f"ckpt_path={path}"), *common),
        "itself": run(capsys, "eval", *alone, "--model", path, "--out", tmp_path / "2", *common),
        "exported": run(capsys, "eval", *alone, "--model", tmp_path / "exported", "--out", tmp_path / "3", *common),
        "start": run(capsys, "eval", *alone, "--model", model_dir, "--out", tmp_path / "4", *common),
    }
    ids = {
        name: [line["segments"][0]["token_ids"] for line in read_rollout_log(Path(json.loads(said)["rollouts"]))[1]]
        for name, said in found.items()
    }
    assert ids["recipe"] == ids["itself"] == ids["exported"] != ids["start"]


def test_an_environment_by_its_name(model_dir, tmp_path, capsys):
    alone = [*FAKE_ENGINE, *SHORT, "--model", model_dir, "--rows", model_dir / "train.jsonl"]
    out = run(capsys, "eval", *alone, "--gym", "counter", "--out", tmp_path, "--json")
    assert json.loads(out)["scores"][0]["num_attempts"] == 4


def test_generated_rollouts_are_what_a_run_trains_on(model_dir, tmp_path, capsys):
    overrides = recipe(model_dir, tmp_path, "data.prompts_per_step=2", "data.group_size=4")
    out = run(capsys, "generate", *overrides, "--steps", 2, "--save-rollouts", tmp_path / "mine" / "r.jsonl")
    assert out.strip() == str(tmp_path / "mine" / "r.jsonl")
    lines = list(read_rollout_log(tmp_path / "mine" / "r.jsonl")[1])
    assert [line["group_id"] for line in lines] == [group for group in range(4) for _ in range(4)]
    assert {segment["weight_version"] for line in lines for segment in line["segments"]} == {0}

    from lightning_gym.configuration import compose_run
    from lightning_gym.train import run as train

    cfg = compose_run(
        [
            "recipe=counter",
            *overrides[1:],
            "warm_start=null",
            f"policy.model={model_dir}",
            f"data.train={model_dir}/train.jsonl",
            f"++callback.replay={tmp_path}/mine/r.jsonl",
            "trainer.max_steps=2",
            "+trainer.enable_progress_bar=false",
            "+trainer.enable_checkpointing=false",
        ]
    )
    summary = train(cfg)
    assert (summary["steps"], summary["rollouts"]) == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gym", "counter"], "nothing says what data.train and policy.model should be"),
        (["--model", "gone"], "there is no model directory gone"),
        (["countr"], "did you mean 'counter'"),
    ],
)
def test_what_is_missing_is_named(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *arguments])
    assert said in str(stopped.value)


def test_a_model_without_rows_asks_for_them(model_dir):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(model_dir)])
    assert "nothing says what data.train should be" in str(stopped.value)


def test_a_model_directory_that_misses_its_tokenizer_is_named(model_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(broken), "--rows", str(model_dir / "train.jsonl")])
    assert "is missing a tokenizer" in str(stopped.value)
