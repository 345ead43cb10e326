"""Every shipped configuration composes, and its keys are arguments of what it names."""

import inspect

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate

from lightning_gym.conf_path import conf_dir

FOLDER = conf_dir() / "recipe"
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("[!_]*.yaml"))


def composed(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [*overrides])


def targets(node):
    """Every mapping with a ``_target_`` below `node`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_only_arguments_that_exist(recipe):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(composed(f"recipe={recipe}"), resolve=True)
    found = list(targets(config))
    assert {"policy", "data", "callback", "trainer"} <= config.keys()
    for node in found:
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        unknown = {key for key in node if not key.startswith("_")} - parameters.keys()
        assert not unknown, f"{node['_target_']} takes no {unknown}"


def test_the_callback_is_built_with_the_engine_and_gym_of_the_configuration():
    config = composed("recipe=counter", "engine.max_model_len=99", "sampling.temperature=0.5")
    callback = instantiate(config.callback, _convert_="all")
    assert callback.colocation.profiles["train"].temperature == 0.5
    assert callback.colocation._engine.max_model_len == 99


def test_a_strategy_is_an_option_of_the_trainer():
    config = composed("recipe=counter", "+trainer/strategy=fsdp2", "trainer.devices=2")
    strategy = instantiate(config.trainer, _convert_="all").strategy
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (2, 1)


def test_there_is_a_recipe_for_each_environment():
    assert {"counter", "reverse_string"} <= set(RECIPES)


def test_there_is_a_recipe_for_every_environment_of_real_gym_that_a_tiny_policy_is_built_for():
    from lightning_gym.gym_policy.build import ENVIRONMENTS
    from lightning_gym.gym_policy.environments import GYM_ENVIRONMENTS

    assert {f"gym/{name}" for name in ENVIRONMENTS} == {name for name in RECIPES if name.startswith("gym/")}
    assert {*GYM_ENVIRONMENTS, "blend"} == set(ENVIRONMENTS)
    for name, environment in GYM_ENVIRONMENTS.items():
        gym = composed(f"recipe=gym/{name}").gym
        assert (gym.config_paths, gym.get("max_steps")) == ([environment.config], environment.max_steps)


def test_a_run_without_a_model_or_data_says_what_is_missing():
    from omegaconf import MissingMandatoryValue

    with pytest.raises(MissingMandatoryValue, match="model"):
        composed().policy.model  # noqa: B018  reading it is the test
