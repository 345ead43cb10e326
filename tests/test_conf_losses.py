"""Every published method that the configuration ships is the one that `lightning_gym.losses` writes down."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_gym.conf_path import conf_dir
from lightning_gym.losses import METHODS, loss_named

SHIPPED = sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml"))


def test_every_method_is_shipped():
    assert sorted(METHODS) == SHIPPED


@pytest.mark.parametrize("method", SHIPPED)
def test_a_method_composes_with_a_recipe_to_its_loss_and_its_batch_settings(method):
    length = ["data.constant_length=64"] if METHODS[method]["aggregation"] == "constant" else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["recipe=counter", f"loss={method}", *length])
        plain = compose("train", ["recipe=counter"])
    assert config.policy.loss == method
    assert loss_named(config.policy.loss)
    data = OmegaConf.to_container(config.data)
    assert {name: data[name] for name in METHODS[method]} == METHODS[method]
    assert config.policy.lr == plain.policy.lr
