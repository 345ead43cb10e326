"""Rollouts as arrays: chained where a prompt goes on exactly, cut elsewhere, refused where it does not add up."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.errors import AlignmentError
from lightning_gym.rollout import Call, Rollout
from lightning_gym.trajectory import trajectories


def call(prompt, tokens, *, index=0, logprobs=None, version=0):
    return Call(
        index=index,
        prompt_ids=prompt,
        token_ids=tokens,
        logprobs=[-0.5] * len(tokens) if logprobs is None else logprobs,
        finish_reason="stop",
        weight_version=version,
    )


def rollout(*calls):
    return Rollout(rollout_id="r", task_index=3, group_id=5, attempt=1, agent="a", reward=1.0, calls=calls)


def test_the_example_of_two_calls_is_one_trajectory():
    first = call([1, 10, 7], [20, 2], logprobs=[-0.3, -0.1], version=4)
    second = call([1, 10, 7, 20, 2, 30, 7], [24, 2], logprobs=[-0.2, -0.4], version=5)
    (trajectory,) = trajectories(rollout(first, second))
    assert trajectory.token_ids.tolist() == [1, 10, 7, 20, 2, 30, 7, 24, 2]
    assert trajectory.loss_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 2
    expected = np.array([0, 0, 0, -0.3, -0.1, 0, 0, -0.2, -0.4], dtype=np.float32)
    assert trajectory.rollout_logprobs.tolist() == expected.tolist()
    assert trajectory.weight_versions.tolist() == [-1, -1, -1, 4, 4, -1, -1, 5, 5]
    assert (trajectory.rollout_id, trajectory.group_id, trajectory.segment) == ("r", 5, 0)
    assert (len(trajectory), trajectory.num_trained) == (9, 4)
    assert [trajectory.token_ids.dtype, trajectory.rollout_logprobs.dtype] == [np.int64, np.float32]


@pytest.mark.parametrize(
    ("second", "lengths"),
    [
        ([1, 10, 7, 20, 2], [6]),
        ([1, 10, 7, 20, 2, 30], [7]),
        ([1, 10, 7, 20], [5, 5]),
        ([1, 10, 7], [5, 4]),
        ([1, 10, 7, 21, 2, 30], [5, 7]),
        ([9, 10, 7, 20, 2, 30], [5, 7]),
        ([1, 10, 7, 20, 30, 2], [5, 7]),
    ],
    ids=["at once", "goes on", "cut", "again", "a sampled id differs", "the first id differs", "turn end lost"],
)
def test_a_segment_goes_on_only_where_the_prompt_starts_with_everything_before(second, lengths):
    segments = trajectories(rollout(call([1, 10, 7], [20, 2]), call(second, [40], index=1)))
    assert [len(segment) for segment in segments] == lengths
    assert [segment.segment for segment in segments] == list(range(len(lengths)))
    assert sum(segment.num_trained for segment in segments) == 3


def test_conversations_that_are_interleaved_are_told_apart_and_the_longest_beginning_wins():
    main = call([1, 10, 7], [20, 2])
    sub_agent = call([1, 11, 7], [21, 2], index=1)
    main_goes_on = call([1, 10, 7, 20, 2, 30, 7], [22, 2], index=2)
    sub_agent_goes_on = call([1, 11, 7, 21, 2, 31, 7], [23, 2], index=3)
    a_step_back = call([1, 10, 7, 20, 2, 30, 7], [24, 2], index=4)
    from_there = call([1, 10, 7, 20, 2, 30, 7, 24, 2, 32], [25], index=5)
    calls = (main, sub_agent, main_goes_on, sub_agent_goes_on, a_step_back, from_there)
    segments = trajectories(rollout(*calls))
    assert [segment.token_ids.tolist() for segment in segments] == [
        [1, 10, 7, 20, 2, 30, 7, 22, 2],
        [1, 11, 7, 21, 2, 31, 7, 23, 2],
        [1, 10, 7, 20, 2, 30, 7, 24, 2, 32, 25],
    ]
    assert [segment.token_ids[segment.loss_mask].tolist() for segment in segments] == [
        [20, 2, 22, 2],
        [21, 2, 23, 2],
        [24, 2, 25],
    ]


def test_of_two_beginnings_of_a_prompt_the_longer_one_is_joined():
    """A sample that was cut, and another from the same prompt that said the same and went on."""
    calls = (call([1], [2]), call([1], [2, 3], index=1), call([1, 2, 3, 4], [5], index=2))
    segments = trajectories(rollout(*calls))
    assert [segment.token_ids.tolist() for segment in segments] == [[1, 2], [1, 2, 3, 4, 5]]
    assert [segment.loss_mask.tolist() for segment in segments] == [[False, True], [False, True, True, False, True]]


ids = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 7), ids, ids), min_size=1, max_size=8))
def test_every_call_is_found_whole_and_every_sampled_token_trains_once(turns):
    """A call begins anew, or goes on from any earlier one; a small alphabet, so that prompts go on by accident too."""
    calls = []
    for index, (parent, words, tokens) in enumerate(turns):
        start = [*calls[parent].prompt_ids, *calls[parent].token_ids] if 0 <= parent < index else []
        logprobs = [-(index * 100 + i) / 8 for i in range(len(tokens))]
        calls.append(call([*start, *words], tokens, index=index, logprobs=logprobs, version=index))
    segments = trajectories(rollout(*calls))
    assert sum(segment.num_trained for segment in segments) == sum(len(c.token_ids) for c in calls)
    ends = {}  # by segment, where its calls so far end
    for one in calls:
        whole = [*one.prompt_ids, *one.token_ids]
        span = slice(len(one.prompt_ids), len(whole))
        (home,) = [
            segment
            for segment in segments
            if (segment.weight_versions == one.weight_version).any()  # each call has a version of its own
        ]
        assert home.token_ids[: len(whole)].tolist() == whole
        assert np.flatnonzero(home.weight_versions == one.weight_version).tolist() == list(range(span.start, span.stop))
        assert home.loss_mask[span].all()
        assert home.rollout_logprobs[span].tolist() == one.logprobs
        continued = [s for s, end in ends.items() if segments[s].token_ids[:end].tolist() == one.prompt_ids[:end]]
        longest = max((ends[s] for s in continued), default=0)
        assert ends.get(home.segment, 0) == longest, "it joins the longest beginning of its prompt"
        assert not home.loss_mask[longest : span.start].any()
        ends[home.segment] = len(whole)
    assert [segment.segment for segment in segments] == list(range(len(segments)))


def test_a_rollout_without_calls_has_no_trajectory():
    assert trajectories(rollout()) == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (call([], [1]), "0 prompt ids and 1 sampled ids"),
        (call([1], []), "1 prompt ids and 0 sampled ids"),
        (call([1], [2, 3], logprobs=[-0.5]), "2 sampled ids but 1 logprobs"),
        (call([1], [2], logprobs=[-0.5, -0.5]), "1 sampled ids but 2 logprobs"),
        (call([1], [2, 3], logprobs=[-0.5, math.nan]), "logprob of sampled token 1 is nan"),
        (call([1], [2], logprobs=[-math.inf]), "logprob of sampled token 0 is -inf"),
        (call([1], [2], logprobs=[0.1]), "logprob of sampled token 0 is 0.1"),
    ],
)
def test_a_call_that_does_not_add_up_is_refused_and_the_message_says_where(bad, said):
    with pytest.raises(AlignmentError, match=rf"^rollout r \(task 3, attempt 1\), call 0: {said}"):
        trajectories(rollout(bad))


def test_a_logprob_a_hair_above_zero_is_a_rounded_one():
    (trajectory,) = trajectories(rollout(call([1], [2], logprobs=[1e-7])))
    assert trajectory.num_trained == 1
