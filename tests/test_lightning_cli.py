"""LightningCLI takes our classes from their signatures."""

import json
import random
import sys

import pytest


@pytest.fixture
def printed(capsys, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    from lightning_gym import GymDataModule, PolicyModule

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py"])
        with pytest.raises(SystemExit) as stopped:
            LightningCLI(PolicyModule, GymDataModule, args=["fit", *arguments, "--print_config"])
        assert stopped.value.code in {0, None}
        return capsys.readouterr().out

    return run


def test_the_whole_configuration_is_printed_with_our_defaults(printed):
    import yaml

    config = yaml.safe_load(printed("--model.model=policy", "--data.train=train.jsonl", "--data.val=val.jsonl"))
    assert (config["model"]["loss"], config["model"]["lr"]) == ("grpo", 1e-6)
    assert (config["data"]["train"], config["data"]["val"], config["data"]["val_samples"]) == (
        "train.jsonl",
        "val.jsonl",
        1,
    )


def test_engine_gym_and_sampling_are_given_by_their_classes(printed, tmp_path):
    import yaml

    callback = {
        "class_path": "lightning_gym.GymCallback",
        "init_args": {
            "engine": {"class_path": "lightning_gym.VLLMEngine", "init_args": {"max_model_len": 512}},
            "gym": {"class_path": "lightning_gym.EmbeddedGym", "init_args": {"environments": ["counter"]}},
            "eval_sampling": {"class_path": "lightning_gym.SamplingProfile", "init_args": {"temperature": 0.0}},
        },
    }
    given = {
        "trainer": {"max_steps": 3, "callbacks": [callback]},
        "model": {"model": "policy", "loss": "dapo"},
        "data": {"train": "train.jsonl", "val": {"easy": "easy.jsonl", "hard": "hard.jsonl"}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(given))
    config = yaml.safe_load(printed(f"--config={path}"))
    (found,) = config["trainer"]["callbacks"]
    assert found["init_args"]["engine"]["init_args"]["max_model_len"] == 512
    assert found["init_args"]["gym"]["init_args"]["environments"] == ["counter"]
    assert config["data"]["val"] == {"easy": "easy.jsonl", "hard": "hard.jsonl"}


# Lightning 2.6.6 calls what jsonargparse 4.49 has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
@pytest.mark.usefixtures("one_thread")
def test_the_printed_configuration_trains(printed, model_dir, tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    from lightning_gym import GymCallback, GymDataModule, PolicyModule
    from lightning_gym.gym.environments import Counter

    rng = random.Random(0)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(Counter.row(rng)) + "\n" for _ in range(4)))
    callback = {
        "class_path": "lightning_gym.GymCallback",
        "init_args": {
            "engine": {"class_path": "lightning_gym.testing.FakeEngine", "init_args": {"max_model_len": 96}},
            "gym": {"class_path": "lightning_gym.testing.FakeGym", "init_args": {"environments": ["counter"]}},
            "sampling": {"class_path": "lightning_gym.SamplingProfile", "init_args": {"max_output_tokens": 5}},
        },
    }
    given = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [callback],
        },
        "model": {"model": str(model_dir)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "prompts_per_step": 1, "group_size": 2},
    }
    (tmp_path / "given.yaml").write_text(json.dumps(given))
    (tmp_path / "config.yaml").write_text(printed(f"--config={tmp_path / 'given.yaml'}"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by Lightning, and not for the next test
        monkeypatch.setenv(name, "0")
    cli = LightningCLI(PolicyModule, GymDataModule, args=["fit", f"--config={tmp_path / 'config.yaml'}"])
    assert cli.trainer.global_step == 1
    (played,) = [callback.history for callback in cli.trainer.callbacks if isinstance(callback, GymCallback)]
    assert played[0]["rollout/count"] == 2
