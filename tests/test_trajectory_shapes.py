"""The shapes that a rollout of real Gym can come back in, one by one, and what becomes of each.

From the bytes of a ``/run`` and the ledger's page to trajectories. Recorded answers of Gym 0.4.0 where there is one for
the shape; others are built after its documents.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_gym.comparison import WindowSettings, compare
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.gym import wire
from lightning_gym.outcome import Outcome
from lightning_gym.policy.conversation import Conversation
from lightning_gym.policy.ledger import Entry, Served
from lightning_gym.reconcile import finished
from lightning_gym.rollout import Call, FailureKind, Misalignment, Rollout, SamplingProfile
from lightning_gym.trajectory import trajectories
from tests.test_collect import collect

SAMPLES = Path(__file__).parent / "gym_samples"
NOTHING_SAID = Conversation(messages=(), tools=b"", template_kwargs=b"")
EOS = 2


# -- building blocks: calls, Responses items, results


def call(prompt, tokens, *, index=0, version=0, finish_reason="stop"):
    """Every token of a rollout has a logprob of its own, so that a swapped one is seen."""
    logprobs = [-(index * 100 + i + 1) / 64 for i in range(len(tokens))]
    return Call(
        index=index,
        prompt_ids=list(prompt),
        token_ids=list(tokens),
        logprobs=logprobs,
        finish_reason=finish_reason,
        weight_version=version,
    )


def chain(*turns, **options):
    """Calls that each go on from the one before: pairs of new prompt ids and sampled ids."""
    calls, seen = [], []
    for index, (words, tokens) in enumerate(turns):
        calls.append(call([*seen, *words], tokens, index=index, **options))
        seen = [*seen, *words, *tokens]
    return calls


def ids_of(one):
    values = (list(one.prompt_ids), list(one.token_ids), list(one.logprobs))
    return dict(zip(wire.TOKEN_BUNDLE, values, strict=True)) | {"routed_experts": None}


def said(text="ok", one=None, role="assistant"):
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": None}]
    return {"type": "message", "role": role, "content": content} | (ids_of(one) if one else {})


def reasoned(one=None):
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]} | (ids_of(one) if one else {})


def called(one=None, call_id="c1"):
    item = {"type": "function_call", "call_id": call_id, "name": "add", "arguments": "{}"}
    return item | (ids_of(one) if one else {})


def answered(call_id="c1"):
    return {"type": "function_call_output", "call_id": call_id, "output": "1"}


def result(*items, reward=1.0, incomplete=None, **fields):
    response = {"output": list(items), "incomplete_details": incomplete and {"reason": incomplete}}
    return {"responses_create_params": {"input": "x"}, "response": response, "reward": reward} | fields


def rollout_of(body, served, *, attempt=0, breaks=()):
    """The rollout that a ``/run`` and what was served to it come to."""
    entry = Entry(profile="train", seed=0, breaks=list(breaks))
    entry.served.extend(Served(call=one, told=NOTHING_SAID) for one in served)
    played = wire.read_run_response(wire.decode_run_response(json.dumps(body).encode()))
    base = Rollout(rollout_id=f"r{attempt}", task_index=0, group_id=0, attempt=attempt, agent="a")
    return finished(base, played, entry)


def segments_of(body, served):
    rollout = rollout_of(body, served)
    assert rollout.failure is None, rollout.failure
    segments = trajectories(rollout)
    check(segments, rollout.calls)
    return segments


def check(segments, calls):
    """Every sampled token of the calls trains exactly once, with its logprob and version; nothing else does."""
    trained = Counter()
    for segment in segments:
        where = np.flatnonzero(segment.loss_mask)
        tokens, logprobs = segment.token_ids[where], segment.rollout_logprobs[where]
        trained.update(zip(tokens.tolist(), logprobs.tolist(), segment.weight_versions[where].tolist(), strict=True))
        assert not segment.rollout_logprobs[~segment.loss_mask].any()
        assert (segment.weight_versions[~segment.loss_mask] == -1).all()
    assert trained == Counter(
        (token, logprob, one.weight_version)
        for one in calls
        for token, logprob in zip(one.token_ids, np.float32(one.logprobs).tolist(), strict=True)
    )


def texts(segments):
    """Ids and trained ids of each segment."""
    return [(s.token_ids.tolist(), s.token_ids[s.loss_mask].tolist()) for s in segments]


def failed(body, served):
    rollout = rollout_of(body, served)
    assert rollout.failure is not None
    assert (rollout.reward, rollout.calls) == (None, ())
    return rollout.failure


def recorded_whole(name):
    sample = json.loads((SAMPLES / "whole" / f"{name}.json").read_text())
    calls = [
        Call(
            index=index,
            prompt_ids=one[wire.PROMPT_TOKEN_IDS],
            token_ids=one[wire.GENERATION_TOKEN_IDS],
            logprobs=one[wire.GENERATION_LOG_PROBS],
            finish_reason=one["finish_reason"],
            weight_version=0,
        )
        for index, one in enumerate(sample["served"])
    ]
    return sample["response"], calls


def recorded_contract(name):
    """A rollout that the recording policy played, with what it served: `recording_policy.completion`'s numbers."""
    body = json.loads((SAMPLES / "session_state_contract.json").read_text())[name]["result"]
    bundles = wire.read_run_response(body).bundles
    served = [
        Call(
            index=index,
            prompt_ids=bundle.prompt_ids,
            token_ids=bundle.token_ids,
            logprobs=bundle.logprobs,
            finish_reason="stop",
            weight_version=0,
        )
        for index, bundle in enumerate(bundles)
    ]
    return body, served


FIRST, SECOND, THIRD = chain(([1, 10, 7], [20, EOS]), ([30, 7], [21, EOS]), ([31, 7], [22, EOS]))


# -- the 26 shapes


def test_shape_1_a_single_step_is_one_segment():
    sample = json.loads((SAMPLES / "tiny_copy.json").read_text())["response"]
    (bundle,) = wire.read_run_response(sample).bundles
    one = replace(FIRST, prompt_ids=bundle.prompt_ids, token_ids=bundle.token_ids, logprobs=bundle.logprobs)
    (segment,) = segments_of(sample, [one])
    assert segment.token_ids.tolist() == [*bundle.prompt_ids, *bundle.token_ids]
    assert segment.loss_mask.tolist() == [False] * len(bundle.prompt_ids) + [True] * len(bundle.token_ids)


def test_shape_2_a_multi_step_tool_rollout_is_one_segment_that_trains_generations_only():
    body, served = recorded_whole("single_tool_call")
    (segment,) = segments_of(body, served)
    assert (len(segment), segment.num_trained) == (592 + 44, 95 + 44)
    assert not segment.loss_mask[391 + 95 : 592].any(), "the tool's answer and the next turn's head"
    bodies = result(called(FIRST), answered(), called(SECOND), answered(), said("done", THIRD))
    assert texts(segments_of(bodies, [FIRST, SECOND, THIRD])) == [
        ([1, 10, 7, 20, EOS, 30, 7, 21, EOS, 31, 7, 22, EOS], [20, EOS, 21, EOS, 22, EOS])
    ]


def test_shape_3_a_users_turns_inside_of_the_output_are_prompt():
    user = {"type": "message", "role": "user", "content": "Your hand: [7, 5, 4] = 16"}
    body = result(said("<action>hit</action>", FIRST), user, said("<action>stand</action>", SECOND), reward=-1.0)
    assert texts(segments_of(body, [FIRST, SECOND])) == [([1, 10, 7, 20, EOS, 30, 7, 21, EOS], [20, EOS, 21, EOS])]
    assert rollout_of(body, [FIRST, SECOND]).reward == -1.0


def test_shape_4_parallel_tool_calls_carry_the_ids_of_their_call_on_the_last_item():
    body, served = recorded_contract("right")
    items = body["response"]["output"]
    assert [item["type"] for item in items[:4]] == ["function_call"] * 2 + ["function_call_output"] * 2
    assert [wire.PROMPT_TOKEN_IDS in item for item in items[:2]] == [False, True]
    assert [list(one.token_ids) for one in rollout_of(body, served).calls] == [[10, 4], [11, 4], [12, 4]]
    swapped = result(called(), called(FIRST, "c2"), answered("c2"), answered("c1"), said("done", SECOND))
    assert len(segments_of(swapped, [FIRST, SECOND])) == 1


@pytest.mark.parametrize("name", ["reasoning", "thinking in the text", "reasoning and nothing else"])
def test_shape_5_ids_are_taken_from_an_item_of_any_type(name):
    body, served = recorded_contract(name)
    items = body["response"]["output"]
    assert "reasoning" in {item["type"] for item in items}
    calls = rollout_of(body, served).calls
    assert len(calls) == sum(bool(item.get(wire.GENERATION_TOKEN_IDS)) for item in items) > 0


def test_shape_6_a_reasoning_only_loop_opens_a_segment_wherever_the_prompt_does_not_go_on():
    """The recorded policy renders merged reasoning anew, so prompts go on once and are then the same again."""
    body, served = recorded_whole("reasoning_only_turns")
    segments = segments_of(body, served)
    assert [len(segment) for segment in segments] == [480, 480, 574, 711]
    assert [segment.num_trained for segment in segments] == [80, 40, 134, 83]
    spliced = chain(([1, 7], [20]), ([7], [21]), ([7], [22, EOS]))
    assert len(segments_of(result(*map(reasoned, spliced[:2]), said("done", spliced[2])), spliced)) == 1


@pytest.mark.parametrize("name", ["answer cut", "call cut"])
def test_shape_7_an_answer_cut_by_its_token_limit_trains_as_it_is_and_is_flagged(name):
    body, served = recorded_contract(name)
    rollout = rollout_of(body, served)
    assert (rollout.truncated, rollout.context_overflow) == (True, False)
    assert sum(segment.num_trained for segment in trajectories(rollout)) == 2
    cut = call([1, 7], [20, 21], finish_reason="length")
    goes_on = call([1, 7, 20, 21, EOS, 30, 7], [22, EOS], index=1)
    body = result(said("a", cut), said("b", goes_on))
    assert rollout_of(body, [cut, goes_on]).truncated, "also where the agent went on"
    assert texts(segments_of(body, [cut, goes_on])) == [([1, 7, 20, 21, EOS, 30, 7, 22, EOS], [20, 21, 22, EOS])]


def test_shape_8_a_context_overflow_is_skipped_and_flagged_and_the_turns_before_it_train():
    body, served = recorded_contract("later prompt too long")
    rollout = rollout_of(body, served)
    assert (rollout.reward, rollout.context_overflow, rollout.truncated) == (1.0, True, True)
    assert sum(segment.num_trained for segment in trajectories(rollout)) == 2


@pytest.mark.parametrize("recorded", ["contract", "real servers"])
def test_shape_8_a_rollout_whose_first_prompt_does_not_fit_failed_and_says_so(recorded):
    body = (
        recorded_contract("first prompt too long")[0]
        if recorded == "contract"
        else json.loads((SAMPLES / "f_400ctx_first.json").read_text())["body"]
    )
    failure = failed(body, [])
    assert failure.kind is FailureKind.NO_TOKEN_IDS
    assert "its first prompt did not fit the context window" in failure.message


@pytest.mark.parametrize("name", ["empty answer", "no content"])
def test_shape_9_an_immediate_turn_end_is_a_sampled_token_and_trains(name):
    body, served = recorded_contract(name)
    assert sum(segment.num_trained for segment in segments_of(body, served)) == 2
    one = call([1, 7], [EOS])
    assert texts(segments_of(result(said("", one)), [one])) == [([1, 7, EOS], [EOS])]
    rollout = rollout_of(result(said("", one)), [one])
    assert not rollout.context_overflow


def test_shape_9_a_turn_without_a_single_token_is_no_call():
    empty = said("") | {wire.PROMPT_TOKEN_IDS: [1, 7], wire.GENERATION_TOKEN_IDS: [], wire.GENERATION_LOG_PROBS: []}
    (segment,) = segments_of(result(empty, said("b", FIRST)), [FIRST])
    assert segment.num_trained == 2


def test_shape_10_an_error_a_timeout_and_a_lost_connection_are_failures_and_never_a_reward_of_zero():
    collection, seen, _ = collect(
        lambda _g, a, _t: [500, "hang", 503, 1.0, 0.5, 0.25][a], group_size=6, timeout=0.5, max_failed_frac=0.5
    )
    kinds = [rollout.failure and rollout.failure.kind for rollout in collection.rollouts]
    assert kinds == [FailureKind.ENVIRONMENT, FailureKind.TIMEOUT, FailureKind.INFRA, None, None, None]
    assert [rollout.reward for rollout in collection.rollouts] == [None, None, None, 1.0, 0.5, 0.25]
    assert len(collection.rollouts) == 6, "the group keeps its shape"
    assert [rollout.attempt for rollout in collection.survivors] == [3, 4, 5]
    assert sum(".0.2." in rollout_id for rollout_id in seen) == 3, "what another try could change was tried again"


@pytest.mark.parametrize("fields", [{"mask_sample": True}, {"instance_config": {"mask_sample": True}}])
def test_shape_11_a_masked_sample_is_out_of_the_loss_and_of_the_baseline(fields):
    rewards = [1.0, 0.0, 0.0]
    bodies = [result(said("a", FIRST), reward=reward) for reward in rewards]
    rollouts = [rollout_of(body, [FIRST], attempt=i) for i, body in enumerate([bodies[0] | fields, *bodies[1:]])]
    assert [(rollout.masked, rollout.reward) for rollout in rollouts] == [(True, 1.0), (False, 0.0), (False, 0.0)]
    outcomes = [Outcome.of(rollout, 1) for rollout in rollouts]
    advantages = compare(outcomes, WindowSettings(prompts_per_step=1, group_size=3)).advantages
    assert advantages == {"r1": 0.0, "r2": 0.0}, "with the masked one in the baseline they would be -1/3"


def test_shape_11_a_failure_row_is_a_failure_whatever_reward_it_carries():
    row = result(said("Failed: no disk"), reward=0.0, _ng_failure_class="legitimate", error_message="no disk")
    failure = wire.read_failure(row)
    assert (failure.kind, failure.message) == (FailureKind.ENVIRONMENT, "Gym reports `legitimate`: no disk")
    assert wire.read_failure(result(said("a", FIRST), _ng_failure_class=None)) is None


def test_shape_12_a_result_without_ids_is_made_of_the_ledgers_calls():
    rollout = rollout_of(result(called(), answered(), said("done")), [FIRST, SECOND])
    assert rollout.ids_lost
    assert texts(trajectories(rollout)) == [([1, 10, 7, 20, EOS, 30, 7, 21, EOS], [20, EOS, 21, EOS])]


def test_shape_12_a_result_without_ids_of_which_nothing_was_served_failed():
    failure = failed(result(said("done")), [])
    assert failure.kind is FailureKind.NO_TOKEN_IDS
    assert failure.message == "rollout r0: the rollout came back without a call that was served"


@pytest.mark.parametrize(
    ("fabricated", "how"),
    [
        (dict(zip(wire.TOKEN_BUNDLE, ([0], [0], [0.0]), strict=True)), Misalignment.NOT_SERVED),
        (ids_of(FIRST), Misalignment.DUPLICATE),
        (ids_of(replace(SECOND, token_ids=[10**9, EOS])), Misalignment.NOT_SERVED),
        (ids_of(replace(SECOND, token_ids=[-1, EOS])), Misalignment.OUT_OF_VOCABULARY),
    ],
    ids=["zeros", "the last call's again", "beyond every vocabulary", "negative"],
)
def test_shape_13_fabricated_ids_fail_the_rollout(fabricated, how):
    failure = failed(result(said("a", FIRST), said("b") | fabricated), [FIRST, SECOND])
    assert failure.how is how
    assert failure.message.startswith("rollout r0: call 1 came back with")


def test_shape_13_empty_ids_in_the_place_of_a_calls_are_lost_ones():
    empty = {key: [] for key in wire.TOKEN_BUNDLE}
    assert rollout_of(result(said("a") | empty, said("b") | empty), [FIRST, SECOND]).calls == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("key", "value", "how"),
    [
        (wire.GENERATION_LOG_PROBS, None, Misalignment.PARTIAL_IDS),
        (wire.GENERATION_LOG_PROBS, [-0.5], Misalignment.PARTIAL_IDS),
        (wire.PROMPT_TOKEN_IDS, None, Misalignment.PARTIAL_IDS),
        (wire.GENERATION_TOKEN_IDS, None, Misalignment.PARTIAL_IDS),
        (wire.GENERATION_LOG_PROBS, [math.nan, -0.5], Misalignment.WRONG_LOGPROBS),
        (wire.GENERATION_LOG_PROBS, [None, -0.5], Misalignment.WRONG_LOGPROBS),
        (wire.GENERATION_LOG_PROBS, [-9999.0, -9999.0], Misalignment.WRONG_LOGPROBS),
    ],
)
def test_shape_14_partial_ids_fail_the_rollout_and_say_which_call(key, value, how):
    failure = failed(result(said("a", FIRST) | {key: value}), [FIRST])
    assert failure.how is how
    assert "call 0" in failure.message


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 0.5])
def test_shape_14_a_served_logprob_that_is_none_is_refused_by_call_and_position(bad):
    one = replace(FIRST, logprobs=[-0.5, bad])
    with pytest.raises(
        AlignmentError, match=r"rollout r0 \(task 0, attempt 0\), call 0: logprob of sampled token 1 is"
    ):
        trajectories(rollout_of(result(said("a")), [one]))


def test_shape_15_a_compacted_history_opens_a_segment_and_the_rollout_counts_once():
    compacted = call([1, 40, 7], [23, EOS], index=2)
    later = call([1, 40, 7, 23, EOS, 32, 7], [24, EOS], index=3)
    calls = [FIRST, SECOND, compacted, later]
    body = result(*(said("a", one) for one in calls))
    segments = segments_of(body, calls)
    assert texts(segments) == [
        ([1, 10, 7, 20, EOS, 30, 7, 21, EOS], [20, EOS, 21, EOS]),
        ([1, 40, 7, 23, EOS, 32, 7, 24, EOS], [23, EOS, 24, EOS]),
    ]
    assert [segment.segment for segment in segments] == [0, 1]
    assert {segment.rollout_id for segment in segments} == {"r0"}
    others = [rollout_of(result(said("a", FIRST), reward=0.0), [FIRST], attempt=i) for i in (1, 2)]
    outcomes = [Outcome.of(rollout_of(body, calls), len(segments)), *(Outcome.of(rollout, 1) for rollout in others)]
    advantages = compare(outcomes, WindowSettings(prompts_per_step=1, group_size=3)).advantages
    assert advantages == pytest.approx({"r0": 2 / 3, "r1": -1 / 3, "r2": -1 / 3}), "one a rollout, not one a segment"


def test_shape_16_interleaved_sub_agents_each_have_a_segment():
    sub = [call([1, 50, 7], [60, EOS], index=1), call([1, 50, 7, 60, EOS, 51, 7], [61], index=3)]
    main = [FIRST, replace(SECOND, index=2), replace(THIRD, index=4)]
    calls = [main[0], sub[0], main[1], sub[1], main[2]]
    for order in (calls, [*sub, *main], [*main, *sub]):  # an agent reports its sub-agents when it likes
        segments = segments_of(result(*(said("a", one) for one in order)), calls)
        assert [segment.token_ids[segment.loss_mask].tolist() for segment in segments] == [
            [20, EOS, 21, EOS, 22, EOS],
            [60, EOS, 61],
        ]


def test_shape_17_parallel_branches_share_a_prompt_and_train_the_history_once():
    left, right = (call([*SECOND.prompt_ids], [token, EOS], index=i) for i, token in ((1, 41), (2, 42)))
    joined = call([1, 90, 7], [43, EOS], index=3)
    calls = [FIRST, left, right, joined]
    for order in (calls, [FIRST, right, left, joined]):
        segments = segments_of(result(*(said("a", one) for one in order)), calls)
        assert texts(segments) == [
            ([1, 10, 7, 20, EOS, 30, 7, 41, EOS], [20, EOS, 41, EOS]),
            ([1, 10, 7, 20, EOS, 30, 7, 42, EOS], [42, EOS]),
            ([1, 90, 7, 43, EOS], [43, EOS]),
        ]


@pytest.mark.parametrize("with_ids", [True, False])
def test_shape_18_a_generation_that_a_retry_superseded_does_not_train(with_ids):
    lost = call(FIRST.prompt_ids, [29, EOS])
    kept = [replace(FIRST, index=1), replace(SECOND, index=2)]
    body = result(*(said("a", one if with_ids else None) for one in kept))
    rollout = rollout_of(body, [lost, *kept])
    assert rollout.calls == kept
    assert rollout.unconfirmed_calls == 1
    assert texts(trajectories(rollout)) == [([1, 10, 7, 20, EOS, 30, 7, 21, EOS], [20, EOS, 21, EOS])]


def test_shape_19_a_judges_calls_on_our_endpoint_do_not_train():
    judge = call([1, 70, 7], [71, EOS], index=1)
    rollout = rollout_of(result(said("a", FIRST), said("b", SECOND)), [FIRST, judge, SECOND, judge])
    assert rollout.calls == [FIRST, SECOND]
    assert rollout.unconfirmed_calls == 2


def test_shape_20_an_image_is_refused_in_words():
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    row = {"responses_create_params": {"input": [{"role": "user", "content": [image]}]}}
    with pytest.raises(ConfigError, match="input item 0 has a part of type 'input_image'; the policy reads text only"):
        wire.run_request(row, "r0", SamplingProfile(), 0)


@pytest.mark.parametrize("experts", [None, "nrlre1:AAAA", [[[1, 2], [3, 4]]]])
def test_shape_21_expert_routing_is_passed_over(experts):
    body = result(said("a", FIRST) | {"routed_experts": experts})
    assert len(segments_of(body, [FIRST])) == 1
    assert rollout_of(body, [FIRST]).output == [said("a") | {"content": said("a")["content"]}]


def test_shape_22_the_parts_of_a_reward_are_kept_beside_the_sum():
    parts = {"correctness": 1.0, "schema_valid": 1, "format": 0.5}
    rollout = rollout_of(result(said("a", FIRST), reward=2.5, reward_components=parts), [FIRST])
    assert (rollout.reward, rollout.reward_components) == (2.5, parts)


def test_shape_23_a_very_long_rollout_ends_at_a_call_and_its_segments_each_fit_the_window():
    """The endpoint answers up to the window's end, refuses the next prompt, and says so; nothing is cut here."""
    window, calls, seen = 256, [], [1]
    for index in range(12):
        prompt = [*seen, 30]
        room = window - len(prompt)
        if room < 1:
            break
        tokens = [20 + i % 9 for i in range(min(40, room))]
        calls.append(call(prompt, tokens, index=index, finish_reason="stop" if len(tokens) == 40 else "length"))
        seen = [*prompt, *tokens]
    items = [said("a", one) for one in calls]
    body = result(*items, said(""), incomplete="max_output_tokens")
    rollout = rollout_of(body, calls)
    assert (rollout.truncated, rollout.context_overflow) == (True, True)
    (segment,) = trajectories(rollout)
    check([segment], calls)
    assert len(segment) == window
    assert segment.num_trained == sum(len(one.token_ids) for one in calls)


@pytest.mark.parametrize(
    ("text", "count"),
    [("<tool_call>\n{'name': }", 1), ("so: </tool_call>", 1), ("a tool_call that is none, 1 < 2", 0), ("", 0)],
)
def test_shape_24_a_tool_call_that_the_parser_could_not_read_is_counted(text, count):
    user = said("<tool_call>", role="user")
    assert rollout_of(result(said(text, FIRST), user), [FIRST]).invalid_tool_calls == count


def test_shape_25_every_token_keeps_the_version_of_its_own_call():
    calls = [replace(FIRST, weight_version=4), replace(SECOND, weight_version=5)]
    (segment,) = segments_of(result(said("a", calls[0]), said("b", calls[1])), calls)
    assert segment.weight_versions.tolist() == [-1, -1, -1, 4, 4, -1, -1, 5, 5]


def test_shape_26_a_group_without_variance_has_advantages_of_exactly_zero_and_keeps_its_shape():
    rollouts = [rollout_of(result(said("a", FIRST), reward=0.1 + 0.2), [FIRST], attempt=i) for i in range(4)]
    settings = WindowSettings(prompts_per_step=1, group_size=4, advantage_scale="group_std")
    assert compare([Outcome.of(rollout, 1) for rollout in rollouts], settings).advantages == {
        "r0": 0.0, "r1": 0.0, "r2": 0.0, "r3": 0.0
    }  # fmt: skip
    assert [len(trajectories(rollout)) for rollout in rollouts] == [1] * 4


def test_shape_26_a_group_in_which_every_attempt_failed_has_nobody_to_train():
    collection, _, _ = collect(lambda g, _a, _t: 422 if g == 0 else 1.0, num_tasks=2, max_failed_frac=0.5)
    assert [(rollout.group_id, rollout.reward) for rollout in collection.rollouts] == [(0, None)] * 2 + [(1, 1.0)] * 2
    assert {rollout.group_id for rollout in collection.survivors} == {1}
