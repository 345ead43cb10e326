"""``lightning-gym train``: compose a configuration, build its parts, fit, and write down what happened."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from lightning_gym.callback import GymCallback
from lightning_gym.configuration import absent_packages, check_config, complete_overrides
from lightning_gym.errors import ConfigError, GymStartError
from lightning_gym.offline import stay_quiet
from lightning_gym.preconditions import check_trainer
from lightning_gym.ranks import launched
from lightning_gym.report import plot_reward, summarize, summary_line


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train as `cfg` says.

    Returns:
        The summary that is also written to ``summary.json``.

    Raises:
        ConfigError: a setting, a dataset row or a model directory is not usable.
    """
    log_to_terminal()
    check_config(cfg)
    output_dir = Path(cfg.output_dir)
    if absent := absent_packages(cfg):
        raise ConfigError(f"{', '.join(absent)}: not installed; see the extras of lightning-gym (peft: [lora])")
    stay_quiet(cfg.policy.model if isinstance(cfg.policy.model, str) else ".")
    reward_predicted = _reward_predicted(cfg.warm_start)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    callback: GymCallback = instantiate(cfg.callback, _convert_="all")
    data: L.LightningDataModule = instantiate(cfg.data, _convert_="all")
    policy: L.LightningModule = instantiate(cfg.policy, _convert_="all")
    loggers = [instantiate(logger, _convert_="all") for logger in (cfg.logger or {}).values()]
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=[callback], logger=loggers, _convert_="all")
    check_trainer(trainer, GymCallback)
    start = time.perf_counter()
    trainer.fit(policy, datamodule=data, ckpt_path=cfg.ckpt_path)
    summary = summarize(
        callback.history,
        seed=cfg.seed,
        train_seconds=time.perf_counter() - start - sum(callback.colocation.start_seconds.values()),
        start_seconds=callback.colocation.start_seconds,
        reward_predicted=reward_predicted,
    )
    _write(output_dir, summary, callback, reward_predicted)
    return summary


@rank_zero_only
def _write(output_dir: Path, summary: dict[str, Any], callback: GymCallback, reward_predicted: float | None) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_reward(callback.history, output_dir / "reward.png", reward_predicted=reward_predicted)
    print(summary_line(summary), flush=True)  # noqa: T201  the command's answer
    print(f"its curves and rollouts in one file: lightning-gym report {output_dir}", flush=True)  # noqa: T201


def _reward_predicted(warm_start: str | None) -> float | None:
    """What the record of a warm start predicts, if the run starts from one."""
    if warm_start is None:
        return None
    record = Path(warm_start) / "warm_start.json"
    if not record.is_file():
        environment, _, seed = Path(warm_start).name.partition("-seed")
        raise ConfigError(
            f"there is no warm start at {warm_start}; make one first: "
            f"lightning-gym warm-start {environment} --seed {seed or 0} --out {Path(warm_start).parent}"
        )
    return json.loads(record.read_text())["reward_predicted"]


def log_to_terminal() -> None:
    """Heartbeats and warnings of this package go to stderr; other libraries keep their own ways."""
    logger = logging.getLogger("lightning_gym")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


@hydra.main(config_path=None, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra's entry point; a mistake of the user's ends in one line instead of a traceback."""
    try:
        run(cfg)
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | RuntimeError | MisconfigurationException):
            raise
        sys.exit(f"lightning-gym: {error.__cause__}")  # what a constructor refused, Lightning's included
    except (ConfigError, GymStartError) as error:
        sys.exit(f"lightning-gym: {error}")


def _no_output_of_other_ranks() -> None:
    """Rank 0 alone writes Hydra's files: `output_dir` may hold a time, which every process reads for itself.

    Lightning's own launcher does the same for the processes it starts; torchrun and srun know nothing of Hydra.
    """
    rank, _ = launched()
    if rank:
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]


if __name__ == "__main__":
    try:
        sys.argv[1:] = complete_overrides(sys.argv[1:])
    except ConfigError as refused:
        sys.exit(f"lightning-gym: {refused}")
    _no_output_of_other_ranks()
    main()
