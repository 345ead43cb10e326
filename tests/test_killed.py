"""A run that is killed at any moment, again and again, ends as one that was not; and its end takes everything along."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lightning_gym.gym.environments import Counter
from lightning_gym.rollout_log import read_rollout_log

ROOT = Path(__file__).parent.parent
KILLS = 20
MAX_STEPS = 40
GONE_S = 20.0
"""Within which a rank that lost another one, and all that either started, have to be gone."""

PRIZES = """
from lightning_gym.gym.environments import Counter


class Prize(Counter):
    # A reward that differs inside a group, so that an untrained policy has something to learn.
    name = "prize"

    def verify(self, response):
        return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)
"""

JOB = """
import json, os, sys
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gym import EmbeddedGym, GymCallback, GymDataModule, PolicyModule, VLLMEngine
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine

model_dir, run_dir, engine, devices, max_steps = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:6]
torch.set_num_threads(1)
events = os.open(run_dir / f"events_{os.environ.get('LOCAL_RANK', 0)}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def tell(**event):
    os.write(events, (json.dumps(event) + "\\n").encode())


class Tell(L.Callback):
    def on_train_start(self, trainer, pl_module):
        tell(pid=os.getpid())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        tell(begins=trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tell(step=trainer.global_step, loss=float(outputs["loss"]))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        tell(saves=trainer.global_step)


callback = GymCallback(
    engine=VLLMEngine(max_model_len=128, max_num_seqs=1, engine_args={"enable_prefix_caching": False})
    if engine == "vllm"
    else FakeEngine(max_model_len=128),
    gym=EmbeddedGym(["prizes:Prize"]),
    sampling=SamplingProfile(max_output_tokens=8),
    run_dir=run_dir,
)
saved = ModelCheckpoint(run_dir / "checkpoints", save_last=True, every_n_train_steps=1)
trainer = L.Trainer(
    max_steps=int(max_steps), accelerator="cpu", devices=int(devices), strategy="ddp" if int(devices) > 1 else "auto",
    logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, Tell(), saved],
)
data = GymDataModule(model_dir / "train.jsonl", prompts_per_step=2, group_size=2)
last = run_dir / "checkpoints" / "last.ckpt"
trainer.fit(PolicyModule(model_dir, lr=1e-3), datamodule=data, ckpt_path=last if last.exists() else None)
"""


@pytest.fixture(scope="module")
def job(model_dir, tmp_path_factory):
    """Starts a run and returns its process."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "prizes.py").write_text(PRIZES)
    (folder / "job.py").write_text(textwrap.dedent(JOB))
    rng = random.Random(0)
    rows = [Counter.row(rng) | {"agent_ref": {"name": "prize_simple_agent"}} for _ in range(7)]
    (model_dir / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = os.pathsep.join((str(folder), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(run_dir, engine, *, devices=1, max_steps=MAX_STEPS):
        run_dir.mkdir(exist_ok=True)
        with (run_dir / "output").open("w") as output:
            return subprocess.Popen(
                [sys.executable, folder / "job.py", model_dir, run_dir, engine, str(devices), str(max_steps)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    return start


def told(run_dir, rank=0):
    path = run_dir / f"events_{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition, what, *, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def family(process):
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def are_gone(processes):
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


def losses(run_dir):
    """Of every step, as the life that saved it saw it."""
    return {event["step"]: event["loss"] for event in told(run_dir) if "loss" in event}


def rollouts(run_dir):
    _, lines = read_rollout_log(run_dir / "rollouts.jsonl")
    return [
        (
            line["step"],
            line["task_index"],
            line["group_id"],
            line["attempt"],
            [segment["token_ids"] for segment in line["segments"]],
        )
        for line in lines
    ]


def ends(process, run_dir):
    assert process.wait(timeout=180) == 0, (run_dir / "output").read_text()[-3000:]


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["fake", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_run_that_is_killed_at_twenty_random_moments_plays_and_trains_what_an_uninterrupted_one_does(
    engine, job, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ends(job(whole, engine), whole)
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        before = len(told(killed))
        process = job(killed, engine)
        until = before + rng.randint(1, 8)
        wait_until(
            lambda process=process, until=until: len(told(killed)) >= until or process.poll() is not None,
            f"life {kills} did nothing: {(killed / 'output').read_text()[-3000:]}",
            timeout_s=120,
        )
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is not None:
            break
        all_of_it = family(process)
        process.kill()
        process.wait()
        kills += 1
        wait_until(lambda all_of_it=all_of_it: are_gone(all_of_it), "something outlived the run", timeout_s=GONE_S)
    ends(job(killed, engine), killed)
    assert kills == KILLS, "the run was over before it could be killed often enough"
    assert losses(killed) == losses(whole), "bit for bit"
    assert rollouts(killed) == rollouts(whole)


def dealt(run_dir):
    """Tasks, groups and attempts by step, of all ranks."""
    found = []
    for path in run_dir.glob("**/rollouts.jsonl"):
        found += [
            (line["step"], line["task_index"], line["group_id"], line["attempt"]) for line in read_rollout_log(path)[1]
        ]
    return sorted(found)


@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks_and_the_tasks_that_were_to_come(before, after, job, tmp_path):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    ends(job(whole, "fake", max_steps=6), whole)
    ends(job(changed, "fake", devices=before, max_steps=3), changed)
    ends(job(changed, "fake", devices=after, max_steps=6), changed)
    assert dealt(changed) == dealt(whole)


SAID = {
    signal.SIGKILL: r"RankLostError|Connection (closed|reset) by peer",
    signal.SIGTERM: r"rank {rank} received SIGTERM",
    signal.SIGINT: r"rank {rank} ends by KeyboardInterrupt",
}
"""What the output names as the cause."""


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(rank, number, marks=[pytest.mark.full] * (rank == 0 or number == signal.SIGINT))
        for rank in (0, 1)
        for number in SAID
    ],
)
def test_whichever_rank_is_stopped_both_end_with_all_that_they_started(rank, number, job, tmp_path):
    process = job(tmp_path, "fake", devices=2, max_steps=10_000)
    try:
        wait_until(
            lambda: all(any("loss" in event for event in told(tmp_path, of)) for of in (0, 1)),
            f"the run did not start: {(tmp_path / 'output').read_text()[-3000:]}",
            timeout_s=120,
        )
        all_of_it = family(process)
        started = time.monotonic()
        os.kill(next(event["pid"] for event in told(tmp_path, rank) if "pid" in event), number)
        code = process.wait(timeout=60)
        wait_until(lambda: are_gone(all_of_it), "something outlived the run", timeout_s=GONE_S)
    finally:
        process.kill()
    output = (tmp_path / "output").read_text()
    assert re.search(SAID[number].format(rank=rank), output), output[-3000:]
    # Lightning ends a fit after SIGTERM as one that is over; the rank that was not stopped lost the other one.
    assert (code == 0) == (number == signal.SIGTERM and rank == 0), output[-3000:]
    assert time.monotonic() - started < 60
