"""Which served calls are a rollout's answer: what came back, what that goes on from, and nothing that was given up."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.gym import wire
from lightning_gym.policy.conversation import Conversation
from lightning_gym.policy.ledger import Entry, Served, SharedIds
from lightning_gym.reconcile import finished, reconcile
from lightning_gym.rollout import Call, Failure, FailureKind, Misaligned, Misalignment, Rollout

NOTHING_SAID = Conversation(messages=(), tools=b"", template_kwargs=b"")


def call(index=0, *, prompt=(1, 2), tokens=(3, 4)):
    return Call(
        index=index,
        prompt_ids=list(prompt),
        token_ids=list(tokens),
        logprobs=[-0.5] * len(tokens),
        finish_reason="stop",
        weight_version=0,
    )


def bundle(one, **changes):
    values = {"prompt_ids": list(one.prompt_ids), "token_ids": list(one.token_ids), "logprobs": list(one.logprobs)}
    return wire.Bundle(**values | changes)


def entry_of(*calls):
    return Entry(profile="train", seed=0, served=[Served(call=one, told=NOTHING_SAID) for one in calls])


FIRST, LOST, SECOND = call(0), call(1, tokens=(5, 6)), call(2, prompt=(1, 2, 3, 4, 9), tokens=(7,))


# -- a result with ids


def test_what_came_back_is_the_served_calls_themselves_with_the_engines_own_logprobs():
    back = [bundle(FIRST), bundle(SECOND, logprobs=[-0.5000001])]
    found = reconcile(entry_of(FIRST, SECOND), back)
    assert found == [FIRST, SECOND]
    assert all(mine is served for mine, served in zip(found, (FIRST, SECOND), strict=True))


def test_a_call_whose_answer_was_lost_is_left_out():
    assert reconcile(entry_of(FIRST, LOST, SECOND), [bundle(FIRST), bundle(SECOND)]) == [FIRST, SECOND]
    assert reconcile(entry_of(FIRST, LOST), [bundle(LOST)]) == [LOST]


def test_a_call_without_ids_counts_where_one_that_came_back_goes_on_from_it():
    third = call(3, prompt=(1, 2, 3, 4, 9, 7, 8), tokens=(6,))
    assert reconcile(entry_of(FIRST, LOST, SECOND, third), [bundle(third)]) == [FIRST, SECOND, third]


def test_two_equal_calls_are_two():
    twin = call(1)
    assert reconcile(entry_of(FIRST, twin), [bundle(FIRST), bundle(twin)]) == [FIRST, twin]


def test_of_two_equal_calls_that_one_goes_on_from_only_what_came_back_counts():
    """The retry of a lost answer sampled the very same words."""
    twin = call(1)
    assert reconcile(entry_of(FIRST, twin, SECOND), [bundle(SECOND)]) == [twin, SECOND]
    assert reconcile(entry_of(FIRST, twin, SECOND), [bundle(FIRST), bundle(SECOND)]) == [FIRST, SECOND]
    assert reconcile(entry_of(FIRST, twin, SECOND), []) == [twin, SECOND]


def test_branches_may_come_back_in_any_order_and_count_in_the_order_they_were_served():
    left, right = call(0, tokens=(3,)), call(1, tokens=(4,))
    assert reconcile(entry_of(left, right), [bundle(right), bundle(left)]) == [left, right]


@pytest.mark.parametrize(
    ("back", "position", "how"),
    [
        ([bundle(FIRST, token_ids=[3, 5])], 0, Misalignment.NOT_SERVED),
        ([bundle(FIRST, prompt_ids=[1, 3])], 0, Misalignment.NOT_SERVED),
        ([bundle(FIRST), bundle(SECOND), bundle(LOST)], 2, Misalignment.NOT_SERVED),
        ([wire.Bundle(prompt_ids=[0], token_ids=[0], logprobs=[0.0])], 0, Misalignment.NOT_SERVED),
        ([bundle(FIRST), bundle(FIRST)], 1, Misalignment.DUPLICATE),
        ([bundle(SECOND), bundle(FIRST)], 1, Misalignment.OTHER_ORDER),
        ([bundle(FIRST, token_ids=[3, -4])], 0, Misalignment.OUT_OF_VOCABULARY),
        ([bundle(FIRST, prompt_ids=[1, 2.5])], 0, Misalignment.OUT_OF_VOCABULARY),
        ([bundle(FIRST), bundle(SECOND, logprobs=[])], 1, Misalignment.PARTIAL_IDS),
        ([bundle(FIRST, prompt_ids=[])], 0, Misalignment.PARTIAL_IDS),
        ([bundle(FIRST, token_ids=[])], 0, Misalignment.PARTIAL_IDS),
        ([bundle(FIRST, logprobs=[-0.5] * 3)], 0, Misalignment.PARTIAL_IDS),
        ([bundle(FIRST, logprobs=[-0.5, -0.6])], 0, Misalignment.WRONG_LOGPROBS),
        ([bundle(FIRST, logprobs=[-0.5, float("nan")])], 0, Misalignment.WRONG_LOGPROBS),
        ([bundle(FIRST, logprobs=[None, -0.5])], 0, Misalignment.WRONG_LOGPROBS),
        ([bundle(FIRST, logprobs=["-0.5", -0.5])], 0, Misalignment.WRONG_LOGPROBS),
    ],
)
def test_what_was_not_served_like_that_is_misaligned_in_a_way_and_says_which_call(back, position, how):
    failure = reconcile(entry_of(FIRST, SECOND), back)
    assert isinstance(failure, Misaligned)
    assert (failure.kind, failure.how) == (FailureKind.MISALIGNED, how)
    assert failure.message.startswith(f"call {position} came back with")


@pytest.mark.parametrize(
    ("back", "said"),
    [
        (bundle(FIRST, token_ids=[3, 5]), "sampled id 1 is 5, call 0 had 4; 2 served"),
        (bundle(FIRST, prompt_ids=[1, 3]), "prompt id 1 is 3, call 0 had 2; 2 served"),
        (bundle(FIRST, token_ids=[3], logprobs=[-0.5]), "call 0 had 2 and 2; 2 served"),
        (bundle(FIRST, logprobs=[-0.5, -0.6]), "-0.6 as logprob of sampled token 1; call 0 was served with -0.5"),
        (bundle(FIRST, logprobs=[-0.5]), "but 1 logprobs: an incomplete token bundle; 2 served"),
    ],
)
def test_a_disagreement_says_where_the_two_part(back, said):
    assert reconcile(entry_of(FIRST, SECOND), [back]).message.endswith(said)


@pytest.mark.parametrize("indent", [None, 1])
def test_ids_that_are_still_text_and_ids_that_share_a_list_are_compared_alike(indent):
    prompt = SharedIds([1, 2])
    first = replace(call(0), prompt_ids=prompt, logprobs=[-0.5, -1e-05])
    second = replace(call(1, tokens=(7,)), prompt_ids=prompt.grown_to([1, 2, 3, 4, 9]))
    items = [
        {
            wire.PROMPT_TOKEN_IDS: list(one.prompt_ids),
            wire.GENERATION_TOKEN_IDS: one.token_ids,
            wire.GENERATION_LOG_PROBS: one.logprobs,
        }
        for one in (first, second)
    ]
    text = json.dumps({"response": {"output": items}, "reward": 1}, indent=indent)
    bundles = wire.read_run_response(wire.decode_run_response(text.encode())).bundles
    assert reconcile(entry_of(first, second), bundles) == [first, second]
    assert isinstance(reconcile(entry_of(first, replace(second, token_ids=[8])), bundles), Misaligned)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("position", range(7))
def test_one_other_id_anywhere_in_a_later_prompt_is_seen_in_text_too(position, separators):
    prompt = SharedIds([1, 2])
    first = replace(call(0), prompt_ids=prompt)
    second = replace(call(1, tokens=(7,)), prompt_ids=prompt.grown_to([1, 2, 3, 4, 9, 10, 11]))

    def back(ids):
        bundles = [(first, [1, 2]), (second, ids)]
        items = [
            dict(zip(wire.TOKEN_BUNDLE, (prompt_ids, one.token_ids, one.logprobs), strict=True))
            for one, prompt_ids in bundles
        ]
        text = json.dumps({"response": {"output": items}, "reward": 1}, separators=separators)
        return wire.read_run_response(wire.decode_run_response(text.encode())).bundles

    ids = [1, 2, 3, 4, 9, 10, 11]
    assert reconcile(entry_of(first, second), back(ids)) == [first, second]
    for other in (0, 12, 10 * ids[position]):
        changed = [*ids[:position], other, *ids[position + 1 :]]
        assert reconcile(entry_of(first, second), back(changed)).how is Misalignment.NOT_SERVED
    for shorter in (ids[:position], [*ids, 5]):
        assert isinstance(reconcile(entry_of(first, second), back(shorter)), Misaligned)


# -- a result that lost every id


def test_without_ids_the_ledger_says_what_the_calls_were():
    assert reconcile(entry_of(FIRST, SECOND), []) == [FIRST, SECOND]


def test_without_ids_a_generation_that_a_retry_superseded_does_not_count():
    assert reconcile(entry_of(LOST, FIRST, SECOND), []) == [FIRST, SECOND]
    assert reconcile(entry_of(LOST, FIRST), []) == [FIRST], "the last one is what the retry got"
    assert reconcile(entry_of(FIRST, SECOND, call(3, prompt=(1, 2, 3, 4, 9), tokens=(8,))), []) == [
        FIRST,
        call(3, prompt=(1, 2, 3, 4, 9), tokens=(8,)),
    ]


def test_without_ids_a_branch_that_was_given_up_does_not_count():
    given_up = call(1, prompt=(1, 2, 3, 4, 8), tokens=(6,))
    assert reconcile(entry_of(FIRST, given_up, SECOND), []) == [FIRST, SECOND]


def test_without_ids_conversations_with_other_beginnings_each_count():
    compacted = call(3, prompt=(1, 9), tokens=(4,))
    goes_on = call(4, prompt=(1, 9, 4, 5), tokens=(2,))
    assert reconcile(entry_of(FIRST, SECOND, compacted, goes_on), []) == [FIRST, SECOND, compacted, goes_on]


@pytest.mark.parametrize("back", [[], [bundle(FIRST)]])
def test_a_rollout_without_a_served_call_is_a_failure(back):
    failure = reconcile(entry_of(), back)
    assert isinstance(failure, Failure)
    assert failure.kind is (FailureKind.MISALIGNED if back else FailureKind.NO_TOKEN_IDS)


ids = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 7), ids, ids), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_whatever_comes_back_every_call_that_counts_was_kept_and_its_history_counts_too(plan, rng):
    """Random trees of calls over a small alphabet; the agent keeps a random part of the ids."""
    calls = []
    for index, (parent, words, tokens) in enumerate(plan):
        start = [*calls[parent].prompt_ids, *calls[parent].token_ids] if 0 <= parent < index else []
        calls.append(call(index, prompt=[*start, *words], tokens=tokens))
    kept = [one for one in calls if rng.random() < 0.5]
    found = reconcile(entry_of(*calls), [bundle(one) for one in kept])
    assert isinstance(found, list)
    numbers = [one.index for one in found]
    assert numbers == sorted(set(numbers))
    for one in found:
        history = [earlier for earlier in calls[: one.index] if one.continues(earlier)]
        assert all(any(same_ids(earlier, other) for other in found) for earlier in history)
        assert not kept or any(same_ids(one, other) or other.continues(one) for other in kept)
    if not kept:
        assert found[-1] is calls[-1], "the last call of all is the last of its conversation"


def same_ids(one, other):
    return (one.prompt_ids, one.token_ids) == (other.prompt_ids, other.token_ids)


# -- the rollout that becomes of it

BASE = Rollout(rollout_id="run.0.train.5.1.0", task_index=3, group_id=5, attempt=1, agent="a")


def played(bundles=(), **fields):
    return wire.Played(
        reward=0.5, prompt=[], output=[{"type": "message"}], bundles=list(bundles), truncated=False, **fields
    )


def test_a_rollout_says_how_many_calls_were_left_out_and_whether_ids_were_lost():
    with_ids = finished(BASE, played([bundle(FIRST)]), entry_of(LOST, FIRST))
    assert (with_ids.calls, with_ids.unconfirmed_calls, with_ids.ids_lost) == ([FIRST], 1, False)
    without = finished(BASE, played(), entry_of(LOST, FIRST))
    assert (without.calls, without.unconfirmed_calls, without.ids_lost) == ([FIRST], 1, True)


def test_a_failed_one_keeps_its_words_and_names_the_rollout_the_call_and_the_position():
    rollout = finished(BASE, played([bundle(FIRST, token_ids=[3, 9])], reward_components={"a": 1.0}), entry_of(FIRST))
    assert rollout.reward is None
    assert rollout.output == [{"type": "message"}]
    assert rollout.failure.message == (
        "rollout run.0.train.5.1.0: call 0 came back with 2 prompt ids and 2 sampled ids that were not served to this "
        "rollout: sampled id 1 is 9, call 0 had 4; 1 served"
    )


def test_random_orders_do_not_matter_where_nothing_is_continued():
    calls = [call(i, prompt=(i,), tokens=(9,)) for i in range(8)]
    back = [bundle(one) for one in calls]
    random.Random(0).shuffle(back)
    assert reconcile(entry_of(*calls), back) == calls
