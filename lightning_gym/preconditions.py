"""What a Lightning Trainer must be for a `GymCallback` to work in it; checked before anything starts."""

from collections.abc import Sequence

import lightning.pytorch as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_gym.errors import ConfigError
from lightning_gym.ranks import launched

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


def check_trainer(trainer: L.Trainer, kind: type[L.Callback]) -> None:
    """Refuse a Trainer in which an engine cannot share the policy.

    Args:
        trainer: in its ``setup`` phase.
        kind: the callback's class, of which there may be one.

    Raises:
        ConfigError: names the setting and what to use instead.
    """
    _check_strategy(trainer)
    _check_callbacks(trainer.callbacks, kind)  # type: ignore[attr-defined]  the Trainer's connector sets it


def check_same_lightning(trainer: object) -> None:
    """Refuse a Trainer of the ``pytorch_lightning`` package, whose classes are others than ``lightning.pytorch``'s.

    Raises:
        ConfigError: names the import to change.
    """
    if type(trainer).__module__.startswith("pytorch_lightning."):
        raise ConfigError(
            "the Trainer comes from `pytorch_lightning`, and lightning_gym's classes from `lightning.pytorch`; the two "
            "do not mix. Use `import lightning.pytorch as L` for the Trainer, the module and the callbacks"
        )


def _check_strategy(trainer: L.Trainer) -> None:
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            "the strategy forks or spawns its workers from this process (ddp_spawn, ddp_fork, ddp_notebook), which "
            "cannot carry an engine and get no clean-up; use strategy='ddp', torchrun or `fabric run`"
        )
    if not isinstance(trainer.strategy, _SUPPORTED) or isinstance(
        trainer.strategy, DeepSpeedStrategy
    ):  # which is a DDP
        raise ConfigError(
            f"{type(trainer.strategy).__name__} is not supported: it flattens or partitions the policy inside a "
            "wrapper of the LightningModule, where a callback cannot call the policy alone. Use strategy='ddp', or "
            "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), which is FSDP2"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _check_mesh(trainer.strategy, trainer.num_devices)
    _, size = launched()
    counted = trainer.num_devices * trainer.num_nodes  # world_size is the launcher's word again, for DDP
    if size not in {1, counted}:
        raise ConfigError(
            f"a launcher started {size} processes, and the Trainer counts {counted} (devices x num_nodes): set devices "
            "to the number of processes on each node, or start the script with plain `python`"
        )


def _check_mesh(strategy: ModelParallelStrategy, num_devices: int) -> None:
    asked = strategy._tensor_parallel_size  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  the mesh comes later
    size = num_devices if asked == "auto" else int(asked)
    if size > 1:
        raise ConfigError(
            f"the policy is cut over {size} tensor-parallel ranks, which would each play the same tasks and train on "
            "different rollouts. Use ModelParallelStrategy(data_parallel_size=<all devices>, tensor_parallel_size=1); "
            "its defaults are one data-parallel rank a node"
        )


def _check_callbacks(callbacks: Sequence[L.Callback], kind: type[L.Callback]) -> None:
    found = sum(isinstance(callback, kind) for callback in callbacks)
    if found > 1:
        raise ConfigError(f"the Trainer has {found} {kind.__name__}s; one engine plays for one policy, pass one")
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} swaps averaged weights into the policy without an optimizer step, so the "
                "engine would sample from weights that nobody trains; average checkpoints after the run instead"
            )
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise ConfigError(
                f"{type(callback).__name__} fits trial runs, each of which would play rollouts; leave it out: "
                "micro-batches are sized by accumulate_grad_batches and max_tokens_per_micro_batch"
            )
