"""Names and arithmetic of what is logged."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym import metrics
from lightning_gym.mismatch import ratio_histogram
from lightning_gym.testing import packed_batch, tiny_outcome
from lightning_gym.window_metrics import WindowMetrics


def outcome(attempt, *, reward=1.0, agent="a", tokens=(2,), group_id=0, **changes):
    """An attempt whose calls sampled so many tokens, of -0.25, -0.5, ... nats."""
    return tiny_outcome(
        group_id=group_id,
        attempt=attempt,
        reward=reward,
        agent=agent,
        sampled_tokens=sum(tokens),
        sampled_logprobs=-sum(0.25 * (i + 1) * count for i, count in enumerate(tokens)),
        num_calls=len(tokens),
        **changes,
    )


def test_numbers_are_those_of_rollouts_that_can_be_compared_and_counts_those_of_all():
    candidates = [
        outcome(0, reward=0.0, tokens=(2,), agent="b"),
        outcome(1, reward=1.0, tokens=(1, 3), truncated=True, num_breaks=2, num_segments=3),
        outcome(2, reward=2.0, tokens=(2,)),
        outcome(3, reward=1.0, tokens=(4,)),
    ]
    lost = [
        outcome(4, reward=None, failure="timeout", seconds=9.0),
        outcome(5, reward=None, failure="misaligned", misalignment="duplicate"),
        outcome(0, group_id=1, reward=100.0, seconds=2.0),
        outcome(6, reward=50.0, masked=True),
    ]
    values = metrics.rollout_metrics([*candidates, *lost])
    assert values == {
        "rollout/reward_mean": 1.0,
        "rollout/reward_std": pytest.approx(0.5**0.5),
        "rollout/zero_variance_frac": 0.0,
        "rollout/sampled_tokens_mean": 3.0,
        "rollout/sampled_tokens_max": 4.0,
        "rollout/calls_mean": 1.25,
        "rollout/calls_max": 2.0,
        "rollout/segments_mean": 1.5,
        "rollout/truncated_frac": 0.25,
        "rollout/masked": 1.0,
        "rollout/entropy": pytest.approx((9 * 0.25 + 3 * 0.5) / 12),
        "rollout/slowest_s": 9.0,
        "rollout/splice_breaks": 2.0,
        "rollout/count": 8.0,
        "rollout/dropped": 4.0,
        "rollout/misaligned": 1.0,
        "rollout/misaligned_duplicate": 1.0,
        "rollout/failed_timeout": 1.0,
        "rollout/failed_misaligned": 1.0,
        "rollout/reward_mean/a": pytest.approx(4 / 3),
        "rollout/reward_mean/b": 0.0,
        "rollout/reward_std/a": pytest.approx((2 / 9) ** 0.5),
        "rollout/reward_std/b": 0.0,
    }


def test_without_rollouts_to_compare_means_are_zero_and_losses_are_counted():
    values = metrics.rollout_metrics([outcome(0, reward=None, failure="infra")])
    assert values["rollout/reward_mean"] == values["rollout/zero_variance_frac"] == 0.0
    assert (values["rollout/count"], values["rollout/dropped"]) == (1.0, 1.0)


def test_rewards_are_kept_by_environment_for_histograms_and_given_to_loggers_that_draw_them():
    class Drawing:
        def __init__(self):
            self.drawn = []

        @property
        def experiment(self):
            return self

        def add_histogram(self, tag, values, step):
            self.drawn.append((tag, values.tolist(), step))

    outcomes = [
        outcome(0, reward=1.0),
        outcome(1, reward=0.5, agent="b"),
        outcome(2, reward=0.0),
        outcome(3, reward=None),
    ]
    rewards = metrics.rewards_by_environment(outcomes)
    assert rewards == {"a": [1.0, 0.0], "b": [0.5]}
    drawing = Drawing()
    metrics.log_histograms([object(), drawing], rewards, 7)
    assert drawing.drawn == [("rollout/reward/a", [1.0, 0.0], 7), ("rollout/reward/b", [0.5], 7)]


# -- the window of an optimizer step


def test_a_windows_means_weigh_micro_batches_by_what_is_in_them_and_maxima_are_maxima():
    window = WindowMetrics()
    window.add({"kl": 1.0, "diff_max": 0.5}, count=1)
    window.add({"kl": 3.0, "diff_max": 0.1, "late": 7.0}, count=3)
    window.add({"kl": 100.0, "diff_max": 0.2}, count=0)
    assert window.take() == {"kl": 2.5, "diff_max": 0.5, "late": 7.0}
    assert window.take() == {}


def test_a_window_of_nothing_but_fillers_reports_their_value():
    window = WindowMetrics()
    window.add({"error": 1.0}, count=0)
    assert window.take() == {"error": 1.0}


def test_over_ranks_a_windows_sums_add_up_and_its_maxima_are_the_largest_in_two_collectives():
    calls = []

    def reduce(tensor, how):
        calls.append(how)
        return tensor * 2 if how == "sum" else tensor + 1

    window = WindowMetrics()
    window.add({"kl": torch.tensor(1.0), "diff_max": torch.tensor(0.5)}, count=torch.tensor(3.0))
    window.add({"loss": torch.tensor(2.0)}, count=1)
    assert window.take(reduce) == {"kl": 1.0, "diff_max": 1.5, "loss": 2.0}
    assert calls == ["sum", "max"]


def test_the_effective_sample_size_is_made_of_the_moments_of_the_window_and_not_of_its_parts():
    window = WindowMetrics()
    weights = torch.tensor([1.0, 1.0, 4.0])
    for part in (weights[:2], weights[2:]):
        window.add({"weight_mean": part.mean(), "weight_sq_mean": (part**2).mean()}, count=len(part))
    assert window.take() == {"weight_mean": 2.0, "weight_ess_frac": pytest.approx(36 / (3 * 18))}


def test_a_number_that_is_not_one_is_seen_and_an_empty_micro_batchs_is_not():
    window = WindowMetrics()
    window.add({"loss": torch.tensor(math.nan)}, count=0)
    window.add({"loss": torch.tensor(1.0)}, count=1)
    assert window.take() == {"loss": 1.0}
    window.add({"loss": torch.tensor(math.nan)}, count=1)
    window.add({"loss": torch.tensor(1.0)}, count=1)
    assert math.isnan(window.take()["loss"])


@settings(deadline=None)
@given(st.lists(st.floats(-15, 15), min_size=1, max_size=60), st.integers(1, 5))
def test_quantiles_of_the_ratio_are_those_of_all_tokens_of_the_window_to_the_width_of_a_bin(log_ratios, num_parts):
    window = WindowMetrics()
    for part in (log_ratios[i::num_parts] for i in range(num_parts)):
        batch = packed_batch(mask=[[False, *[True] * len(part)]])
        window.add({"ratio_hist": ratio_histogram(torch.tensor([[0.0, *part]]), batch)}, count=len(part))
    found = window.take()
    for name, level in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
        true = float(np.quantile(log_ratios, level, method="inverted_cdf"))
        assert math.log(found[f"ratio_{name}"]) == pytest.approx(true, rel=0.13, abs=1e-6)


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
