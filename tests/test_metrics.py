"""Names and arithmetic of what is logged."""

import time

import pytest

from lightning_gym import metrics
from lightning_gym.rollout import Call, Failure, FailureKind, Rollout


def rollout(*, reward=1.0, agent="a", tokens=(2,), truncated=False, seconds=1.0, failure=None):
    calls = [
        Call(
            index=i,
            prompt_ids=[1],
            token_ids=[5] * count,
            logprobs=[-0.25 * (i + 1)] * count,
            finish_reason="stop",
            weight_version=0,
        )
        for i, count in enumerate(tokens)
    ]
    return Rollout(
        rollout_id="r",
        task_index=0,
        group_id=0,
        attempt=0,
        agent=agent,
        reward=None if failure else reward,
        calls=() if failure else calls,
        truncated=truncated,
        seconds=seconds,
        failure=failure and Failure(kind=failure, message=""),
    )


def test_numbers_are_those_of_the_survivors_and_counts_those_of_all():
    survivors = [
        rollout(reward=0.0, tokens=(2,), agent="b"),
        rollout(reward=1.0, tokens=(1, 3), truncated=True),
        rollout(reward=2.0, tokens=(2,)),
        rollout(reward=1.0, tokens=(4,)),
    ]
    lost = [rollout(failure=FailureKind.TIMEOUT, seconds=9.0), rollout(reward=100.0, seconds=2.0)]
    values = metrics.rollout_metrics([*survivors, *lost], survivors)
    assert values == {
        "rollout/reward_mean": 1.0,
        "rollout/reward_std": pytest.approx(0.5**0.5),
        "rollout/sampled_tokens_mean": 3.0,
        "rollout/calls_mean": 1.25,
        "rollout/truncated_frac": 0.25,
        "rollout/entropy": pytest.approx((9 * 0.25 + 3 * 0.5) / 12),
        "rollout/slowest_s": 9.0,
        "rollout/count": 6.0,
        "rollout/dropped": 2.0,
        "rollout/reward_mean/a": pytest.approx(4 / 3),
        "rollout/reward_mean/b": 0.0,
    }


def test_without_survivors_means_are_zero_and_losses_are_counted():
    values = metrics.rollout_metrics([rollout(failure=FailureKind.INFRA)], [])
    assert values["rollout/reward_mean"] == 0.0
    assert (values["rollout/count"], values["rollout/dropped"]) == (1.0, 1.0)


def test_a_windows_means_weigh_micro_batches_by_what_is_in_them_and_maxima_are_maxima():
    window = metrics.WindowMetrics()
    window.add({"kl": 1.0, "diff_max": 0.5}, count=1)
    window.add({"kl": 3.0, "diff_max": 0.1, "late": 7.0}, count=3)
    window.add({"kl": 100.0, "diff_max": 0.2}, count=0)
    assert window.take() == {"kl": 2.5, "diff_max": 0.5, "late": 7.0}
    assert window.take() == {}


def test_a_window_of_nothing_but_fillers_reports_their_value():
    window = metrics.WindowMetrics()
    window.add({"error": 1.0}, count=0)
    assert window.take() == {"error": 1.0}


def test_laps_are_the_time_since_the_last_one_by_the_wall_and_by_the_processor():
    start = time.perf_counter()
    clock = metrics.PhaseClock()
    time.sleep(0.05)
    slept = clock.lap("sync")
    deadline = time.process_time() + 0.03
    while time.process_time() < deadline:
        pass
    worked = clock.lap("train")
    assert slept["time/sync_s"] + worked["time/train_s"] <= time.perf_counter() - start
    assert slept["time/sync_s"] >= 0.05
    assert slept["time/sync_cpu_s"] < 0.03
    assert worked["time/train_cpu_s"] >= 0.03
    assert worked["time/train_s"] >= worked["time/train_cpu_s"] - 0.01


@pytest.mark.parametrize("phase", metrics.PHASES)
def test_a_phases_names_carry_their_unit(phase):
    assert set(metrics.PhaseClock().lap(phase)) == {f"time/{phase}_s", f"time/{phase}_cpu_s"}


def test_over_ranks_counts_add_up_seconds_are_the_slowest_and_means_weigh_survivors():
    small = {
        "rollout/count": 2, "rollout/dropped": 1, "rollout/reward_mean": 1.0, "time/collect_s": 5.0,
        "batch/tokens": 10, "rollout/failed_infra": 1, "rollout/slowest_s": 5.0,
    }  # fmt: skip
    large = {
        "rollout/count": 4, "rollout/dropped": 1, "rollout/reward_mean": 0.0, "time/collect_s": 3.0,
        "batch/tokens": 30, "rollout/slowest_s": 9.0,
    }  # fmt: skip
    assert metrics.over_ranks([small, large]) == {
        "rollout/count": 6,
        "rollout/dropped": 2,
        "rollout/reward_mean": 0.25,
        "time/collect_s": 5.0,
        "batch/tokens": 40,
        "rollout/failed_infra": 1,
        "rollout/slowest_s": 9.0,
    }
    assert metrics.over_ranks([small]) == small
