"""LightningCLI takes our classes from their signatures."""

import json
import sys

import pytest

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
pytest.importorskip("typeshed_client", reason="LightningCLI needs jsonargparse[signatures]")


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
