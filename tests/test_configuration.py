"""A configuration is checked before anything is built, and a wrong name is answered with the right one."""

import json
import subprocess
import sys

import pytest

from lightning_gym.configuration import absent_packages, complete_overrides, compose_run
from lightning_gym.errors import ConfigError
from lightning_gym.model_files import check_model, find_config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recipe=countr", "there is no recipe 'countr'; did you mean 'counter'?"),
        ("loss=dappo", "there is no loss 'dappo'; did you mean 'dapo'?"),
        ("trainer=8x80g", "there is no trainer '8x80g'; did you mean '8x80gb'?"),
        ("polcy.lr=1", "the configuration has no 'polcy'; did you mean 'policy'?"),
        ("los=dapo", "the configuration has no 'los'; did you mean 'loss'?"),
        ("policy.lrr=1", "policy has no 'lrr'; did you mean 'lr'?"),
        ("+policy.lrr=1", "policy has no 'lrr'; did you mean 'lr'?"),
        ("data.group_sise=1", "data has no 'group_sise'; did you mean 'group_size'?"),
        ("trainer.max_stepss=1", "trainer has no 'max_stepss'; did you mean 'max_steps'?"),
        ("sampling.temprature=1", "sampling has no 'temprature'; did you mean 'temperature'?"),
        ("seed", "'seed' is no override"),
        ("engine._target_=lightning_gym.VLLMEngin", "_target_ 'lightning_gym.VLLMEngin' cannot be imported"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest_that_does(override, said):
    with pytest.raises(ConfigError) as refused:
        compose_run(["recipe=counter", override])
    assert str(refused.value).startswith(said)


def test_an_argument_that_no_file_mentions_can_be_overridden_without_a_plus():
    overrides = ["recipe=counter", "policy.kl_coefficient=0.1", "data.agent_weights.counter=2", "trainer.num_nodes=2"]
    cfg = compose_run(overrides)
    assert (cfg.policy.kl_coefficient, cfg.data.agent_weights.counter, cfg.trainer.num_nodes) == (0.1, 2, 2)
    assert complete_overrides(["--cfg", "job"]) == ["--cfg", "job"], "Hydra's own options are Hydra's"


def test_a_run_without_a_recipe_hears_what_is_missing_and_which_recipes_there_are():
    with pytest.raises(ConfigError, match=r"data.train and policy.model should be.*counter.*workplace_assistant"):
        compose_run([])


def test_a_package_that_is_not_installed_is_named():
    cfg = compose_run(["recipe=counter", "+policy.lr_scheduler._target_=no_such_package.Schedule"])
    assert absent_packages(cfg) == ["no_such_package.Schedule"]


def test_the_command_says_it_in_one_line():
    command = [sys.executable, "-m", "lightning_gym.train", "recipe=countr"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("lightning-gym: there is no recipe 'countr'; did you mean 'counter'?")
    assert "Traceback" not in done.stderr


# -- the files of a model


def write_model(directory, *, without=()):
    files = {"config.json": {}, "tokenizer.json": {}, "model.safetensors": {}}
    for name in files.keys() - set(without):
        (directory / name).write_text("{}")


@pytest.mark.parametrize(
    ("without", "said"),
    [("config.json", "missing config"), ("tokenizer.json", "a tokenizer"), ("model.safetensors", "missing weights")],
)
def test_a_model_directory_that_misses_files_is_refused_by_their_names(tmp_path, without, said):
    write_model(tmp_path, without=[without])
    with pytest.raises(ConfigError, match=said):
        check_model(tmp_path)


def test_a_shard_that_the_index_names_has_to_be_there(tmp_path):
    write_model(tmp_path, without=["model.safetensors"])
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(ConfigError, match=r"missing model-2\.safetensors"):
        check_model(tmp_path)


@pytest.mark.parametrize("model", ["./no/such/model", "/no/such/model", "outputs/a/model"])
def test_a_path_without_a_model_is_no_name_on_a_hub(model):
    with pytest.raises(ConfigError, match="there is no model directory"):
        check_model(model)


def test_the_dimensions_of_a_model_that_is_not_here_are_known_or_asked_for():
    config, source = find_config("Qwen/Qwen3-4B-Instruct-2507")
    assert (config.num_hidden_layers, source) == (36, "description")
    with pytest.raises(ConfigError, match=r"not among those.*Qwen/Qwen3-4B-Instruct-2507"):
        find_config("nobody/no-such-model")
