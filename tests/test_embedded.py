import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from lightning_gym.errors import ConfigError, GymStartError
from lightning_gym.gym import policy_client
from lightning_gym.gym.agent_loop import Agent
from lightning_gym.gym.conversion import chat_messages, chat_request, response_items
from lightning_gym.gym.embedded import EmbeddedGym
from lightning_gym.gym.embedded_server import agent_app, aggregate_metrics, listen
from lightning_gym.gym.environments import Counter, Environment, ReverseString, load_environment, tool
from lightning_gym.gym.policy_client import PolicyClient
from lightning_gym.gym.wire import TOKEN_BUNDLE

HERE = Path(__file__).parent
HANG_UP = object()
BUNDLE = dict(zip(TOKEN_BUNDLE, ([1, 2, 3], [4, 5], [-0.1, -0.2]), strict=True))


@dataclass
class Played:
    status: int
    body: Any
    sent: list[Any]
    """Every request that the policy saw: path and body."""


def recorded(name):
    return json.loads((HERE / "gym_samples" / f"{name}.json").read_text())


def environment(name, monkeypatch) -> type[Environment]:
    monkeypatch.syspath_prepend(HERE)
    return load_environment(f"recorded_environments:{name}")


def completion(content=None, *, calls=(), finish_reason="stop", **message):
    tool_calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls} | BUNDLE | message
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}


def counter_row(**fields):
    row = Counter.row(random.Random(0)) | {"initial_count": 3, "expected_count": 6}
    return row | fields


@asynccontextmanager
async def policy(answers):
    """An endpoint that gives `answers` in turn, the last one again and again; yields its URL and what it was sent."""
    sent = []

    async def answer(request):
        sent.append((request.path, json.loads(await request.read()), dict(request.headers)))
        status, content = answers[min(len(sent), len(answers)) - 1]
        if content is HANG_UP:
            request.transport.close()
        body = content if isinstance(content, bytes) else json.dumps(content, default=repr).encode()
        return web.Response(body=body, status=status, content_type="application/json")

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/{path:.*}", answer)
    runners = []
    url = await listen(app, runners)
    try:
        yield f"{url}/v1", sent
    finally:
        await runners[0].cleanup()


@asynccontextmanager
async def agent(environment, answers, **options):
    """The HTTP interface of an agent whose policy gives `answers`; yields its URL and what the policy was sent."""
    runners = []
    async with policy(answers) as (policy_url, sent):
        client = PolicyClient(base_url=policy_url, api_key="secret", model="stub")
        try:
            yield await listen(agent_app(Agent(environment, client, **{"max_steps": 10} | options)), runners), sent
        finally:
            await client.aclose()
            await runners[0].cleanup()


def invalid(reason):
    return json.dumps({"error": f"Invalid tool call arguments: JSONDecodeError('{reason}')"})


def unfit(**problem):
    return json.dumps({"detail": [problem | {"input": None}]}, separators=(",", ":"))


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in another process)
            await asyncio.sleep(0.01)


async def post(url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(url, data=data) as response:
        return response.status, json.loads(await response.read())


def play(environment, answers, row, *, path="/run", **options):
    async def run():
        async with agent(environment, answers, **options) as (url, sent):
            status, body = await post(url + path, row)
            return Played(status, body, [(path, body) for path, body, _ in sent])

    return asyncio.run(run())


def masked(result):
    """`result` without what is new in every rollout."""
    response = result["response"]
    output = [
        item | {"id": item["id"][:3]} if (item["id"] or "").startswith(("msg_", "rs_")) else item
        for item in response["output"]
    ]
    assert response["id"].startswith("resp_")
    assert isinstance(response["created_at"], float)
    return result | {"response": response | {"id": "", "created_at": 0, "output": output}}


SAMPLES = [
    ("single_tool_call", "Weather"),
    ("single_tool_call_native_ids", "Weather"),
    ("multi_step_native_ids", "Synonyms"),
    ("tiny_copy", "TinyCopy"),
    ("v_malformed_tool_args", "Weather"),
    ("v_unknown_tool", "Weather"),
    ("v_wrong_arg_schema", "Weather"),
    ("v_metadata_extra_body", "Weather"),
    ("v_max_output_tokens_16_length", "Weather"),
    ("v_empty_content", "Weather"),
    ("v_input_str", "Weather"),
    ("v_reasoning_only_turns", "Weather"),
]


@pytest.mark.parametrize(("name", "environment_name"), SAMPLES)
def test_given_the_same_answers_the_policy_sees_and_run_returns_what_gym_recorded(name, environment_name, monkeypatch):
    sample = recorded(name)
    answers = [(call["response_status"], call["response"]) for call in sample["policy_calls"]]
    played = play(environment(environment_name, monkeypatch), answers, sample["request"])
    expected = [(call["path"], call["body"]) for call in sample["policy_calls"]]
    if name == "v_reasoning_only_turns":
        # Recorded with Gym's replace_developer_role_with_system.
        for _, body in played.sent:
            assert body["messages"][0]["role"] == "developer"
            body["messages"][0]["role"] = "system"
    assert played.sent == expected
    assert played.status == sample["status"] == 200
    assert masked(played.body) == masked(sample["response"])


@pytest.mark.parametrize(
    ("name", "policy_answer"),
    [
        (
            "f_400_other",
            (400, {"error": {"message": "bad thing in your request", "type": "BadRequestError", "code": 400}}),
        ),
        ("f_404", (404, {"error": {"message": "model not found", "type": "NotFoundError", "code": 404}})),
    ],
)
def test_a_refusal_of_the_policy_comes_out_of_run_as_gym_quotes_it(name, policy_answer, monkeypatch):
    played = play(environment("Weather", monkeypatch), [policy_answer], recorded("single_tool_call")["request"])
    assert (played.status, played.body) == (500, recorded(name)["body"])
    assert len(played.sent) == 1


def test_a_completion_without_token_ids_or_logprobs_fails_as_in_gym(monkeypatch):
    sample = recorded("v_nologprobs")
    answers = [(call["response_status"], call["response"]) for call in sample["policy_calls"]]
    played = play(environment("Weather", monkeypatch), answers, sample["request"])
    assert (played.status, played.body) == (sample["status"], sample["response"])


def test_an_unknown_parameter_is_refused_as_in_gym_before_the_policy_is_asked(monkeypatch):
    sample = recorded("v_bogus_field_422")
    played = play(environment("Weather", monkeypatch), [completion("hi")], sample["request"])
    assert (played.status, played.body, played.sent) == (sample["status"], sample["response"], [])


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "max_tokens must be at least 1",
    ],
)
def test_a_prompt_that_is_too_long_ends_the_rollout_with_an_empty_message_as_in_gym(message, monkeypatch):
    played = play(
        environment("Weather", monkeypatch), [(400, {"message": message})], recorded("single_tool_call")["request"]
    )
    assert played.status == 200
    assert masked(played.body) == masked(recorded("f_400ctx_first")["body"])


def test_a_prompt_that_became_too_long_keeps_the_ids_and_the_usage_of_the_calls_before():
    answers = [completion(calls=[("get_counter_value", "{}")]), (400, b"maximum context length")]
    response = play(Counter, answers, counter_row()).body["response"]
    call, output, message = response["output"]
    assert {key: call[key] for key in TOKEN_BUNDLE} == BUNDLE
    assert output["output"] == '{"count":3}'
    assert message["content"][0]["text"] == ""
    assert not set(TOKEN_BUNDLE) & set(message)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["total_tokens"] == 5


def test_a_500_is_asked_three_times(monkeypatch):
    monkeypatch.setattr(policy_client, "RETRY_DELAY_S", 0.01)
    twice = [(500, b"oh"), (500, b"oh"), completion("hi")]
    assert play(Counter, twice, counter_row()).status == 200
    always = play(Counter, [(500, b"oh")], counter_row())
    assert (always.status, len(always.sent)) == (500, 3)
    assert "VLLMModel___policy_model calling an inner server" in always.body


@pytest.mark.parametrize("status", [429, 502, 503, 504, 520])
def test_a_busy_policy_is_asked_until_it_answers(status, monkeypatch):
    monkeypatch.setattr(policy_client, "RETRY_DELAY_S", 0.01)
    played = play(Counter, [(status, b"")] * 7 + [completion("hi")], counter_row())
    assert (played.status, len(played.sent)) == (200, 8)


def test_a_dropped_connection_is_retried_with_the_same_request(monkeypatch):
    monkeypatch.setattr(policy_client, "RETRY_DELAY_S", 0.01)
    played = play(Counter, [(200, HANG_UP)] * 4 + [completion("hi")], counter_row())
    assert (played.status, len(played.sent)) == (200, 5)
    assert all(request == played.sent[0] for request in played.sent)


@pytest.mark.parametrize(
    "answer", [(200, b"<html>"), (200, {"choices": []}), completion("hi", finish_reason="abort"), (200, b"")]
)
def test_an_answer_that_is_no_completion_fails_the_rollout_at_once(answer):
    played = play(Counter, [answer], counter_row())
    assert (played.status, len(played.sent)) == (500, 1)
    assert played.body.count("Hit an exception in SimpleAgent___example_session_state_mgmt_simple_agent") == 2


def test_the_policy_gets_the_key_and_no_cookies():
    async def run():
        async with agent(Counter, [completion(calls=[("get_counter_value", "{}")]), completion("3")]) as (url, sent):
            await post(f"{url}/run", counter_row())
            return [headers for _, _, headers in sent]

    for headers in asyncio.run(run()):
        assert headers["Authorization"] == "Bearer secret"
        assert headers["Content-Type"] == "application/json"
        assert "Cookie" not in headers


def test_a_counter_is_played_to_its_reward():
    turns = [
        completion(calls=[("increment_counter", '{"count": 1}'), ("increment_counter", '{"count": 2}')]),
        completion(calls=[("get_counter_value", "{}")]),
        completion("6"),
    ]
    result = play(Counter, turns, counter_row()).body
    assert result["reward"] == 1.0
    assert set(result) == {"responses_create_params", "response", "reward"}
    outputs = [item["output"] for item in result["response"]["output"] if item["type"] == "function_call_output"]
    assert outputs == ['{"success":true}', '{"success":true}', '{"count":6}']
    with_ids = [item["type"] for item in result["response"]["output"] if TOKEN_BUNDLE[0] in item]
    assert with_ids == ["function_call", "function_call", "message"]
    assert play(Counter, turns[1:], counter_row()).body["reward"] == 0.0


def test_a_tool_and_a_verifier_that_wait_are_waited_for():
    class Patient(Counter):
        @tool
        async def get_counter_value(self) -> dict[str, int]:
            await asyncio.sleep(0)
            return {"count": self.count}

        async def verify(self, response):
            await asyncio.sleep(0)
            return super().verify(response)

    turns = [
        completion(calls=[("increment_counter", '{"count": 3}'), ("get_counter_value", "{}")]),
        completion("6"),
    ]
    result = play(Patient, turns, counter_row()).body
    assert result["reward"] == 1.0
    outputs = [item["output"] for item in result["response"]["output"] if item["type"] == "function_call_output"]
    assert outputs == ['{"success":true}', '{"count":6}']


def test_a_policy_that_never_stops_calling_tools_is_stopped_after_max_steps():
    played = play(Counter, [completion(calls=[("increment_counter", '{"count": 1}')])], counter_row(), max_steps=3)
    assert (played.status, played.body["reward"], len(played.sent)) == (200, 1.0, 3)
    assert played.body["response"]["output"][-1]["type"] == "function_call_output"
    assert played.body["response"]["incomplete_details"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("{", invalid("Expecting property name enclosed in double quotes: line 1 column 2 (char 1)")),
        ("", invalid("Expecting value: line 1 column 1 (char 0)")),
        ("null", unfit(type="missing", loc=["body"], msg="Field required")),
        ('{"count": NaN}', unfit(type="int_type", loc=["body", "count"], msg="Input should be a valid integer")),
    ],
)
def test_useless_tool_arguments_are_told_to_the_agent(arguments, told):
    played = play(Counter, [completion(calls=[("increment_counter", arguments)]), completion("hi")], counter_row())
    assert played.status == 200
    assert played.sent[1][1]["messages"][-1]["content"] == told


@pytest.mark.parametrize("arguments", ['{"count": 99999999999999999999999}', '{"count": "\\ud800"}'])
def test_tool_arguments_that_gym_cannot_send_on_fail_the_rollout(arguments):
    played = play(Counter, [completion(calls=[("increment_counter", arguments)]), completion("hi")], counter_row())
    assert (played.status, len(played.sent)) == (500, 1)


def test_what_a_tool_raises_is_told_to_the_agent(monkeypatch):
    answers = [completion(calls=[("divide", '{"by": 0}')]), completion("hi")]
    request = counter_row(reward=0.5)
    played = play(environment("Broken", monkeypatch), answers, request)
    assert (played.status, played.body["reward"]) == (200, 0.5)
    assert played.sent[1][1]["messages"][-1]["content"] == "\"ZeroDivisionError('division by zero')\""


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({}, "ValueError('no verdict')"),
        ({"refuse": 1}, "KeyError('no such thing')"),
        ({"reward": "nan"}, "expected a finite reward, got nan"),
    ],
)
def test_an_environment_that_crashes_fails_its_rollout_and_no_other(fields, cause, monkeypatch):
    async def run():
        async with agent(environment("Broken", monkeypatch), [completion("hi")]) as (url, _):
            failed = await post(f"{url}/run", counter_row(**fields))
            return failed, await post(f"{url}/run", counter_row(reward=1))

    (status, body), (other_status, _) = asyncio.run(run())
    assert (status, other_status) == (500, 200)
    assert body.startswith("Hit an exception in SimpleAgent___broken_simple_agent calling an inner server: ")
    assert cause in body.replace("\\", "")


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (counter_row(initial_count="x"), "initial_count"),
        ({k: v for k, v in counter_row().items() if k != "expected_count"}, "expected_count"),
        ({"initial_count": 3, "expected_count": 6}, "responses_create_params"),
        (counter_row(responses_create_params={"input": "hi", "tools": [{"name": "f", "type": "function"}]}), "strict"),
        (b"{", "JSON"),
        (b"[]", "dictionary"),
    ],
)
def test_a_row_that_cannot_be_played_is_a_422_that_costs_no_model_call(row, word):
    played = play(Counter, [completion("hi")], row)
    assert (played.status, played.sent) == (422, [])
    assert word in json.dumps(played.body["detail"])


def test_an_explicit_null_as_metadata_fails_as_in_gym():
    row = counter_row()
    row["responses_create_params"] |= {"metadata": None}
    played = play(Counter, [completion("hi")], row)
    assert (played.status, played.sent) == (500, [])
    assert "'NoneType' object has no attribute 'get'" in played.body.replace("\\", "")


def test_v1_responses_plays_without_a_reward_what_needs_no_row(monkeypatch):
    answers = [completion(calls=[("get_weather", '{"city": "Rome"}')]), completion("cold")]
    played = play(environment("Weather", monkeypatch), answers, {"input": "hi"}, path="/v1/responses")
    assert played.status == 200
    assert [item["type"] for item in played.body["output"]] == ["function_call", "function_call_output", "message"]
    assert "reward" not in played.body
    refused = play(ReverseString, answers, {"input": "hi"}, path="/v1/responses")
    assert (refused.status, refused.body["detail"][0]["type"], refused.sent) == (422, "row_refused", [])


def test_a_rollout_goes_on_when_its_client_is_gone():
    async def run():
        turns = [completion(calls=[("get_counter_value", "{}")])] * 5 + [completion("3")]
        async with agent(Counter, [(503, b""), *turns]) as (url, sent):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(post(f"{url}/run", counter_row()), 0.2)
            assert len(sent) == 1
            await until(lambda: len(sent) == 7)

    asyncio.run(run())


def test_assistant_text_after_a_turn_with_ids_goes_out_with_the_ids_of_that_turn():
    items = [
        {"role": "user", "content": "one"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]} | BUNDLE,
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    first, second = [message for message in chat_messages(items) if message["role"] == "assistant"]
    assert first == {"role": "assistant", "content": "two", "tool_calls": []} | BUNDLE
    assert second == {"role": "assistant", "content": "four", "tool_calls": []} | BUNDLE


def test_an_empty_assistant_turn_is_left_out_of_the_history_and_its_ids_go_to_the_next():
    empty = response_items({"content": "", **BUNDLE})
    items = [{"role": "user", "content": "one"}, *empty, {"role": "user", "content": "two"}]
    assert chat_messages(items) == [{"content": "one", "role": "user"}, {"content": "two", "role": "user"}]
    later = chat_messages([*items, {"role": "assistant", "content": "three"}])[-1]
    assert {key: later[key] for key in TOKEN_BUNDLE} == BUNDLE


def test_message_parts_become_chat_parts_and_assistant_parts_one_text():
    parts = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": "data:x"}]
    said = [{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}]
    user, assistant = chat_messages([{"role": "user", "content": parts}, {"role": "assistant", "content": said}])
    assert user["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}},
    ]
    assert assistant["content"] == "ab"


def test_reasoning_text_and_tool_calls_of_one_answer_go_back_as_one_message():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    items = response_items({"reasoning": "hm", "content": "so", "tool_calls": [call], **BUNDLE})
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert [TOKEN_BUNDLE[0] in item for item in items] == [False, False, True]
    (message,) = chat_messages(items)
    thoughts = {"reasoning": "hm", "reasoning_content": "hm"}
    assert message == {"role": "assistant", "content": "so", "tool_calls": [call]} | thoughts | BUNDLE


def test_the_request_keeps_what_the_row_sets_and_loses_what_gym_loses():
    params = {
        "instructions": "lost", "reasoning": {"effort": "low"}, "truncation": "auto", "model": "mine",
        "temperature": None, "max_output_tokens": 7, "top_logprobs": 5, "tools": [], "tool_choice": "auto",
        "metadata": {"extra_body": '{"temperature": 2, "seed": 1, "logprobs": false}', "x": "y"},
    }  # fmt: skip
    assert chat_request(params, [{"role": "user", "content": "hi"}], model="policy") == {
        "messages": [{"content": "hi", "role": "user"}], "model": "policy", "temperature": None, "max_tokens": 7,
        "tool_choice": "auto", "metadata": params["metadata"], "seed": 1,
        "logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True,
    }  # fmt: skip


def test_metrics_are_aggregated_per_task_and_over_all():
    results = [
        {"_ng_task_index": 1, "_ng_rollout_index": 0, "reward": 1.0, "solved": True, "response": {"usage": {"n": 4}}},
        {"_ng_task_index": 0, "_ng_rollout_index": 0, "reward": 0.0},
        {"_ng_task_index": 1, "_ng_rollout_index": 1, "reward": 0.5},
    ]
    metrics = aggregate_metrics(results)
    assert metrics["key_metrics"] == {"mean/reward": 0.5, "mean/solved": 1.0, "mean/n": 4.0}
    assert metrics["agent_metrics"]["std/reward"] == 0.5
    assert [group["_ng_task_index"] for group in metrics["group_level_metrics"]] == [0, 1]
    assert metrics["group_level_metrics"][1]["max/reward"] == 1.0
    assert aggregate_metrics([])["agent_metrics"] == {}


async def get(url):
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return json.loads(await response.read())


def started(gym, tmp_path, **options):
    options = {"policy_url": "http://127.0.0.1:9/v1", "api_key": "very-secret", "model": "stub"} | options
    return gym.start(run_dir=tmp_path / "run", **options)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_the_server_process_plays_every_environment_and_lists_its_agents_as_gym_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)

    async def run():
        with EmbeddedGym(["counter", "recorded_environments:TinyCopy"]) as gym:
            async with policy([completion("xx ")]) as (policy_url, _):
                head = await asyncio.to_thread(started, gym, tmp_path, policy_url=policy_url)
                instances = await get(f"{head}/server_instances")
                by_name = {instance["process_name"]: instance for instance in instances}
                assert set(by_name) == {"example_session_state_mgmt_simple_agent", "tiny_copy_simple_agent"}
                for instance in instances:
                    assert instance["url"] == f"http://127.0.0.1:{instance['port']}"
                    assert await get(instance["url"]) == {"status": "ok"}
                url = by_name["tiny_copy_simple_agent"]["url"]
                row = {"responses_create_params": {"input": "hi"}, "target_char": "x"}
                status, result = await post(f"{url}/run", row)
                assert (status, result["reward"]) == (200, 2 / 3)
                status, metrics = await post(f"{url}/aggregate_metrics", {"verify_responses": [result]})
                assert metrics["key_metrics"]["mean/n_chars"] == 27
                config = yaml.safe_load(await get(f"{head}/global_config_dict_yaml"))
                agent = config["tiny_copy_simple_agent"]["responses_api_agents"]["simple_agent"]
                assert f"http://{agent['host']}:{agent['port']}" == url
                return instances

    instances = asyncio.run(run())
    fields = {"config_path", "dir_path", "entrypoint", "host", "name", "pid", "port", "process_name", "server_type"}
    assert all(set(i) == fields | {"start_time", "status", "uptime_seconds", "url"} for i in instances)
    assert all(gone(instance["pid"]) for instance in instances)


def test_classes_are_passed_by_import_path_and_the_parents_search_path_reaches_the_server(tmp_path, monkeypatch):
    weather = environment("Weather", monkeypatch)
    with EmbeddedGym([weather]) as gym:
        head = started(gym, tmp_path)
        (instance,) = asyncio.run(get(f"{head}/server_instances"))
        assert instance["process_name"] == "example_single_tool_call_simple_agent"


def test_the_key_of_the_policy_is_neither_on_a_command_line_nor_in_a_file(tmp_path):
    with EmbeddedGym() as gym:
        head = started(gym, tmp_path)
        (instance,) = asyncio.run(get(f"{head}/server_instances"))
        supervisor = int(Path(f"/proc/{instance['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        assert asyncio.run(get(f"{head}/")) == {"status": "ok"}
        for pid in (instance["pid"], supervisor):
            assert "very-secret" not in Path(f"/proc/{pid}/cmdline").read_text()
        assert "very-secret" not in asyncio.run(get(f"{head}/global_config_dict_yaml"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["embedded_gym.log"]
    assert "very-secret" not in (tmp_path / "run" / "embedded_gym.log").read_text()


def test_close_ends_the_server_in_the_middle_of_a_rollout(tmp_path):
    async def run():
        async with policy([(503, b"")]) as (policy_url, sent):
            with EmbeddedGym() as gym:
                head = await asyncio.to_thread(started, gym, tmp_path, policy_url=policy_url)
                (instance,) = await get(f"{head}/server_instances")
                rollout = asyncio.create_task(post(f"{instance['url']}/run", counter_row()))
                await until(lambda: sent)
                start = time.monotonic()
                await asyncio.to_thread(gym.close)
                assert time.monotonic() - start < 2.0
                gym.close()
                with pytest.raises(aiohttp.ClientError):
                    await rollout
                assert gym.poll() == 0
                assert gone(instance["pid"])

    asyncio.run(run())


def test_a_server_that_does_not_come_up_is_reported_with_its_log(tmp_path, monkeypatch):
    (tmp_path / "moody_environments.py").write_text(
        "import os\nfrom lightning_gym.gym.environments import Counter as Moody\n"
        "if 'LIGHTNING_GYM_MOODY' in os.environ:\n    raise ImportError('not today')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    gym = EmbeddedGym(["moody_environments:Moody"])
    monkeypatch.setenv("LIGHTNING_GYM_MOODY", "1")
    with pytest.raises(GymStartError, match=r"(?s)ended with code 1; the end of .*embedded_gym\.log.*not today"):
        started(gym, tmp_path)
    assert gym.poll() == 1


def test_a_server_that_is_too_slow_is_stopped_and_reported(tmp_path):
    gym = EmbeddedGym(start_timeout_s=0.01)
    with pytest.raises(GymStartError, match=r"is not ready after 0\.01 s"):
        started(gym, tmp_path)
    assert gym.poll() is not None


def test_a_second_start_is_refused_until_the_first_is_closed(tmp_path):
    with EmbeddedGym() as gym:
        started(gym, tmp_path)
        with pytest.raises(GymStartError, match="started already"):
            started(gym, tmp_path)
        gym.close()
        started(gym, tmp_path)
        assert gym.poll() is None


def test_settings_that_cannot_work_are_refused_before_a_process_is_started(tmp_path, monkeypatch):
    local = type("Local", (Counter,), {"__module__": "__main__", "name": "local"})
    unfinished = "recorded_environments:Unfinished"
    monkeypatch.syspath_prepend(HERE)
    for environments, word in [
        ([local], "module of its own"),
        ([], "at least one"),
        ("counter", "list"),
        (["counter", Counter], "once"),
        ([unfinished], "verify"),
    ]:
        with pytest.raises(ConfigError, match=word):
            EmbeddedGym(environments)
    with pytest.raises(ConfigError, match="max_steps"):
        EmbeddedGym(max_steps=0)
    with pytest.raises(ConfigError, match="/v1"):
        started(EmbeddedGym(), tmp_path, policy_url="http://127.0.0.1:9")
    assert not (tmp_path / "run").exists()


def test_the_server_process_imports_nothing_heavy():
    code = (
        "import sys, lightning_gym.gym.embedded, lightning_gym.gym.embedded_server\n"
        "heavy = {'torch', 'vllm', 'transformers', 'lightning', 'numpy', 'starlette'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_server_is_gone_5_s_after_the_trainer_was_killed(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lightning_gym.gym.embedded import EmbeddedGym\n"
        "gym = EmbeddedGym()\n"
        "head = gym.start(policy_url='http://127.0.0.1:9/v1', api_key='k', model='m', run_dir=Path(sys.argv[1]))\n"
        "print(head, flush=True)\ntime.sleep(60)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        head = trainer.stdout.readline().strip()
        (instance,) = asyncio.run(get(f"{head}/server_instances"))
        # A rollout that would poll the absent policy for ever.
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(post(f"{instance['url']}/run", counter_row()), 0.3))
        assert not gone(instance["pid"])
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.communicate()
    deadline = time.monotonic() + 5.0
    while not gone(instance["pid"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(instance["pid"])
