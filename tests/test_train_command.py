"""The main job as a user starts it: ``lightning-gym train``, real vLLM, real servers, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from lightning_gym.tiny_policy.build import TinyPolicy

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "lightning_gym.cli", "train"]
MARK = "LIGHTNING_GYM_TEST_MARK"

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def warm_start():
    return TinyPolicy(environment="counter", seed=0).ensure(ROOT / "outputs" / "tiny_policy")


def start(warm_start, output_dir, *overrides):
    """The command, running; and the mark that every process it starts inherits."""
    mark = uuid.uuid4().hex
    arguments = ["counter", f"warm_start={warm_start}", f"output_dir={output_dir}", *overrides]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, mark


def alive(mark):
    """Processes that carry the mark."""
    found = []
    for directory in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes():
                found.append(int(directory.name))
        except (OSError, ValueError):
            continue
    return found


def wait_until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_the_policy_learns_strictly_on_policy_with_exact_logprobs(warm_start, tmp_path):
    process, mark = start(warm_start, tmp_path, "trainer.max_steps=40")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 40
    assert summary["rollouts"] == 40 * 64
    assert summary["misaligned"] == summary["dropped"] == 0
    assert summary["max_logprob_diff"] <= 1e-4
    assert summary["token_mult_prob_error"] <= 1.001
    start_reward = summary["reward_predicted"]
    assert abs(summary["reward_first"] - start_reward) < 0.2, "64 rollouts: three standard errors"
    assert summary["reward_last10"] >= start_reward + 0.25
    *_, reward, report = output.strip().splitlines()
    assert reward.startswith("reward ")
    assert report == f"its curves and rollouts in one file: lightning-gym report {tmp_path}"
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    metrics = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "rollout/reward_mean" in metrics[0]
    assert len(metrics) == 41
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert wait_until(lambda: not alive(mark), 5)
    inspected = subprocess.run(
        [sys.executable, "-m", "lightning_gym.cli", "inspect", tmp_path / "rollouts.jsonl", "--json", "--step", "39"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    rollouts = [json.loads(line) for line in inspected.stdout.splitlines()]
    assert len(rollouts) == 64
    for rollout in rollouts:
        spans = [span for segment in rollout["segments"] for span in segment["spans"]]
        assert all(
            span["text"].endswith("<|im_end|>") for span in spans if span["trained"] and not rollout["truncated"]
        )
        assert {segment["weight_version"] for segment in rollout["segments"]} == {39}


def test_nothing_is_left_five_seconds_after_the_trainer_is_killed(warm_start, tmp_path):
    process, mark = start(warm_start, tmp_path)
    assert wait_until(lambda: process.poll() is not None or training(tmp_path), 90)
    assert process.poll() is None, process.stdout.read()
    assert len(alive(mark)) > 1, "the Gym runs in processes of its own"
    process.kill()
    process.communicate()
    assert wait_until(lambda: not alive(mark), 5), f"left: {alive(mark)}"


def test_ctrl_c_ends_everything_within_ten_seconds(warm_start, tmp_path):
    process, mark = start(warm_start, tmp_path)
    assert wait_until(lambda: process.poll() is not None or training(tmp_path), 90)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert wait_until(lambda: not alive(mark), 1), f"left: {alive(mark)}"


def training(output_dir):
    """Whether the first step's rollouts have been collected."""
    log = output_dir / "rollouts.jsonl"
    return log.exists() and log.read_bytes().count(b"\n") > 64


def test_the_endpoint_can_be_served_alone(warm_start):
    import httpx

    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_gym.cli", "serve", warm_start, "--max-model-len", "256", "--api-key", "k"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        message = {"role": "user", "content": "add 1 then add 2 then get the count"}
        reply = httpx.post(
            f"{url}/chat/completions", json={"messages": [message]}, headers={"Authorization": "Bearer k"}, timeout=60
        ).json()
        assert reply["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "increment_counter"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        process.stdout.close()
