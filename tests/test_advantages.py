"""The algebra of advantages."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.advantages import (
    component_advantages,
    group_advantages,
    overlong_penalty,
    varied_groups,
    zero_variance_frac,
)
from lightning_gym.errors import AlignmentError, ConfigError

rewards_and_groups = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 4)), min_size=1, max_size=30)
BASELINES = st.sampled_from(["group_mean", "leave_one_out"])
SCALES = st.sampled_from(["none", "group_std", "batch_std"])


def split(pairs):
    return [reward for reward, _ in pairs], [group for _, group in pairs]


def test_numbers_of_one_group_by_hand():
    rewards, groups = [1.0, 2.0, 6.0], [9, 9, 9]
    assert group_advantages(rewards, groups).tolist() == [-2.0, -1.0, 3.0]
    assert group_advantages(rewards, groups, baseline="leave_one_out").tolist() == [-3.0, -1.5, 4.5]
    deviation = math.sqrt((4 + 1 + 9) / 2) + 1e-6
    scaled = group_advantages(rewards, groups, scale="group_std")
    assert scaled.tolist() == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation], rel=1e-12)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = [0.3, 1.7, -2.0, 0.1]
    others = [np.mean([r for j, r in enumerate(rewards) if j != i]) for i in range(4)]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert group_advantages(rewards, [0] * 4, baseline="leave_one_out").tolist() == pytest.approx(expected)


def test_groups_do_not_see_each_other_wherever_they_lie():
    assert group_advantages([1, 10, 3, 30], [5, 2, 5, 2]).tolist() == [-1.0, -10.0, 1.0, 10.0]


@settings(deadline=None)
@given(rewards_and_groups, BASELINES, SCALES)
def test_a_groups_advantages_sum_to_zero(pairs, baseline, scale):
    rewards, groups = split(pairs)
    values = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        assert abs(values[members].sum()) <= 1e-9 * (1 + np.abs(values[members]).sum() + max(map(abs, rewards)))


@settings(deadline=None)
@given(rewards_and_groups, BASELINES, SCALES, st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(pairs, baseline, scale, rng):
    order = list(range(len(pairs)))
    rng.shuffle(order)
    rewards, groups = split(pairs)
    values = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    shuffled = group_advantages([rewards[i] for i in order], [groups[i] for i in order], baseline=baseline, scale=scale)
    assert shuffled.tolist() == pytest.approx(values[order].tolist(), rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1000, 1000), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(-1000, 1000),
    BASELINES,
    SCALES,
)
def test_a_constant_added_to_every_reward_changes_nothing(pairs, constant, baseline, scale):
    rewards, groups = split(pairs)
    before = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    after = group_advantages([reward + constant for reward in rewards], groups, baseline=baseline, scale=scale)
    assert after.tolist() == pytest.approx(before.tolist(), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12), st.floats(0.5, 1000))
def test_scaled_by_the_deviation_the_unit_of_rewards_does_not_matter(rewards, factor):
    groups = [0] * len(rewards)
    before = group_advantages(rewards, groups, scale="group_std")
    after = group_advantages([reward * factor for reward in rewards], groups, scale="group_std")
    assert after.tolist() == pytest.approx(before.tolist(), rel=1e-4, abs=1e-5)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(2, 64), BASELINES, SCALES)
def test_equal_rewards_have_advantages_of_exactly_zero(reward, count, baseline, scale):
    values = group_advantages([reward] * count, [1] * count, baseline=baseline, scale=scale)
    assert values.tolist() == [0.0] * count


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_leave_one_out_is_the_centred_reward_times_n_over_n_minus_one(rewards):
    groups = [0] * len(rewards)
    centred = group_advantages(rewards, groups)
    left_out = group_advantages(rewards, groups, baseline="leave_one_out")
    count = len(rewards)
    assert left_out.tolist() == pytest.approx((centred * count / (count - 1)).tolist(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_a_group_of_one_has_nothing_to_be_compared_with(baseline, scale):
    assert group_advantages([7.0, 1.0], [1, 2], baseline=baseline, scale=scale).tolist() == [0.0, 0.0]


def test_no_rollouts_have_no_advantages():
    assert group_advantages([], []).tolist() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_by_its_place(bad):
    with pytest.raises(AlignmentError, match=r"^reward 2 is "):
        group_advantages([0.0, 1.0, bad, bad], [0, 0, 0, 0])


def test_as_many_groups_as_rewards_are_needed():
    with pytest.raises(AlignmentError, match="2 rewards but 3 group ids"):
        group_advantages([0.0, 1.0], [0, 0, 0])


def test_the_result_is_float64_whatever_came_in():
    assert group_advantages(np.array([1, 0], dtype=np.float32), [0, 0]).dtype == np.float64


def test_groups_without_variance_are_counted():
    assert zero_variance_frac([1, 1, 0, 1, 5], [0, 0, 1, 1, 2]) == pytest.approx(2 / 3)
    assert zero_variance_frac([], []) == 0
    with pytest.raises(ValueError, match="zip"):
        zero_variance_frac([1.0], [])


def test_the_deviation_of_the_batch_keeps_groups_in_proportion_and_that_of_the_group_does_not():
    rewards, groups = [0.0, 1.0, 0.0, 0.1], [0, 0, 1, 1]
    of_batch = group_advantages(rewards, groups, scale="batch_std")
    of_group = group_advantages(rewards, groups, scale="group_std")
    assert of_batch[1] / of_batch[3] == pytest.approx(10)
    assert of_group[1] / of_group[3] == pytest.approx(1, rel=1e-4)
    assert of_batch[1] == pytest.approx(0.5 / (np.std(rewards, ddof=1) + 1e-6))


# -- several rewards


def test_components_by_hand():
    rollouts = [{"a": 0, "b": 5}, {"a": 2, "b": 1}, {"a": 1, "b": 3}]
    # a: -1, 1, 0 deviations; b: 1, -1, 0; weighted 2 a + b: -1, 1, 0, whose deviation is 1
    found = component_advantages(rollouts, [4, 4, 4], weights={"a": 2, "b": 1})
    assert found.tolist() == pytest.approx([-1, 1, 0], rel=1e-5, abs=1e-12)


def test_what_is_left_of_components_that_cancel_is_exactly_nothing():
    rollouts = [{"a": 0.1 * i, "b": -0.3 * i} for i in range(7)]
    assert component_advantages(rollouts, [0] * 7).tolist() == [0.0] * 7


components_and_groups = st.lists(
    st.tuples(st.integers(-50, 50), st.integers(-50, 50), st.integers(0, 3)), min_size=1, max_size=20
)


@settings(deadline=None)
@given(components_and_groups, BASELINES, st.integers(1, 1000), st.integers(-100, 100))
def test_the_unit_and_the_origin_of_a_component_do_not_matter(drawn, baseline, factor, shift):
    groups = [group for *_, group in drawn]
    before = component_advantages([{"a": a, "b": b} for a, b, _ in drawn], groups, baseline=baseline)
    moved = [{"a": factor * a + shift, "b": b} for a, b, _ in drawn]
    after = component_advantages(moved, groups, baseline=baseline)
    assert after.tolist() == pytest.approx(before.tolist(), rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(components_and_groups, BASELINES)
def test_component_advantages_sum_to_zero_in_a_group_and_are_zero_where_all_are_equal(drawn, baseline):
    groups = [group for *_, group in drawn]
    found = component_advantages([{"a": a, "b": b} for a, b, _ in drawn], groups, baseline=baseline)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        assert abs(found[members].sum()) < 1e-9
        if len({drawn[i][:2] for i in members}) == 1:
            assert found[members].tolist() == [0.0] * len(members)


def test_a_rollout_without_a_component_that_others_have_is_refused_by_its_place():
    with pytest.raises(AlignmentError, match=r"^rollout 1 has no reward component b"):
        component_advantages([{"a": 1, "b": 2}, {"a": 1}], [0, 0])
    with pytest.raises(AlignmentError, match="reward 0 is nan"):
        component_advantages([{"a": math.nan}, {"a": 1}], [0, 0])


def test_a_weight_of_a_component_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="names right; the environments return a, b"):
        component_advantages([{"a": 1, "b": 2}], [0], weights={"a": 1, "right": 2})


# -- length


@given(st.integers(0, 500), st.integers(1, 200), st.integers(0, 300))
def test_the_penalty_for_length_falls_from_zero_to_minus_one_over_the_buffer(length, buffer, above):
    limit = buffer + above
    penalty = overlong_penalty(length, max_tokens=limit, buffer_tokens=buffer)
    if length <= limit - buffer:
        assert penalty == 0
    elif length >= limit:
        assert penalty == -1
    else:
        assert penalty == pytest.approx((limit - buffer - length) / buffer)


def test_groups_vary_where_two_of_their_members_differ():
    assert varied_groups([1, 1, 2, (0,), (0,)], [0, 0, 0, 1, 1]) == {0}
