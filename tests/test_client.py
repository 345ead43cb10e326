"""GymClient against a small real server: each way a request can end has its own kind, and its innermost words."""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from lightning_gym.errors import GymError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient, innermost
from lightning_gym.rollout import Failure, FailureKind, Rollout, SamplingProfile
from lightning_gym.testing import FakeGym

SAMPLES = Path(__file__).parent / "gym_samples"
ROW = {"responses_create_params": {"input": "x"}}
BUNDLE = {"prompt_token_ids": [1, 2], "generation_token_ids": [3], "generation_log_probs": [-0.5]}
ANSWER = {
    "responses_create_params": {"input": "x"},
    "response": {"output": [{"type": "message", "content": []} | BUNDLE]},
    "reward": 0.25,
}


def recorded(name):
    return json.loads((SAMPLES / f"{name}.json").read_text())


@asynccontextmanager
async def serving(handler, *, instances=None):
    """The address of a server that is head and agent in one."""

    async def head(_request):
        return web.json_response(instances(url) if callable(instances) else instances)

    app = web.Application()
    app.router.add_get("/server_instances", head)
    app.router.add_post("/run", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield url
    finally:
        await runner.cleanup()


def one_agent(url):
    others = [{"process_name": "verifier", "url": "http://x", "server_type": "resources_servers"}]
    return [{"process_name": "agent", "url": url, "server_type": "responses_api_agents"}, *others]


def played(handler, *, times=1, row=ROW, **options):
    """What `times` runs against `handler` came to."""

    async def play():
        async with serving(handler, instances=one_agent) as url:
            client = GymClient(url, **options)
            await client.connect()
            runs = [client.run("agent", row, f"r{i}", SamplingProfile(), i) for i in range(times)]
            try:
                return await asyncio.gather(*runs)
            finally:
                await client.close()

    return asyncio.run(play())


def answering(status, text, content_type="application/json"):
    async def handler(_request):
        return web.Response(status=status, text=text, content_type=content_type)

    return handler


def failure_of(handler, **options):
    ((failure, seconds),) = played(handler, **options)
    assert isinstance(failure, Failure), failure
    assert seconds >= 0
    return failure


# -- a rollout that was played


def test_a_rollout_is_sent_as_run_request_says_and_read_as_read_run_response_says():
    seen = []

    async def handler(request):
        seen.append(await request.json())
        return web.json_response(ANSWER)

    ((result, seconds),) = played(handler)
    assert seen == [wire.run_request(ROW, "r0", SamplingProfile(), 0)]
    assert result == wire.read_run_response(ANSWER)
    assert result.reward == 0.25
    assert 0 < seconds < 10


def test_each_answer_belongs_to_the_request_it_answers():
    async def handler(request):
        metadata = (await request.json())["responses_create_params"]["metadata"]
        number = int(json.loads(metadata["extra_body"])[wire.ROLLOUT_ID].removeprefix("r"))
        await asyncio.sleep(0.002 * (16 - number))  # the first is answered last
        return web.json_response(ANSWER | {"reward": number})

    assert [result.reward for result, _ in played(handler, times=16)] == list(range(16))


def test_no_more_requests_are_in_flight_than_allowed_and_waiting_is_not_counted():
    flying, most = 0, 0

    async def handler(_request):
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.3)
        flying -= 1
        return web.json_response(ANSWER)

    results = played(handler, times=9, max_concurrency=3)
    assert most == 3
    assert all(seconds < 0.6 for _, seconds in results), "the last three waited 0.6 s for their turn"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_cookie_is_sent_back(host):
    """By either of the two jars: aiohttp's own takes none from an address, but does from a name."""
    seen = []

    async def handler(request):
        seen.append(request.headers.get("cookie"))
        response = web.json_response(ANSWER)
        response.set_cookie("session", "shared")
        return response

    async def play():
        async with serving(handler, instances=one_agent) as url:
            client = GymClient(url)
            await client.connect()
            client.agents = {"agent": url.replace("127.0.0.1", host)}
            for number in range(3):
                await client.run("agent", ROW, f"r{number}", SamplingProfile(), 0)
            await client.close()

    asyncio.run(play())
    assert seen == [None, None, None]


# -- a rollout that was not


def test_a_row_that_gym_refuses_is_the_environments_failure_with_its_words():
    detail = recorded("v_bogus_field_422")["response"]
    failure = failure_of(answering(422, json.dumps(detail)))
    assert failure.kind is FailureKind.ENVIRONMENT
    assert failure.message.startswith("HTTP 422: ")
    assert "Extra inputs are not permitted" in failure.message


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("f_400_other", "body", '{"error": {"message": "bad thing in your request"'),
        ("f_404", "body", '{"error": {"message": "model not found"'),
        ("f_garbage_200", "body", "JSONDecodeError('unexpected character"),
        ("v_nologprobs", "response", "RuntimeError('`policy_model` requested per-token logprobs"),
    ],
)
def test_a_recorded_500_is_told_in_its_innermost_words(name, key, said):
    failure = failure_of(answering(500, json.dumps(recorded(name)[key])))
    assert failure.kind is FailureKind.ENVIRONMENT
    assert failure.message.startswith(f"HTTP 500: {said}")


def nested(inner):
    """A body as it arrives after three of Gym's servers passed it on."""
    body = inner.encode()
    for name in ("VLLMModel___policy_model", "SimpleAgent___a", "SimpleAgent___a"):
        body = json.dumps(f"Hit an exception in {name} calling an inner server: {body}").encode()
    return body.decode()


def test_our_own_endpoints_refusal_is_the_policys_failure():
    ours = json.dumps({"error": {"message": "rollout r is over", "type": "invalid_request_error", "code": 410}})
    failure = failure_of(answering(500, nested(ours)))
    assert failure.kind is FailureKind.POLICY
    assert failure.message == f"HTTP 500: {ours}"


@pytest.mark.parametrize(
    "words",
    [
        "openai.BadRequestError: {'error': {'message': 'no', 'type': 'invalid_request_error', 'code': 400}}",
        json.dumps({"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}),
        json.dumps({"error": {"message": "no", "type": "invalid_request_error", "code": "bad_image"}}),
        json.dumps({"error": {"message": "no", "type": "BadRequestError", "code": 400}}),
        json.dumps({"error": "invalid_request_error"}),
        json.dumps(["error", "invalid_request_error"]),
    ],
    ids=["quoted", "of OpenAI", "code in words", "of vLLM", "words", "list"],
)
def test_an_error_that_only_resembles_our_endpoints_is_the_environments(words):
    failure = failure_of(answering(500, nested(words)))
    assert failure.kind is FailureKind.ENVIRONMENT
    assert failure.message == f"HTTP 500: {words}"


def test_a_refusal_of_ours_is_the_policys_however_long_its_words_are():
    ours = json.dumps({"error": {"message": "x" * 1000, "type": "invalid_request_error", "code": 400}})
    failure = failure_of(answering(500, nested(ours)))
    assert failure.kind is FailureKind.POLICY
    assert failure.message == f"HTTP 500: {ours[:400]}..."


@pytest.mark.parametrize(
    ("reported", "kind"),
    [
        ("transient", FailureKind.INFRA),
        ("kill_shaped", FailureKind.INFRA),
        ("timeout_exceeded", FailureKind.TIMEOUT),
        ("skipped", FailureKind.ENVIRONMENT),
        ("legitimate", FailureKind.ENVIRONMENT),
        ("judge_failed", FailureKind.ENVIRONMENT),
    ],
)
def test_a_failure_that_gym_reports_with_status_200_is_a_failure_of_its_class_and_no_reward(reported, kind):
    body = ANSWER | {"reward": 0.0, "_ng_failure_class": reported, "error_message": "the judge is gone"}
    failure = failure_of(answering(200, json.dumps(body)))
    assert (failure.kind, failure.message) == (kind, f"Gym reports `{reported}`: the judge is gone")
    without_reward = {"_ng_failure_class": reported}
    assert failure_of(answering(200, json.dumps(without_reward))).message.endswith("no reason given")
    final = body | {"_ng_failure_terminal": True}
    assert failure_of(answering(200, json.dumps(final))).kind is not FailureKind.INFRA


def test_a_row_with_an_image_is_refused_before_it_is_sent():
    seen = []

    async def handler(request):
        seen.append(request)
        return web.json_response(ANSWER)

    image = {"type": "input_image", "image_url": "data:image/png;base64,"}
    row = {"responses_create_params": {"input": [{"role": "user", "content": [image]}]}}
    failure = failure_of(handler, row=row)
    assert failure.kind is FailureKind.ENVIRONMENT
    assert "input item 0 has a part of type 'input_image'; the policy reads text only" in failure.message
    assert seen == []


def test_what_is_in_flight_is_known_while_it_is():
    seen = []

    async def handler(_request):
        seen.append(list(clients[0].in_flight))
        return web.json_response(ANSWER)

    clients = []

    async def play():
        async with serving(handler, instances=one_agent) as url:
            clients.append(GymClient(url))
            await clients[0].connect()
            await clients[0].run("agent", ROW, "r9", SamplingProfile(), 0)
            await clients[0].close()

    asyncio.run(play())
    assert seen == [["r9"]]
    assert clients[0].in_flight == {}


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_gateways_error_is_infra(status):
    failure = failure_of(answering(status, "come back later", "text/plain"))
    assert (failure.kind, failure.message) == (FailureKind.INFRA, f"HTTP {status}: come back later")


def test_a_refused_connection_is_infra_and_names_the_agent():
    async def play():
        async with serving(answering(200, ""), instances=one_agent) as url:
            client = GymClient(url)
            await client.connect()
        try:
            return await client.run("agent", ROW, "r", SamplingProfile(), 0)
        finally:
            await client.close()

    failure, _ = asyncio.run(play())
    assert failure.kind is FailureKind.INFRA
    assert failure.message.startswith("agent: ")


def test_a_connection_lost_in_the_middle_is_infra():
    async def handler(request):
        request.transport.abort()
        return web.Response()

    assert failure_of(handler).kind is FailureKind.INFRA


def test_an_answer_cut_in_half_is_infra():
    async def handler(request):
        response = web.StreamResponse(headers={"content-length": "1000"})
        await response.prepare(request)
        await response.write(b'{"reward": 1')
        request.transport.close()
        return response

    assert failure_of(handler).kind is FailureKind.INFRA


def test_a_rollout_without_an_end_is_a_timeout():
    async def handler(_request):
        await asyncio.sleep(30)
        return web.json_response(ANSWER)

    failure = failure_of(handler, rollout_timeout_s=0.3)
    assert (failure.kind, failure.message) == (FailureKind.TIMEOUT, "no answer from agent within 0.3 s")


def test_a_timed_out_rollout_frees_its_slot():
    async def handler(request):
        if "r0" in (await request.json())["responses_create_params"]["metadata"]["extra_body"]:
            await asyncio.sleep(30)
        return web.json_response(ANSWER)

    first, second = played(handler, times=2, rollout_timeout_s=0.3, max_concurrency=1)
    assert first[0].kind is FailureKind.TIMEOUT
    assert second[0].reward == 0.25


@pytest.mark.parametrize(
    "text",
    [
        "<html>",
        "",
        "{}",
        "[]",
        "null",
        '{"reward": NaN}',
        json.dumps(ANSWER | {"reward": None}),
        json.dumps(ANSWER | {"response": {"output": [7]}}),
        json.dumps(ANSWER | {"responses_create_params": None, "reward": "1"}),
    ],
)
def test_a_200_that_is_no_rollout_is_the_environments_failure(text):
    failure = failure_of(answering(200, text))
    assert failure.kind is FailureKind.ENVIRONMENT
    assert failure.message


# -- the head server


def test_connect_learns_the_agents_and_nothing_else():
    async def play():
        async with serving(answering(200, ""), instances=one_agent) as url:
            client = GymClient(url + "/")
            await client.connect()
            await client.close()
            return client.agents, url

    agents, url = asyncio.run(play())
    assert agents == {"agent": url}


@pytest.mark.parametrize("instances", ["text", [7], [{"server_type": "responses_api_agents"}], None, {"a": 1}])
def test_a_server_that_is_no_head_server_is_named(instances):
    async def play():
        async with serving(answering(200, ""), instances=instances) as url:
            client = GymClient(url)
            try:
                await client.connect()
            finally:
                await client.close()

    with pytest.raises(GymError, match=r"/server_instances does not answer as a Gym head server does"):
        asyncio.run(play())


def test_a_head_server_that_is_not_there_is_named():
    async def play():
        client = GymClient("http://127.0.0.1:9")
        try:
            await client.connect()
        finally:
            await client.close()

    with pytest.raises(GymError, match=r"127\.0\.0\.1:9/server_instances"):
        asyncio.run(play())


# -- what an environment makes of several rollouts


def aggregated(rollouts):
    """What a Gym of this process answers."""
    gym = FakeGym(["counter"])
    head_url = gym.start(policy_url="http://unused/v1", api_key="k", model="m", run_dir=Path())

    async def ask():
        client = GymClient(head_url)
        await client.connect()
        (agent,) = client.agents
        try:
            return await client.aggregate(agent, rollouts)
        finally:
            await client.close()

    try:
        return asyncio.run(ask())
    finally:
        gym.close()


def test_an_agents_metrics_over_several_rollouts_are_gyms_own():
    rollouts = [
        Rollout(rollout_id="r", task_index=7, group_id=0, attempt=i, agent="a", reward=reward, metrics={"steps": i})
        for i, reward in enumerate([1.0, 0.0, 0.5, None])
    ]
    found = aggregated(rollouts)
    assert found["mean/reward"] == 0.5
    assert found["mean/steps"] == 1.0


def test_an_agent_that_aggregates_nothing_is_named():
    async def play():
        async with serving(answering(200, ""), instances=one_agent) as url:
            client = GymClient(url)
            await client.connect()
            try:
                await client.aggregate("agent", [])
            finally:
                await client.close()

    with pytest.raises(GymError, match=r"/aggregate_metrics gives no metrics: .*404"):
        asyncio.run(play())


# -- the innermost words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain", "plain"),
        ('"a JSON text"', "a JSON text"),
        ('{"detail": 1}', '{"detail": 1}'),
        (nested("größe 'quoted' \"twice\" \\ \n"), "größe 'quoted' \"twice\" \\ \n"),
        (nested(""), ""),
        ("calling an inner server: b'cut off", "calling an inner server: b'cut off"),
        ("calling an inner server: no literal", "calling an inner server: no literal"),
        ("calling an inner server: 7", "calling an inner server: 7"),
    ],
)
def test_the_innermost_words_are_found_at_any_depth_and_in_any_shape(text, said):
    assert innermost(text) == said


def test_long_words_are_cut():
    assert innermost("x" * 1000, limit=10) == "x" * 10 + "..."
