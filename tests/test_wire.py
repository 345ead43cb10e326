"""Gym's JSON, against rollouts that real Gym 0.4.0 played, and against documents that nobody should send."""

import copy
import json
import math
from pathlib import Path

import msgspec
import pytest

from lightning_gym.errors import ConfigError
from lightning_gym.gym import wire
from lightning_gym.gym.number_arrays import NumberArray
from lightning_gym.policy.ledger import SharedIds
from lightning_gym.rollout import SamplingProfile

SAMPLES = Path(__file__).parent / "gym_samples"
NUM_CALLS = {
    "multi_step_native_ids": None,
    "single_tool_call": 2,
    "single_tool_call_native_ids": 2,
    "tiny_copy": 1,
    "v_empty_content": 1,
    "v_input_str": 1,
    "v_malformed_tool_args": 2,
    "v_max_output_tokens_16_length": 1,
    "v_metadata_extra_body": 2,
    "v_reasoning_only_turns": None,
    "v_unknown_tool": 2,
    "v_wrong_arg_schema": 2,
}


def recorded(name):
    return json.loads((SAMPLES / f"{name}.json").read_text())


def sent_params(row, profile=None, rollout_id="run.0.train.5.1.0", seed=7):
    body = wire.run_request(row, rollout_id, profile or SamplingProfile(), seed)
    return body["responses_create_params"]


# -- the request


def test_a_row_is_sent_with_the_profile_and_its_rollout_id():
    row = {"responses_create_params": {"input": "x", "tools": []}, "agent_ref": {"name": "a"}, "target": 3}
    profile = SamplingProfile(temperature=0.7, top_p=0.9, top_k=20, max_output_tokens=128)
    body = wire.run_request(row, "r1", profile, 99)
    extra = json.loads(body["responses_create_params"]["metadata"]["extra_body"])
    assert extra == {"lightning_gym_rollout_id": "r1", "top_k": 20, "seed": 99}
    assert {key: body[key] for key in ("agent_ref", "target")} == {"agent_ref": {"name": "a"}, "target": 3}
    assert {key: value for key, value in body["responses_create_params"].items() if key != "metadata"} == {
        "input": "x",
        "tools": [],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_output_tokens": 128,
    }


def test_the_rows_own_metadata_is_kept_and_its_extra_body_merged():
    extra = json.dumps({"min_p": 0.1, "seed": 1, "chat_template_kwargs": {"enable_thinking": False}})
    metadata = {"note": "keep", "extra_body": extra}
    params = sent_params({"responses_create_params": {"input": "x", "metadata": metadata, "temperature": 0.1}})
    assert params["metadata"]["note"] == "keep"
    assert json.loads(params["metadata"]["extra_body"]) == {
        "min_p": 0.1,
        "chat_template_kwargs": {"enable_thinking": False},
        "lightning_gym_rollout_id": "run.0.train.5.1.0",
        "top_k": -1,
        "seed": 7,
    }
    assert params["temperature"] == 1.0
    assert all(isinstance(value, str) for value in params["metadata"].values())


@pytest.mark.parametrize(
    ("of_row", "of_profile", "sent"), [(None, None, None), (16, None, 16), (None, 32, 32), (16, 32, 16), (64, 32, 32)]
)
def test_the_smaller_limit_of_row_and_profile_is_sent(of_row, of_profile, sent):
    params = {"input": "x"} | ({} if of_row is None else {"max_output_tokens": of_row})
    got = sent_params({"responses_create_params": params}, SamplingProfile(max_output_tokens=of_profile))
    assert got.get("max_output_tokens") == sent
    assert ("max_output_tokens" in got) is (sent is not None)


def test_a_row_is_not_changed_by_sending_it():
    row = {"responses_create_params": {"input": "x", "metadata": {"extra_body": "{}"}}}
    before = copy.deepcopy(row)
    wire.run_request(row, "r", SamplingProfile(max_output_tokens=3), 1)
    assert row == before


# -- the answer, as real Gym gave it


@pytest.mark.parametrize("name", NUM_CALLS)
def test_a_recorded_rollout_is_read_call_by_call(name):
    sample = recorded(name)
    played = wire.read_run_response(sample["response"])
    items = sample["response"]["response"]["output"]
    assert played.reward == sample["response"]["reward"]
    assert [b.token_ids for b in played.bundles] == [
        i["generation_token_ids"] for i in items if i.get("generation_token_ids")
    ]
    chats = [call for call in sample["policy_calls"] if call["path"].endswith("/chat/completions")]
    assert len(played.bundles) == len(chats) == (NUM_CALLS[name] or len(chats))
    for bundle in played.bundles:
        assert len(bundle.token_ids) == len(bundle.logprobs) > 0
        assert bundle.prompt_ids
        assert all(logprob <= 0 for logprob in bundle.logprobs)
    assert [item["type"] for item in played.output] == [item["type"] for item in items]
    assert not any(key in item for item in played.output for key in (*wire.TOKEN_BUNDLE, "routed_experts"))
    assert not any(value is None for item in played.output for value in item.values())
    assert played.prompt


def test_the_recorded_samples_are_all_accounted_for():
    ok = {path.stem for path in SAMPLES.glob("*.json") if recorded(path.stem).get("policy_calls")}
    assert ok == {*NUM_CALLS, "v_nologprobs"}


def test_ids_that_the_policy_put_on_its_message_come_back_with_the_answer():
    sample = recorded("single_tool_call_native_ids")
    served = [call["response"]["choices"][0]["message"] for call in sample["policy_calls"]]
    bundles = wire.read_run_response(sample["response"]).bundles
    assert [b.prompt_ids for b in bundles] == [m["prompt_token_ids"] for m in served]
    assert [b.token_ids for b in bundles] == [m["generation_token_ids"] for m in served]
    assert [b.logprobs for b in bundles] == [m["generation_log_probs"] for m in served]


def test_a_turn_cut_by_its_limit_is_truncated_and_others_are_not():
    assert wire.read_run_response(recorded("v_max_output_tokens_16_length")["response"]).truncated
    assert not wire.read_run_response(recorded("single_tool_call")["response"]).truncated


def test_a_prompt_in_one_text_becomes_a_user_message():
    played = wire.read_run_response(recorded("v_input_str")["response"])
    assert [(m["role"], type(m["content"])) for m in played.prompt] == [("user", str)]


def test_numbers_beside_the_reward_are_metrics():
    assert wire.read_run_response(recorded("tiny_copy")["response"]).metrics == {"n_chars": 27.0}


def test_an_overflow_on_the_first_call_is_a_truncated_rollout_without_ids():
    played = wire.read_run_response(recorded("f_400ctx_first")["body"])
    assert (played.truncated, played.bundles) == (True, [])


# -- what is refused


def answer(**changes):
    item = {"type": "message", "content": [], "prompt_token_ids": [1, 2], "generation_token_ids": [3]}
    response = {"output": [item | {"generation_log_probs": [-0.5]}], "incomplete_details": None}
    return {"responses_create_params": {"input": "x"}, "response": response, "reward": 1.0} | changes


def with_item(**changes):
    body = answer()
    body["response"]["output"][0].update(changes)
    return body


def test_a_whole_answer_is_read():
    played = wire.read_run_response(answer(reward=1, steps=3, ok=True, name="x", _hidden=9))
    (bundle,) = played.bundles
    assert (bundle.prompt_ids, bundle.token_ids, bundle.logprobs) == ([1, 2], [3], [-0.5])
    assert (played.reward, played.metrics) == (1.0, {"steps": 3.0})
    assert played.prompt == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("echo", [None, [], {}, {"input": None}])
def test_an_answer_that_does_not_repeat_the_prompt_is_read_without_one(echo):
    assert wire.read_run_response(answer(responses_create_params=echo)).prompt == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "got keys NoneType"),
        ([], "got keys list"),
        ("fine", "got keys str"),
        ({}, "`response.output`"),
        ({"detail": [], "a": 1}, "got keys a, detail"),
        (answer(response=None), "`response.output`"),
        (answer(response={"output": None}), "`response.output`"),
        (answer(reward=None), "`reward`.*got None"),
        (answer(reward="1"), "`reward`.*got '1'"),
        (answer(reward=True), "`reward`.*got True"),
        (answer(reward=float("nan")), "`reward`.*got nan"),
        (answer(reward=float("inf")), "`reward`.*got inf"),
        ({key: value for key, value in answer().items() if key != "reward"}, "`reward`.*got None"),
        (answer(response={"output": ["text"]}), "output item 0"),
    ],
)
def test_a_malformed_answer_is_refused_by_its_key(body, said):
    with pytest.raises(ValueError, match=said):
        wire.read_run_response(body)


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"prompt_token_ids": None}, (0, 1, 1)),
        ({"prompt_token_ids": []}, (0, 1, 1)),
        ({"generation_log_probs": None}, (2, 1, 0)),
        ({"generation_log_probs": [-0.5, -0.5]}, (2, 1, 2)),
        ({"generation_token_ids": 7}, (2, 0, 1)),
        ({"generation_token_ids": None}, (2, 0, 1)),
    ],
)
def test_a_part_of_the_ids_is_read_as_it_is_and_is_not_whole(changes, lengths):
    (bundle,) = wire.read_run_response(with_item(**changes)).bundles
    assert (len(bundle.prompt_ids), len(bundle.token_ids), len(bundle.logprobs)) == lengths
    assert not bundle.is_whole


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(wire.TOKEN_BUNDLE),
        {key: [] for key in wire.TOKEN_BUNDLE},
        {"generation_token_ids": [], "generation_log_probs": []},
        {"generation_token_ids": [], "generation_log_probs": None},
    ],
)
def test_an_item_without_ids_or_with_none_sampled_is_no_call(changes):
    assert wire.read_run_response(with_item(**changes)).bundles == []


@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        ({}, False),
        ({"mask_sample": True}, True),
        ({"mask_sample": False}, False),
        ({"mask_sample": None, "instance_config": None}, False),
        ({"instance_config": {"mask_sample": True}}, True),
        ({"instance_config": {"mask_sample": False}}, False),
        # nemo-gym 0.7.0 says what went wrong beside it, which does not decide whether the reward is a measurement.
        ({"mask_sample": True, "failure_kind": "session_lost", "failure_reason": "it was reset"}, True),
        ({"mask_sample": False, "failure_kind": "judge_failed", "failure_reason": "no judge"}, False),
        ({"mask_sample": False, "failure_kind": None, "failure_reason": None}, False),
    ],
)
def test_what_the_environment_wants_masked_is(changes, masked):
    assert wire.read_run_response(answer(**changes)).masked is masked


def test_the_parts_of_a_reward_are_kept_by_name():
    played = wire.read_run_response(answer(reward_components={"correct": 1, "format": 0.5, "note": "x"}, steps=2))
    assert (played.reward_components, played.metrics) == ({"correct": 1.0, "format": 0.5}, {"steps": 2.0})
    assert wire.read_run_response(answer(reward_components=None)).reward_components == {}


@pytest.mark.parametrize("part", ["input_image", "image_url"])
def test_an_image_is_refused_where_a_row_is_sent_and_where_its_prompt_is_measured(part):
    items = [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": part, "image_url": "u"}]}]
    said = f"input item 1 has a part of type '{part}'; the policy reads text only"
    with pytest.raises(ConfigError, match=said):
        sent_params({"responses_create_params": {"input": items}})
    with pytest.raises(ConfigError, match=said):
        wire.input_messages(items)


# -- the bytes


def test_ids_stay_text_until_asked_for_and_everything_else_is_decoded():
    body = with_item(text='"generation_token_ids":[1]', routed_experts=[[1, 2]])
    body["responses_create_params"]["input"] = [{"role": "user", "content": "x", "prompt_token_ids": [1]}]
    for content in (json.dumps(body).encode(), json.dumps(body, indent=2).encode(), msgspec.json.encode(body)):
        decoded = wire.decode_run_response(content)
        item = decoded["response"]["output"][0]
        assert isinstance(item["prompt_token_ids"], NumberArray)
        assert item["text"] == '"generation_token_ids":[1]'
        assert wire.read_run_response(decoded) == wire.read_run_response(body)


@pytest.mark.parametrize(
    "ids",
    [[[1], 2], ["a]", 1], ["]", "]"], [{"a": [1]}], [], [None], "text", 7, None, {"": 0}, {"": 99}, [1e400]],
    ids=str,
)
def test_whatever_stands_in_the_place_of_ids_is_read_as_from_the_whole_document(ids):
    body = with_item(prompt_token_ids=ids)
    content = json.dumps(body).replace("Infinity", "1e400").encode()
    decoded = wire.decode_run_response(content)
    found = decoded["response"]["output"][0]["prompt_token_ids"]
    if isinstance(found, NumberArray):
        assert len(found) == len(ids)
    wire.read_run_response(decoded)


def test_an_array_of_text_equals_every_sequence_of_its_numbers_and_no_other():
    array = NumberArray(b"[1, 2.50,3]")
    assert array == [1, 2.5, 3] == list(array) == array[:]
    assert array == (1, 2.5, 3)
    assert array == NumberArray(b"[1,2.50,3]")
    assert [SharedIds([1, 10])] == [NumberArray(b"[1,10]")] == [SharedIds([1, 10])]
    assert (len(array), array[1], bool(array), bool(NumberArray(b"[ ]"))) == (3, 2.5, True, False)
    for other in ([1, 2.5], [1, 2.5, 4], [], "123", b"[1, 2.50,3]", None, 3):
        assert array != other
    assert len([value for value in NumberArray(b"[1,,2]") if math.isnan(value)]) == 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"prompt_token_ids": [1', b"[1]", b"null", b'{"response": {"output": 1}}']
)
def test_bytes_that_are_no_result_end_in_a_value_error(content):
    with pytest.raises(ValueError, match=r"response|truncated|JSON"):
        wire.read_run_response(wire.decode_run_response(content))


# -- the first turn, as Gym's model server would send it


def test_rows_inputs_and_tools_are_translated_as_gym_does():
    assert wire.input_messages("hi") == [{"role": "user", "content": "hi"}]
    items = [
        {"role": "developer", "content": "d", "type": "message"},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "refusal", "refusal": "u"}]},
    ]
    assert wire.input_messages(items) == [
        {"role": "developer", "content": "d"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "t"}, {"type": "refusal", "refusal": "u"}],
        },
    ]
    assert wire.chat_tools(None) is None
    assert wire.chat_tools([]) is None
    for name in ("single_tool_call", "multi_step_native_ids"):
        sample = recorded(name)
        row = sample["request"]["responses_create_params"]
        first = sample["policy_calls"][0]["body"]
        assert wire.chat_tools(row["tools"]) == first["tools"]
        assert wire.input_messages(row["input"]) == [
            {key: message[key] for key in ("role", "content")} for message in first["messages"]
        ]
