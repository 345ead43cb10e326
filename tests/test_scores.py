"""Scores: the arithmetic of an evaluation, by hand and by enumeration."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.scores import Estimate, Score, counts_up_to, expected_best, score_table, scores
from lightning_gym.testing import tiny_outcome


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.data())
@settings(deadline=None, max_examples=60)
def test_the_expected_best_is_the_mean_over_all_choices(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    choices = [max(choice) for choice in itertools.combinations(rewards, k)]
    assert expected_best(rewards, k) == pytest.approx(sum(choices) / len(choices), abs=1e-9)


@pytest.mark.parametrize(("n", "right", "k"), [(8, 3, 4), (8, 0, 2), (8, 8, 8), (5, 1, 5), (64, 2, 32)])
def test_for_rewards_of_zero_and_one_it_is_the_published_estimator_of_pass_at_k(n, right, k):
    expected = 1 - math.comb(n - right, k) / math.comb(n, k)
    assert expected_best([1.0] * right + [0.0] * (n - right), k) == pytest.approx(expected)


def test_the_error_is_that_of_a_mean_over_tasks_and_there_is_none_of_one_task():
    assert Estimate.of([1.0, 3.0]) == Estimate(mean=2.0, error=1.0)
    assert Estimate.of([0.25]).error is None
    assert math.isnan(Estimate.of([]).mean)


def attempts(group_id, rewards, **changes):
    return [
        tiny_outcome(group_id=group_id, attempt=attempt, reward=reward, **changes)
        for attempt, reward in enumerate(rewards)
    ]


def test_a_task_counts_once_however_many_of_its_attempts_failed():
    outcomes = [*attempts(0, [1.0, None, None, None]), *attempts(1, [0.0, 0.0, 0.0, 0.0])]
    score = Score.of("", outcomes, num_samples=4)
    assert (score.num_tasks, score.num_attempts, score.failures) == (2, 8, {"infra": 3})
    assert score.reward.mean == 0.5
    assert {k: estimate.mean for k, estimate in score.pass_at.items()} == {1: 0.5, 2: 0.0, 4: 0.0}


def test_failures_are_never_a_reward_of_zero_and_a_set_without_survivors_has_no_mean():
    values = Score.of("", attempts(0, [None, None]), num_samples=2).metrics(num_samples=2)
    assert math.isnan(values["val/reward_mean"])
    assert (values["val/failed"], values["val/failed_infra"]) == (2, 2)
    assert not [name for name in values if "pass_at" in name]


def test_a_rollout_that_its_environment_masks_counts_with_its_reward():
    outcomes = [tiny_outcome(group_id=0, reward=1.0, masked=True), tiny_outcome(group_id=1, reward=0.0)]
    assert Score.of("", outcomes, num_samples=1).reward.mean == 0.5


def test_names_of_what_is_logged():
    outcomes = [*attempts(0, [1.0, 0.0]), *attempts(1, [1.0, 1.0])]
    assert Score.of("hard", outcomes, num_samples=2).metrics(num_samples=2) == {
        "val/hard/reward_mean": 0.75,
        "val/hard/avg_at_2": 0.75,
        "val/hard/pass_at_1": 0.75,
        "val/hard/pass_at_2": 1.0,
        "val/hard/reward_se": 0.25,
        "val/hard/sampled_tokens_mean": 2.0,
        "val/hard/sampled_tokens_max": 2.0,
        "val/hard/calls_mean": 1.0,
        "val/hard/truncated_frac": 0.0,
        "val/hard/tasks": 2.0,
        "val/hard/attempts": 4.0,
        "val/hard/failed": 0.0,
    }


def test_there_is_a_line_for_each_dataset_and_for_environments_that_are_no_dataset():
    outcomes = [
        *attempts(0, [1.0], agent="math"),
        *attempts(1, [0.0], agent="tools"),
        *attempts(2, [0.0], agent="tools"),
    ]
    one = scores(outcomes, lambda _: "", num_samples=1)
    assert [line.name for line in one] == ["", "math", "tools"]
    same = scores(outcomes, lambda group: "easy" if group == 0 else "hard", num_samples=1)
    assert [line.name for line in same] == ["", "easy", "hard"], "math is easy: no line twice"
    other = scores(outcomes, lambda group: "easy" if group < 2 else "hard", num_samples=1)
    assert [line.name for line in other] == ["", "easy", "hard", "math", "tools"]


def test_the_table_has_a_line_for_each_score_and_says_what_failed():
    outcomes = [*attempts(0, [1.0, None]), *attempts(1, [0.0, 0.0])]
    head, line = score_table(scores(outcomes, lambda _: "", num_samples=2)).splitlines()
    assert head.split() == ["tasks", "attempts", "failed", "reward", "pass@1", "pass@2", "tokens", "calls", "truncated"]
    assert line.startswith("all  2      4         1 infra  0.500 ± 0.500")


def test_control_the_counts_reach_the_number_of_attempts():
    assert [counts_up_to(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]
