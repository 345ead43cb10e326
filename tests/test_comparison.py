"""Which rollouts of a collection train, and with what advantages; and how a collection is cut into windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gym.comparison import WindowSettings, compare
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.played import spans
from lightning_gym.testing import tiny_outcome


def settings(**changes):
    return WindowSettings(**({"prompts_per_step": 2, "group_size": 2} | changes))


def group(group_id, rewards, **changes):
    return [tiny_outcome(group_id=group_id, attempt=i, reward=reward, **changes) for i, reward in enumerate(rewards)]


VARIED, EQUAL = group(0, [0.0, 1.0, 2.0]), group(1, [1.0, 1.0])


def test_a_failed_member_is_in_neither_baseline_nor_loss_and_its_group_goes_on():
    found = compare(group(0, [0.0, 1.0, None]), settings())
    assert found.advantages == {"0.0": -0.5, "0.1": 0.5}


def test_every_group_gets_its_own_advantages_in_whatever_order_its_members_come():
    outcomes = [*group(0, [0.0, 1.0, 5.0]), *group(1, [3.0, 1.0, 2.0]), *group(2, [0.0, 0.0, 9.0])]
    expected = {"0.0": -2, "0.1": -1, "0.2": 3, "1.0": 1, "1.1": -1, "1.2": 0, "2.0": -3, "2.1": -3, "2.2": 6}
    assert compare(outcomes, settings()).advantages == expected
    assert compare(outcomes[::-1], settings()).advantages == expected


def test_a_masked_member_counts_as_little_as_a_failed_one():
    masked = tiny_outcome(group_id=0, attempt=2, reward=99.0, masked=True)
    assert compare([*group(0, [0.0, 1.0]), masked], settings()).advantages == {"0.0": -0.5, "0.1": 0.5}


def test_a_group_with_one_survivor_has_nothing_to_compare():
    found = compare([*VARIED, *group(2, [1.0, None])], settings())
    assert found.groups == [0]
    assert found.advantages.keys() == {"0.0", "0.1", "0.2"}


@pytest.mark.parametrize(("zero_variance", "groups"), [("keep", [0, 1]), ("drop", [0]), ("resample", [0])])
def test_groups_of_equal_rewards_count_or_do_not(zero_variance, groups):
    found = compare([*VARIED, *EQUAL], settings(zero_variance=zero_variance))
    assert found.groups == groups
    assert ("1.0" in found.advantages) == (1 in groups)


def test_a_truncated_rollout_can_be_kept_or_left_out_of_the_loss_but_not_of_the_baseline():
    outcomes = [*group(0, [0.0, 1.0]), tiny_outcome(group_id=0, attempt=2, reward=5.0, truncated=True)]
    assert compare(outcomes, settings()).advantages == {"0.0": -2.0, "0.1": -1.0, "0.2": 3.0}
    assert compare(outcomes, settings(truncated="mask")).advantages == {"0.0": -2.0, "0.1": -1.0}


def test_the_penalty_for_length_is_part_of_the_reward_but_makes_no_variance_of_its_own():
    outcomes = [
        tiny_outcome(group_id=0, attempt=0, reward=1.0, sampled_tokens=80),
        tiny_outcome(group_id=0, attempt=1, reward=1.0, sampled_tokens=90),
    ]
    how = {"overlong_max_tokens": 100, "overlong_buffer_tokens": 20}
    assert compare(outcomes, settings(**how)).advantages == {"0.0": 0.25, "0.1": -0.25}
    assert compare(outcomes, settings(**how, zero_variance="drop")).advantages == {}


def test_reward_components_are_compared_one_by_one_and_what_differs_in_none_has_no_variance():
    outcomes = [
        *(tiny_outcome(group_id=0, attempt=i, components={"a": i, "b": 1 - i}) for i in (0, 1)),
        *(tiny_outcome(group_id=1, attempt=i, components={"a": 3, "b": 4}, reward=i) for i in (0, 1)),
    ]
    found = compare(outcomes, settings(reward_weights={"a": 2.0, "b": 1.0}, zero_variance="drop"))
    assert found.groups == [0]
    assert found.advantages["0.1"] == -found.advantages["0.0"] > 0


@given(st.permutations([*VARIED, *EQUAL, *group(2, [0.5, 0.25])]))
def test_the_order_in_which_ranks_bring_them_does_not_matter(outcomes):
    assert compare(outcomes, settings()) == compare([*VARIED, *EQUAL, *group(2, [0.5, 0.25])], settings())


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(AlignmentError, match="is nan"):
        compare(group(0, [float("nan"), 1.0]), settings())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"group_size": 1}, "group of one"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0"),
        ({"updates_per_collection": 0}, "updates_per_collection is 0"),
        ({"max_resample_rounds": 0}, "max_resample_rounds is 0"),
        ({"reward_weights": {"a": 1.0}, "advantage_scale": "group_std"}, "leave one of the two out"),
        ({"overlong_max_tokens": 10}, "expected both"),
        ({"overlong_max_tokens": 10, "overlong_buffer_tokens": 11}, "between 1 and the maximum"),
        (
            {"reward_weights": {"a": 1.0}, "overlong_max_tokens": 10, "overlong_buffer_tokens": 5},
            "no part of the components",
        ),
        ({"aggregation": "constant"}, "needs constant_length"),
        ({"constant_length": 5}, "no other takes it"),
    ],
)
def test_settings_that_cannot_work_or_would_be_ignored_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        settings(**changes)


@given(st.sets(st.integers(0, 30), min_size=1), st.data())
def test_spans_cover_every_task_once_and_share_out_the_groups_that_count(groups, data):
    ordered = sorted(groups)
    number = data.draw(st.integers(1, len(ordered)))
    found = spans(ordered, num_spans=number, start=0, stop=31)
    assert [position for span in found for position in range(span.start, span.stop)] == list(range(31))
    counts = [sum(span.start <= group < span.stop for group in ordered) for span in found]
    assert len(found) == number
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
