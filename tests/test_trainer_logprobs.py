"""The trainer's logprobs reach the run directory token for token, by rollout and segment."""

import json
from dataclasses import replace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.batch import pack_window
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym, tiny_batch, tiny_model, tiny_tokenizer, tiny_trajectory
from lightning_gym.trainer_logprobs import FILE_NAME, TrainerLogprobs, read_trainer_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")


def packed(*trajectories, share_prefix=False):
    ones = [1.0] * len(trajectories)
    (batch,) = pack_window(
        trajectories, ones, ones, num_micro_batches=1, max_tokens_per_micro_batch=100, share_prefix=share_prefix
    )
    return batch


def written(path, *batches, resume=False, step=3):
    """What is read after every token's index in its batch was logged as its logprob."""
    log = TrainerLogprobs(path, resume=resume)
    for batch in batches:
        log.add(batch, -torch.arange(batch.num_tokens)[None].float())
    log.write(step)
    log.close()
    return {(line.rollout_id, line.segment): line.logprobs for line in read_trainer_logprobs(path)}


def test_each_trained_token_is_found_under_its_rollout_and_segment(tmp_path):
    first = tiny_trajectory(num_prompt=2, num_trained=2, rollout_id="a")
    second = replace(tiny_trajectory(num_prompt=1, num_trained=1, rollout_id="a"), segment=1)
    other = tiny_trajectory(num_prompt=3, num_trained=1, rollout_id="b")
    batch = packed(first, second, other)
    found = written(tmp_path / "log.jsonl", batch)
    assert found.keys() == {("a", 0), ("a", 1), ("b", 0)}
    trained = np.flatnonzero(batch.loss_mask[0].numpy())
    assert sorted(-value for values in found.values() for value in values) == trained.tolist()
    assert [len(found["a", 0]), len(found["a", 1]), len(found["b", 0])] == [2, 1, 1]


def test_a_prompt_that_is_stored_once_shifts_no_logprob(tmp_path):
    attempts = [tiny_trajectory(num_prompt=3, num_trained=count, rollout_id=str(count)) for count in (1, 2, 3)]
    batch = packed(*attempts, share_prefix=True)
    assert batch.continues
    found = written(tmp_path / "log.jsonl", batch)
    assert {key: len(values) for key, values in found.items()} == {("1", 0): 1, ("2", 0): 2, ("3", 0): 3}
    for values in found.values():
        assert values == [values[0] - step for step in range(len(values))], "tokens that lie side by side"


def test_a_filler_belongs_to_nobody_and_is_not_written(tmp_path):
    assert written(tmp_path / "log.jsonl", tiny_batch()) == {}


def test_a_resumed_file_goes_on_and_another_runs_file_is_replaced(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    written(path, packed(tiny_trajectory(rollout_id="a")))
    assert len(written(path, packed(tiny_trajectory(rollout_id="b")), resume=True, step=4)) == 2
    assert len(written(path, packed(tiny_trajectory(rollout_id="c")))) == 1


def test_a_step_that_is_trained_again_after_a_checkpoint_stands_in_the_file_once(tmp_path):
    path = tmp_path / "log.jsonl"
    for step, rollout_id in enumerate("abc"):
        written(path, packed(tiny_trajectory(rollout_id=rollout_id)), resume=step > 0, step=step)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "rollout_')  # where the run was killed
    written(path, packed(tiny_trajectory(rollout_id="d")), resume=True, step=1)
    assert [line.rollout_id for line in read_trainer_logprobs(path)] == ["a", "d"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    written(path, packed(tiny_trajectory(rollout_id="a")))
    path.write_bytes(path.read_bytes() + b'{"step":4,"rollout_id":"b","segm')
    assert [line.rollout_id for line in read_trainer_logprobs(path)] == ["a"]


# -- all the way round


def fit(run_dir, policy):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(run_dir / "model")
    policy.model.config.save_pretrained(run_dir / "model")
    callback = GymCallback(
        engine=FakeEngine(max_model_len=96),
        gym=FakeGym(["counter"], max_steps=2),
        sampling=SamplingProfile(max_output_tokens=5),
        model_path=run_dir / "model",
        run_dir=run_dir,
    )
    import random

    data = GymDataModule([Counter.row(random.Random(0)) for _ in range(4)], prompts_per_step=2, group_size=3)
    trainer = L.Trainer(
        callbacks=[callback],
        max_steps=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(policy, datamodule=data)
    return callback


def policy(kind=PolicyModule):
    return kind(tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1), lr=1e-3)


def test_what_was_logged_agrees_with_the_engines_logprobs_of_every_rollout(tmp_path):
    callback = fit(tmp_path, policy())
    assert callback.history[0]["time/train_s"] > 0
    trainer = {(line.rollout_id, line.segment): line for line in read_trainer_logprobs(tmp_path / FILE_NAME)}
    _, rollouts = read_rollout_log(tmp_path / "rollouts.jsonl")
    engine = {
        (rollout["rollout_id"], index): (
            rollout["step"],
            [value for value, trains in zip(segment["logprobs"], segment["loss_mask"], strict=True) if trains],
        )
        for rollout in rollouts
        for index, segment in enumerate(rollout["segments"])
    }
    assert trainer.keys() == engine.keys()
    assert len(trainer) >= 12
    for key, line in trainer.items():
        step, logprobs = engine[key]
        assert line.step == step
        assert line.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_module_that_returns_its_loss_alone_leaves_no_lines(tmp_path):
    class LossOnly(PolicyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    fit(tmp_path, policy(LossOnly))
    assert (tmp_path / FILE_NAME).read_text() == ""


def test_one_line_is_plain_json(tmp_path):
    written(tmp_path / "log.jsonl", packed(tiny_trajectory(num_prompt=1, num_trained=2, rollout_id="a")))
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "rollout_id": "a", "segment": 0, "logprobs": [-1.0, -2.0]}
