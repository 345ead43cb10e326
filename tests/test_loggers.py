"""Loggers: CSV and TensorBoard get every number of training and validation, without code."""

import csv
import random

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_csv_and_tensorboard_get_everything(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "policy")
    tiny_model(tokenizer, hidden_size=32, num_layers=1, num_kv_heads=1).save_pretrained(tmp_path / "policy")
    rng = random.Random(0)
    rows = [Counter.row(rng) for _ in range(4)]
    callback = GymCallback(
        engine=FakeEngine(max_model_len=96),
        gym=FakeGym(["counter"], max_steps=2),
        sampling=SamplingProfile(max_output_tokens=5),
        run_dir=tmp_path,
    )
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=[CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tensorboard", "")],
        log_every_n_steps=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = GymDataModule(rows, rows[:2], val_samples=2, prompts_per_step=2, group_size=2)
    trainer.fit(PolicyModule(tmp_path / "policy"), datamodule=data)
    expected = {name for entry in [*callback.history, *callback.evaluations] for name in entry} - {"step"}
    assert {"rollout/reward_mean", "train/loss", "time/train_s", "val/reward_mean", "val/pass_at_2"} <= expected
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        written = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert expected <= written
    assert expected <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("val/reward_mean")] == pytest.approx(
        [entry["val/reward_mean"] for entry in callback.evaluations]
    )
    assert any(name.startswith("rollout/reward/") for name in events.Tags()["histograms"])
