"""The recipes on NeMo Gym's own environments run: real Gym, real vLLM, a tiny policy that its teacher taught there."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gym.gym_policy.build import BLEND, ENVIRONMENTS, GymPolicy
from lightning_gym.gym_policy.environments import GYM_ENVIRONMENTS
from lightning_gym.tiny_policy.build import TinyPolicy, read_record

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-gym/bin/python"
POLICIES = ROOT / "outputs" / "tiny_policy"

QUICK = "example_multi_turn_gymnasium"


def train(recipe, output_dir, *overrides):
    """A run by the command; its summary, and its metrics step by step."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gym.cli", "train", recipe, *overrides, f"output_dir={output_dir}"],
        cwd=ROOT,
        env=os.environ | {"LIGHTNING_GYM_GYM_PYTHON": str(PYTHON)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (output_dir / "csv" / "metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["rollout/reward_mean"]]
    return json.loads((output_dir / "summary.json").read_text()), steps


def exact(summary):
    return summary["misaligned"] == summary["dropped"] == 0 and summary["max_logprob_diff"] <= 1e-4


@pytest.mark.gym
@pytest.mark.vllm
@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.full) for name in ENVIRONMENTS]
)
def test_a_recipe_on_real_gym_starts_where_its_teacher_was_and_trains_exact_tokens(name, tmp_path):
    warm_start = GymPolicy(environment=name).ensure(POLICIES, python=PYTHON)
    summary, steps = train(f"gym/{name}", tmp_path, f"warm_start={warm_start}", "trainer.max_steps=2")
    assert summary["steps"] == len(steps) == 2
    assert exact(summary)
    record = read_record(warm_start)
    # 64 rollouts of few rows, of a policy that imitates its teacher well and not perfectly: rewards are of one scale.
    scale = max(1.0, record["reward_predicted"])
    assert abs(sum(float(step["rollout/reward_mean"]) for step in steps) / 2 - record["reward_predicted"]) < 0.3 * scale
    agents = [GYM_ENVIRONMENTS[part].agent for part in (BLEND if name == "blend" else (name,))]
    for step in steps:
        assert all(step[f"rollout/reward_mean/{agent}"] for agent in agents)
        assert float(step["rollout/reward_std"]) > 0, "there is something to learn from"


@pytest.mark.gym
@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_three_environments_of_real_gym_train_at_once_and_each_ones_reward_rises_or_holds(tmp_path):
    warm_start = GymPolicy(environment="blend").ensure(POLICIES, python=PYTHON)
    summary, steps = train("gym/blend", tmp_path, f"warm_start={warm_start}")
    assert exact(summary)
    for name in BLEND:
        rewards = [float(step[f"rollout/reward_mean/{GYM_ENVIRONMENTS[name].agent}"]) for step in steps]
        first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
        assert last > first - 0.05, (name, first, last)
    assert summary["reward_last10"] > read_record(warm_start)["reward_predicted"] + 0.2


@pytest.mark.gym
@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_demo_on_real_gym_reaches_what_it_reaches_on_the_embedded_one(tmp_path):
    warm_start = TinyPolicy(environment="counter").ensure(POLICIES)
    runs = {
        gym: train("counter", tmp_path / gym, f"warm_start={warm_start}", f"gym={gym}")[0]
        for gym in ("embedded", "nemo_light")
    }
    for summary in runs.values():
        assert exact(summary)
        assert summary["reward_last10"] >= 0.90
    embedded, real = runs["embedded"]["reward_first"], runs["nemo_light"]["reward_first"]
    assert abs(embedded - real) < 0.1, "the same rows, weights and seeds; only the batching of requests differs"


def test_a_policy_for_an_unknown_environment_is_refused_with_those_there_are():
    from lightning_gym.errors import ConfigError

    with pytest.raises(ConfigError, match=r"example_session_state_mgmt, .*blend, got 'chess'"):
        GymPolicy(environment="chess")


def test_a_missing_gym_is_named_with_the_way_to_get_it(tmp_path):
    from lightning_gym.errors import ConfigError

    with pytest.raises(ConfigError, match="make setup-gym"):
        GymPolicy(environment="blend").ensure(tmp_path, python=tmp_path / "none")
    assert list(tmp_path.iterdir()) == [], "a build that failed leaves nothing"
