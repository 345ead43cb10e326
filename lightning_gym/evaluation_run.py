"""EvaluationRun: a model or a checkpoint over a dataset, without training. What ``lightning-gym eval`` does."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from lightning_gym.callback import GymCallback
from lightning_gym.configuration import compose_run
from lightning_gym.datamodule import GymDataModule
from lightning_gym.evaluation import Evaluation
from lightning_gym.export import read_checkpoint
from lightning_gym.model_dir import check_model_dir, full_disk_named
from lightning_gym.offline import stay_quiet
from lightning_gym.report import versions
from lightning_gym.scores import score_table

RESULT = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRun:
    """What is evaluated on what.

    Args:
        overrides: Hydra's: a recipe, and what to change in it. Its policy, engine, Gym, sampling and data hold where
            nothing below says otherwise; ``ckpt_path=FILE`` takes the weights of a checkpoint.
        model: directory of a transformers model, or a checkpoint of a Trainer, in place of the recipe's policy.
        model_path: directory with the config and tokenizer of a checkpoint that does not say where they are.
        rows: dataset rows in place of the recipe's; ``None``: its ``data.val``, or its ``data.train`` if it has none.
        gym: in place of the recipe's: an environment that `lightning_gym.EmbeddedGym` takes, a YAML file of Gym's, or
            the URL of a running head server.
        num_samples: attempts at each task; ``None``: the recipe's ``data.val_samples``, or 1.
        limit: how many tasks are played; ``None``: all.
        out: directory for ``evaluation.json`` and ``val_rollouts.jsonl``; ``None``: ``eval`` in the recipe's output.
    """

    overrides: Sequence[str] = ()
    model: Path | None = None
    model_path: Path | None = None
    rows: Path | None = None
    gym: str | None = None
    num_samples: int | None = None
    limit: int | None = None
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """Play and score.

        Returns:
            What is also written to ``evaluation.json``.

        Raises:
            ConfigError: a setting, a row or a model is not usable.
            CollectionError: too many attempts failed.
        """
        cfg = self._configuration()
        out = self.out or Path(cfg.output_dir) / "eval"
        stay_quiet(str(cfg.policy.model))
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        policy = self._policy(cfg)
        callback: GymCallback = instantiate(cfg.callback, run_dir=str(out), _convert_="all")
        data = self._data(cfg)
        quiet = {"logger": False, "enable_progress_bar": False, "limit_val_batches": self.limit or 1.0}
        trainer: L.Trainer = instantiate(cfg.trainer, callbacks=[callback], **quiet, _convert_="all")
        trainer.validate(policy, datamodule=data, ckpt_path=cfg.ckpt_path, verbose=False)
        assert callback.last_evaluation is not None
        result = self._result(cfg, callback.last_evaluation, out)
        if trainer.is_global_zero:
            with full_disk_named(out / RESULT):
                (out / RESULT).write_text(json.dumps(result, indent=2) + "\n")
        return result

    def _configuration(self) -> DictConfig:
        overrides = list(self.overrides)
        if self.model is not None:
            if not self.model.is_file():
                check_model_dir(self.model)
            overrides.append(f"policy.model={json.dumps(str(self.model))}")
        if self.rows is not None:
            overrides.append(f"data.train={json.dumps(str(self.rows))}")
        if self.gym is not None and self.gym.startswith(("http://", "https://")):
            overrides += ["~gym", f"+gym={{_target_: lightning_gym.AttachedGym, head_url: {json.dumps(self.gym)}}}"]
        elif self.gym is not None and self.gym.endswith((".yaml", ".yml")):
            overrides += ["~gym", f"+gym={{_target_: lightning_gym.NemoGym, config_paths: [{json.dumps(self.gym)}]}}"]
        elif self.gym is not None:
            overrides += [
                "~gym",
                f"+gym={{_target_: lightning_gym.EmbeddedGym, environments: [{json.dumps(self.gym)}]}}",
            ]
        return compose_run(overrides)

    def _policy(self, cfg: DictConfig) -> L.LightningModule:
        if self.model is not None and self.model.is_file():
            checkpoint = read_checkpoint(self.model, model_path=self.model_path)
            return instantiate(cfg.policy, model=checkpoint.model(), _convert_="all")
        return instantiate(cfg.policy, _convert_="all")

    def _data(self, cfg: DictConfig) -> GymDataModule:
        rows: Any = str(self.rows) if self.rows else cfg.data.get("val") or cfg.data.train
        with open_dict(cfg):
            cfg.data.train = cfg.data.val = rows
            cfg.data.val_samples = self.num_samples or cfg.data.get("val_samples") or 1
        return instantiate(cfg.data, _convert_="all")

    def _result(self, cfg: DictConfig, evaluation: Evaluation, out: Path) -> dict[str, Any]:
        profile = cfg.eval_sampling or cfg.sampling
        return {
            "model": str(self.model or cfg.policy.model),
            "checkpoint": None if cfg.ckpt_path is None else str(cfg.ckpt_path),
            "rows": str(self.rows or cfg.data.val),
            "samples": evaluation.num_samples,
            "seed": cfg.seed,
            "sampling": {key: value for key, value in profile.items() if key != "_target_"},
            "seconds": round(evaluation.seconds, 2),
            "scores": [asdict(score) for score in evaluation.scores],
            "table": score_table(evaluation.scores),
            "gym_metrics": evaluation.gym_metrics,
            "rollouts": str(out / "val_rollouts.jsonl"),
            "versions": versions(),
        }
