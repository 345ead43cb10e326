"""Every launcher starts the same run: two ranks, one output directory, the rollouts of one process."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gym.gym.environments import Counter
from lightning_gym.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PLAIN = [sys.executable, "-m", "lightning_gym.train"]
COMMAND = [sys.executable, "-m", "lightning_gym.cli", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
FABRIC = [BIN / "fabric", "run", "--devices", "2", "--main-port", "29411"]

LAUNCHERS = {
    "python": [*PLAIN, "trainer.devices=2"],
    "command": [*COMMAND, "--devices", "2"],
    "torchrun": [*TORCHRUN, "lightning_gym.train", "trainer.devices=2"],
    "fabric": [*FABRIC, BIN / "lightning-gym", "train", "trainer.devices=2"],
}

pytestmark = [pytest.mark.ranks, pytest.mark.full]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=64, num_layers=1).save_pretrained(directory)
    rng = random.Random(0)
    (directory / "train.jsonl").write_text("".join(json.dumps(Counter.row(rng)) + "\n" for _ in range(6)))
    return directory


def fakes(model_dir, output_root):
    """A small run with fakes, in a directory that has the time in its name."""
    return [
        f"policy.model={model_dir}",
        f"data.train={model_dir}/train.jsonl",
        "+data.prompts_per_step=4",
        "+data.group_size=2",
        "sampling.max_output_tokens=5",
        "engine._target_=lightning_gym.testing.FakeEngine",
        "~engine.seed",
        "+engine.max_model_len=96",
        "gym._target_=lightning_gym.testing.FakeGym",
        "+gym.max_steps=2",
        "trainer=cpu",
        "trainer.max_steps=2",
        f"output_dir={output_root}/${{now:%H-%M-%S-%f}}",
    ]


def environment(**more):
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", **more}


def launch(command, overrides, *, timeout=180):
    return subprocess.run(
        [*command, *overrides],
        check=False,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def srun(overrides, *, devices=2, timeout=180):
    """What srun does for a job of two tasks on one node: the program twice, told apart by variables."""
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "train",
        "MASTER_ADDR": "127.0.0.1",
    }
    ranks = [
        subprocess.Popen(
            [*PLAIN, f"trainer.devices={devices}", *overrides],
            cwd=ROOT,
            env=environment(**common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], outputs


def only_directory(root):
    directories = list(root.iterdir())
    assert len(directories) == 1, "one output directory for all ranks"
    return directories[0]


def rewards(output_dir):
    with (output_dir / "csv" / "metrics.csv").open() as file:
        return [row["rollout/reward_mean"] for row in csv.DictReader(file)]


def check_run(output_root, alone):
    output_dir = only_directory(output_root)
    names = {path.name for path in output_dir.iterdir()}
    assert {"summary.json", "reward.png", "rollouts.jsonl", "config", "csv", "tensorboard", "rank_1"} <= names
    assert {path.name for path in (output_dir / "rank_1").iterdir()} == {"rollouts.jsonl", "trainer_logprobs.jsonl"}
    assert json.loads((output_dir / "summary.json").read_text())["rollouts"] == 2 * 8
    assert rewards(output_dir) == rewards(alone)
    lines = [(output_dir / where / "rollouts.jsonl").read_text().splitlines()[1:] for where in (".", "rank_1")]
    expected = (alone / "rollouts.jsonl").read_text().splitlines()[1:]
    assert sorted(map(tokens, [*lines[0], *lines[1]])) == sorted(map(tokens, expected))


def tokens(line):
    rollout = json.loads(line)
    ids = [segment["token_ids"] for segment in rollout["segments"]]
    return rollout["step"], rollout["group_id"], rollout["attempt"], ids


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    done = launch(PLAIN, fakes(model_dir, root))
    assert done.returncode == 0, done.stdout
    return only_directory(root)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_plays_the_rollouts_of_one_process_into_one_directory(launcher, model_dir, alone, tmp_path):
    done = launch(LAUNCHERS[launcher], fakes(model_dir, tmp_path))
    assert done.returncode == 0, done.stdout
    check_run(tmp_path, alone)


def test_tasks_of_slurm_play_the_rollouts_of_one_process_into_one_directory(model_dir, alone, tmp_path):
    codes, outputs = srun(fakes(model_dir, tmp_path))
    assert codes == [0, 0], outputs
    check_run(tmp_path, alone)


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_that_torchrun_did_not_start_are_refused_in_one_line(model_dir, tmp_path, devices):
    done = launch([*TORCHRUN, "lightning_gym.train", f"trainer.devices={devices}"], fakes(model_dir, tmp_path))
    assert done.returncode != 0
    assert f"lightning-gym: a launcher started 2 processes, and the Trainer counts {devices}" in done.stdout
    assert "lightning_gym/train.py" not in done.stdout, "one line, no traceback"


def test_what_a_constructor_refuses_is_one_line(model_dir, tmp_path):
    done = launch(PLAIN, [*fakes(model_dir, tmp_path), "data.group_size=1"])
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("lightning-gym: group_size is 1")
    assert "Traceback" not in done.stdout


def test_devices_that_srun_did_not_start_are_refused_in_one_line(model_dir, tmp_path):
    codes, outputs = srun(fakes(model_dir, tmp_path), devices=1)
    assert codes == [1, 1]
    for output in outputs:
        assert "lightning-gym: a launcher started 2 processes, and the Trainer counts 1" in output


# -- the real engine: the counter task is learned under every launcher


def counter(output_dir, steps):
    from lightning_gym.tiny_policy.build import TinyPolicy

    warm_start = TinyPolicy(environment="counter", seed=0).ensure(ROOT / "outputs" / "tiny_policy")
    return ["recipe=counter", f"warm_start={warm_start}", f"output_dir={output_dir}", f"trainer.max_steps={steps}"]


def check_learned(output_dir, *, steps):
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["rollouts"] == steps * 64
    assert summary["misaligned"] == summary["dropped"] == 0
    assert summary["max_logprob_diff"] <= 1e-4
    full = steps == 120
    assert summary["reward_last10"] >= (0.9 if full else summary["reward_predicted"] + 0.25)


@pytest.mark.vllm
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_counter_is_learned_under_a_launcher(launcher, tmp_path):
    steps = 120 if launcher == "torchrun" else 40
    done = launch(LAUNCHERS[launcher], counter(tmp_path, steps), timeout=280)
    assert done.returncode == 0, done.stdout
    check_learned(tmp_path, steps=steps)


@pytest.mark.vllm
def test_the_counter_is_learned_in_a_slurm_job(tmp_path):
    codes, outputs = srun(counter(tmp_path, 40), timeout=280)
    assert codes == [0, 0], outputs
    check_learned(tmp_path, steps=40)


@pytest.mark.vllm
def test_the_counter_is_learned_by_a_policy_cut_over_two_ranks(tmp_path):
    command = [*COMMAND, "--devices", "2", "+trainer/strategy=fsdp2"]
    done = launch(command, counter(tmp_path, 40), timeout=280)
    assert done.returncode == 0, done.stdout
    check_learned(tmp_path, steps=40)
