"""Validation on two ranks: the tasks are dealt out, and every rank logs what one process would."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightning_gym.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ranks

JOB = """
import json, random, sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym

model_dir, run_dir, devices, failing_rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def ids_decide(self, response):
    return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)


Counter.verify = ids_decide
rng = random.Random(0)
rows = [Counter.row(rng) for _ in range(7)]


class Plain(PolicyModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


trainer = L.Trainer(
    max_steps=1, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=1,
    enable_model_summary=False, log_every_n_steps=1, val_check_interval=1, check_val_every_n_epoch=None,
)
here = trainer.global_rank
callback = GymCallback(
    engine=FakeEngine(max_model_len=96),
    gym=FakeGym(max_steps=2, fault=lambda number: 500 if here == failing_rank and number >= 5 else None),
    sampling=SamplingProfile(max_output_tokens=5), run_dir=run_dir,
)
trainer.callbacks.append(callback)
val = {"one": rows[:2], "other": rows[2:]}
trainer.fit(Plain(model_dir), datamodule=GymDataModule(rows, val, val_samples=2, prompts_per_step=2, group_size=2))
found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
(run_dir / f"found-{trainer.global_rank}.json").write_text(json.dumps(found))
"""


def run_job(tmp_path, *, devices, failing_rank=-1):
    model_dir, run_dir = tmp_path / "policy", tmp_path / f"run-{devices}"
    run_dir.mkdir()
    if not model_dir.exists():
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(model_dir)
        tiny_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(model_dir)
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(JOB))
    done = subprocess.run(
        [sys.executable, script, model_dir, run_dir, str(devices), str(failing_rank)],
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, run_dir


def groups_of(path):
    return [json.loads(line)["group_id"] for line in path.read_text().splitlines()[1:]]


def test_two_ranks_share_the_tasks_and_log_what_one_does(tmp_path):
    found = []
    for devices in (1, 2):
        done, run_dir = run_job(tmp_path, devices=devices)
        assert done.returncode == 0, done.stderr
        found += [json.loads((run_dir / f"found-{rank}.json").read_text()) for rank in range(devices)]
    seconds = [values.pop("val/seconds") for values in found]
    assert found[1] == found[2]
    assert seconds[1] == seconds[2]
    assert found[0] == pytest.approx(found[1])
    assert (found[0]["val/tasks"], found[0]["val/attempts"], found[0]["val/one/tasks"]) == (7, 14, 2)
    first, second = (groups_of(run_dir / where) for where in ("val_rollouts.jsonl", "rank_1/val_rollouts.jsonl"))
    assert (set(first), set(second)) == ({0, 2, 4, 6}, {1, 3, 5})


def test_a_validation_that_fails_on_one_rank_ends_both_with_its_cause(tmp_path):
    done, _ = run_job(tmp_path, devices=2, failing_rank=1)
    assert done.returncode != 0
    assert "fault injected" in done.stderr
    assert "rank 1 failed: CollectionError" in done.stderr
