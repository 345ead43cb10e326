"""A Trainer that cannot carry an engine is refused before anything starts, with what to use instead."""

import random
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.errors import ConfigError
from lightning_gym.gym.environments import Counter
from lightning_gym.preconditions import check_trainer
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {
    "max_steps": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def policy():
    return PolicyModule(tiny_model(tiny_tokenizer(), hidden_size=64, num_layers=1))


def data():
    rng = random.Random(0)
    return GymDataModule([Counter.row(rng) for _ in range(4)], prompts_per_step=2, group_size=2)


def refused(match, *, callbacks=(), module=None, **trainer):
    engine = FakeEngine()
    gym = GymCallback(engine=engine, gym=FakeGym())
    with pytest.raises(ConfigError, match=match):
        L.Trainer(**QUIET, **trainer, callbacks=[gym, *callbacks]).fit(module or policy(), datamodule=data())
    assert engine.events in ([], ["close"]), "the engine was not started"


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging])
def test_callbacks_that_swap_weights_are_refused(kind):
    averaging = kind(swa_lrs=0.1) if kind is StochasticWeightAveraging else kind()
    refused(f"{kind.__name__} swaps averaged weights", callbacks=[averaging])


@pytest.mark.parametrize("kind", [BatchSizeFinder, LearningRateFinder])
def test_callbacks_that_fit_trial_runs_are_refused(kind):
    module = policy()
    module.batch_size = 1  # the finder of batch sizes looks for one before anybody else's setup
    refused(f"{kind.__name__} fits trial runs", callbacks=[kind()], module=module)


def test_a_second_gym_callback_is_refused():
    refused("2 GymCallbacks", callbacks=[GymCallback(engine=FakeEngine(), gym=FakeGym())])


def trainer_of(strategy, *, num_devices=1):
    return SimpleNamespace(strategy=strategy, callbacks=[], num_devices=num_devices, num_nodes=1)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_wraps_the_module_around_a_sharded_policy_is_refused(kind):
    strategy = kind.__new__(kind)  # both want a GPU, and one a package
    strategy._launcher = None
    with pytest.raises(ConfigError, match=rf"{kind.__name__} is not supported.*ModelParallelStrategy.*FSDP2"):
        check_trainer(trainer_of(strategy), GymCallback)


def test_a_policy_may_be_cut_over_data_parallel_ranks_only():
    check_trainer(trainer_of(ModelParallelStrategy(2, 1), num_devices=2), GymCallback)
    for strategy in (ModelParallelStrategy(1, 2), ModelParallelStrategy()):
        with pytest.raises(ConfigError, match=r"cut over 2 tensor-parallel ranks.*tensor_parallel_size=1"):
            check_trainer(trainer_of(strategy, num_devices=2), GymCallback)


def test_a_callback_without_a_data_module_is_refused():
    class Own(PolicyModule):
        def train_dataloader(self):
            return [0]

    engine = FakeEngine()
    trainer = L.Trainer(**QUIET, callbacks=[GymCallback(engine=engine, gym=FakeGym())])
    with pytest.raises(ConfigError, match=r"no GymDataModule is attached.*datamodule="):
        trainer.fit(Own(policy().model))
    assert "start" not in engine.events


def test_a_data_module_without_a_callback_is_refused():
    with pytest.raises(ConfigError, match=r"no GymCallback; pass one"):
        L.Trainer(**QUIET).fit(policy(), datamodule=data())


def test_devices_that_are_not_the_processes_that_were_launched_are_refused(monkeypatch):
    """Lightning compares them for strategies of several devices only; with one device every process trains alone."""
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(name, value)
    callback, datamodule = GymCallback(engine=FakeEngine(), gym=FakeGym()), data()
    trainer = L.Trainer(**QUIET, devices=1, callbacks=[callback])
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    datamodule.trainer = trainer
    datamodule.setup("fit")
    with pytest.raises(ConfigError, match=r"started 2 processes, and the Trainer counts 1 .*set devices"):
        callback.setup(trainer, policy(), "fit")


def test_a_trainer_of_the_other_lightning_is_refused():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        pass

    gym = GymCallback(engine=FakeEngine(), gym=FakeGym())
    trainer = pytorch_lightning.Trainer(**QUIET, callbacks=[gym])
    with pytest.raises(ConfigError, match=r"comes from `pytorch_lightning`.*import lightning.pytorch as L"):
        trainer.fit(Other(), datamodule=data())
