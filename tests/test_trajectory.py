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


ids = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), ids, ids), min_size=1, max_size=8))
def test_every_call_is_found_whole_and_every_sampled_token_trains_once(turns):
    """A small alphabet, so that prompts go on by accident too."""
    calls, seen = [], []
    for index, (goes_on, words, tokens) in enumerate(turns):
        prompt = seen + words if goes_on else words
        logprobs = [-(index * 100 + i) / 8 for i in range(len(tokens))]
        calls.append(call(prompt, tokens, index=index, logprobs=logprobs, version=index))
        seen = prompt + tokens
    segments = trajectories(rollout(*calls))
    assert sum(segment.num_trained for segment in segments) == sum(len(c.token_ids) for c in calls)
    waiting = iter(segments)
    segment, start = next(waiting), 0
    for one in calls:
        whole = [*one.prompt_ids, *one.token_ids]
        if start and (one.prompt_ids[:start] != segment.token_ids[:start].tolist() or len(one.prompt_ids) < start):
            assert start == len(segment)
            segment, start = next(waiting), 0
        assert segment.token_ids[: len(whole)].tolist() == whole
        span = slice(len(one.prompt_ids), len(whole))
        assert not segment.loss_mask[start : len(one.prompt_ids)].any()
        assert segment.loss_mask[span].all()
        assert segment.rollout_logprobs[span].tolist() == one.logprobs
        assert (segment.weight_versions[span] == one.weight_version).all()
        start = len(whole)
    assert next(waiting, None) is None


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
