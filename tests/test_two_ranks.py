"""Two processes of Lightning's own launcher: the same run as one process, and one end for both."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_gym.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ranks

JOB = """
import random, sys
from pathlib import Path

import lightning.pytorch as L
import lightning.pytorch.strategies
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule
from lightning_gym.gym.environments import Counter
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym
from lightning_gym.weights import named_weights

model_dir, run_dir, strategy, failing_rank = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
devices = 1 if strategy == "auto" else 2
if strategy == "fsdp2":
    strategy = L.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

def ids_decide(self, response):
    return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)


Counter.verify = ids_decide
rng = random.Random(0)
rows = [Counter.row(rng) for _ in range(8)]


class Plain(PolicyModule):
    # AdamW's first step is the sign of the gradient, in which rounding shows; SGD shows the gradient.
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


policy = Plain(model_dir)
start = {name: tensor.clone() for name, tensor in named_weights(policy.model)}
trainer = L.Trainer(
    max_steps=2, accelerator="cpu", devices=devices, strategy=strategy,
    accumulate_grad_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, log_every_n_steps=1,
)
here = trainer.global_rank
gym = FakeGym(max_steps=2, fault=lambda number: 500 if here == failing_rank else None)
callback = GymCallback(
    engine=FakeEngine(max_model_len=96), gym=gym, sampling=SamplingProfile(max_output_tokens=5), run_dir=run_dir
)
trainer.callbacks.append(callback)
trainer.fit(policy, datamodule=GymDataModule(rows, prompts_per_step=4, group_size=2))
moved = torch.cat([(tensor - start[name]).flatten() for name, tensor in named_weights(policy.model)])
if trainer.is_global_zero:
    sharded = sum(hasattr(parameter, "full_tensor") for parameter in policy.parameters())
    torch.save({"moved": moved, "history": callback.history, "sharded": sharded}, run_dir / "end.pt")
"""


def run_job(tmp_path, strategy, *, failing_rank=-1):
    model_dir, run_dir = tmp_path / "policy", tmp_path / f"run-{strategy}"
    run_dir.mkdir()
    if not model_dir.exists():
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(model_dir)
        tiny_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(model_dir)
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(JOB))
    command = [sys.executable, script, model_dir, run_dir, strategy, str(failing_rank)]
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, run_dir


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank ends with."""
    done, run_dir = run_job(tmp_path_factory.mktemp("alone"), "auto")
    assert done.returncode == 0, done.stderr
    return torch.load(run_dir / "end.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_with_the_weights_and_metrics_of_one(alone, tmp_path, strategy):
    done, run_dir = run_job(tmp_path, strategy)
    assert done.returncode == 0, done.stderr
    one, two = alone, torch.load(run_dir / "end.pt")
    assert bool(two["sharded"]) == (strategy == "fsdp2")
    assert one["moved"].norm() > 0
    assert (one["moved"] - two["moved"]).norm() / one["moved"].norm() < 1e-5
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("rollout/reward_mean", "rollout/count", "batch/tokens", "batch/trained_tokens"):
            assert a[name] == pytest.approx(b[name]), name
    first, second = (
        (run_dir / where).read_text().splitlines() for where in ("rollouts.jsonl", "rank_1/rollouts.jsonl")
    )
    groups = [{json.loads(line)["group_id"] for line in lines[1:]} for lines in (first, second)]
    assert groups == [{0, 2, 4, 6}, {1, 3, 5, 7}], "whole groups, dealt to the ranks in turn"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_failure_on_one_rank_ends_both_with_its_cause(tmp_path, strategy):
    done, _ = run_job(tmp_path, strategy, failing_rank=1)
    assert done.returncode != 0
    assert "fault injected" in done.stderr
    assert "rank 1 failed: CollectionError" in done.stderr


@pytest.mark.vllm
def test_the_command_trains_on_two_ranks_with_an_engine_each(tmp_path):
    from lightning_gym.tiny_policy.build import TinyPolicy

    warm_start = TinyPolicy(environment="counter", seed=0).ensure(ROOT / "outputs" / "tiny_policy")
    overrides = [f"warm_start={warm_start}", f"output_dir={tmp_path}", "trainer.max_steps=3"]
    command = [sys.executable, "-m", "lightning_gym.cli", "train", "counter", *overrides]
    done = subprocess.run(
        [*command, "trainer.devices=2", "+trainer.strategy=ddp"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["rollouts"] == 3 * 64
    assert summary["misaligned"] == summary["dropped"] == 0
    assert summary["max_logprob_diff"] <= 1e-4
