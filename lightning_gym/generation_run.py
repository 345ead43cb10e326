"""GenerationRun: rollouts of a recipe's policy as it stands, written for a replay; nothing trains."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import instantiate

from lightning_gym.callback import GymCallback
from lightning_gym.configuration import compose_run
from lightning_gym.datamodule import GymDataModule
from lightning_gym.offline import stay_quiet
from lightning_gym.ranks import Ranks
from lightning_gym.rollout_log import FILE_NAME, RolloutLog


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRun:
    """What is played.

    Args:
        overrides: Hydra's, as ``lightning-gym train`` takes them.
        num_steps: optimizer steps for which there are to be rollouts.
        path: of the log; ``None``: ``rollouts.jsonl`` in the recipe's output directory.
    """

    overrides: Sequence[str]
    num_steps: int
    path: Path | None = None

    def run(self) -> Path:
        """Play, one step's rollouts after the other, all with the weights the policy has.

        Returns:
            The log, for ``lightning-gym train --load-rollouts``.

        Raises:
            ConfigError: a setting, a row or a model is not usable.
            CollectionError: too many rollouts failed, or those of a step teach nothing.
        """
        cfg = compose_run(self.overrides)
        stay_quiet(str(cfg.policy.model))
        path = self.path or Path(cfg.output_dir) / FILE_NAME
        policy = instantiate(cfg.policy, _convert_="all")
        callback: GymCallback = instantiate(cfg.callback, _convert_="all")
        data: GymDataModule = instantiate(cfg.data, _convert_="all")
        model = callback.find_policy(policy)
        model_path = callback.path_of(model)
        stream, colocation = data.make_stream(), callback.colocation
        stream.prepare = list  # nothing trains, so nothing is to be filled in
        stream.log = RolloutLog(path, model_path, sampling=colocation.profiles["train"])
        micro_batches = cfg.trainer.get("accumulate_grad_batches", 1)
        try:
            run_id = uuid.uuid4().hex[:8]
            colocation.start(model, model_path, stream.tasks, run_dir=path.parent, run_id=run_id, ranks=Ranks())
            for _ in range(self.num_steps):
                stream.window(colocation, version=0, num_micro_batches=micro_batches, loss_divisor=micro_batches)
        finally:
            colocation.close()
            stream.log.close()
        return path
