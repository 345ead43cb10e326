"""What strangers may send: the endpoint answers everything, never with a 500, never with a hang, and keeps nothing."""

import asyncio
import gc
import json
import random
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lightning_gym.gym import wire
from lightning_gym.policy import retries
from lightning_gym.policy.app import App
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.ledger import Ledger, StrayCalls
from lightning_gym.policy.openapi import openapi_document
from lightning_gym.policy.service import PolicyService
from lightning_gym.policy.splice import Beginnings
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 64
KEY = "secret"
CHAT = "/v1/chat/completions"
POSTS = (CHAT, "/v1/completions", "/tokenize", "/detokenize")
HELLO = [{"role": "user", "content": "Hello"}]
OVERFLOW_WORDS = (b"context length", b"max_tokens")


@dataclass
class Asked:
    """The ASGI application with an engine behind it, called as a server would call it."""

    app: App
    engine: FakeEngine
    ledger: Ledger
    runner: asyncio.Runner

    def ask(self, path, raw, *, method="POST", key=KEY, gone=False):
        """Status and body of one request; ten seconds are a hang."""
        return self.runner.run(asyncio.wait_for(self.request(path, raw, method=method, key=key, gone=gone), 10))

    async def request(self, path, raw, *, method="POST", key=KEY, gone=False):
        sent = []
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(b"authorization", f"Bearer {key}".encode())],
        }
        received = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive():
            if received:
                return received.pop()
            if not gone:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await self.app(scope, receive, send)
        start, body = sent
        assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
        return start["status"], body["body"]


@contextmanager
def asking(policy_dir):
    engine = FakeEngine(max_model_len=WINDOW)
    engine.start(EngineModel(path=policy_dir, dtype="float32", weights=lambda: ()))
    engine.update_weights(lambda: None, version=0)
    engine.resume()
    ledger = Ledger()
    profile = SamplingProfile(max_output_tokens=2)
    service = PolicyService(engine, policy_dir, ledger, {"train": profile, "eval": profile})
    try:
        with asyncio.Runner() as runner:
            yield Asked(App(service, KEY), engine, ledger, runner)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def asked(policy_dir, one_thread):
    with asking(policy_dir) as asked:
        yield asked


def check(status, body):
    """What holds of every reply."""
    assert status < 500, body
    if status != 200:
        error = msgspec.json.decode(body)["error"]
        assert (error["code"], error["type"]) == (status, "invalid_request_error")
        if any(word in body for word in OVERFLOW_WORDS):
            assert status == 400
            assert f"maximum context length is {WINDOW} tokens, and the prompt has" in error["message"]


# -- any body


def js(value):
    """As other JSON writers than ours would have it: NaN, surrogates and integers of any size included."""
    return json.dumps(value).encode()


TEXT = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    ["context length", "max_tokens", "<|im_end|>", "\ud800", "\udfff", "\0", "token_id:1", "[" * 3000, "9" * 5000]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, True, False])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=12)
IDS = st.lists(st.integers(0, 700), max_size=12) | JSON
FUNCTIONS = st.fixed_dictionaries({}, optional={"name": TEXT | JSON, "arguments": TEXT | JSON}) | JSON
CALLS = (
    st.lists(st.fixed_dictionaries({}, optional={"function": FUNCTIONS, "id": JSON, "type": JSON}), max_size=2) | JSON
)
PARTS = st.lists(st.fixed_dictionaries({}, optional={"type": st.just("text") | JSON, "text": TEXT | JSON}), max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON},
        optional={
            "content": TEXT | PARTS | JSON,
            "reasoning_content": TEXT | JSON,
            "tool_calls": CALLS,
            "tool_call_id": JSON,
            "name": JSON,
            wire.PROMPT_TOKEN_IDS: IDS,
            wire.GENERATION_TOKEN_IDS: IDS,
            wire.GENERATION_LOG_PROBS: JSON,
        },
    ),
    max_size=3,
)
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "n", "stream", "stop", "seed", "max_tokens", "max_completion_tokens",
    "logprobs", "top_logprobs", "echo", "logit_bias", "response_format", "tool_choice", "parallel_tool_calls",
    "metadata", "user",
    "model", "reasoning_effort", "frequency_penalty", "return_tokens_as_token_ids", "continue_final_message",
)  # fmt: skip
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES,
        "prompt": TEXT | IDS,
        "tokens": IDS,
        "tools": st.lists(st.fixed_dictionaries({"function": FUNCTIONS}), max_size=2) | JSON,
        "chat_template_kwargs": st.dictionaries(
            TEXT | st.sampled_from(["tokenize", "chat_template", "messages"]), JSON
        ),
        wire.ROLLOUT_ID: JSON,
    },
).flatmap(lambda body: st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2).map(lambda more: body | more))
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=200)


@SLOW
@given(path=st.sampled_from(POSTS), body=BODIES | JSON)
@example(path=CHAT, body={"messages": HELLO, "metadata": {"big": 10**30}})
@example(path=CHAT, body={"messages": HELLO, "user": 2**64})
@example(path=CHAT, body={"messages": HELLO, "tools": [10**30]})
@example(path=CHAT, body={"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "n": 10**30}]}]})
@example(path=CHAT, body={"messages": HELLO, "chat_template_kwargs": {"k": 10**30}})
@example(path="/detokenize", body={"tokens": [2**40]})
@example(path="/v1/completions", body={"prompt": [639, 10**30]})
def test_any_json_is_answered(asked, path, body):
    check(*asked.ask(path, js(body)))


@SLOW
@given(path=st.sampled_from(POSTS), raw=st.binary(max_size=200))
@example(path=CHAT, raw=b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}')
@example(path=CHAT, raw=b'{"messages": [{"role": "user", "content": "\xff"}]}')
@example(path=CHAT, raw=b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
@example(path=CHAT, raw=b'{"temperature": NaN}')
@example(path=CHAT, raw=b'{"temperature": 1e999}')
@example(path=CHAT, raw=b"\xef\xbb\xbf{}")
def test_any_bytes_are_answered(asked, path, raw):
    check(*asked.ask(path, raw))


@pytest.mark.parametrize("depth", [50, 300, 900, 990, 5_000, 200_000])
@pytest.mark.parametrize(
    "where", ["body", "tools", "content", "metadata", "n", "arguments", "rollout", "prompt", "kwargs"]
)
def test_deep_nesting_is_answered(asked, depth, where):
    deep = b"[" * depth + b"]" * depth
    body = {
        "body": b"%s",
        "tools": b'{"messages": [{"role": "user", "content": "a"}], "tools": %s}',
        "content": b'{"messages": [{"role": "user", "content": %s}]}',
        "metadata": b'{"messages": [{"role": "user", "content": "a"}], "metadata": {"a": %s}}',
        "n": b'{"messages": [{"role": "user", "content": "a"}], "n": %s}',
        "arguments": b'{"messages": [{"role": "tool", "tool_calls": [{"function": {"name": "", "arguments": "%s"}}]}]}',
        "rollout": b'{"messages": [{"role": "user", "content": "a"}], "lightning_gym_rollout_id": %s}',
        "prompt": b'{"prompt": %s}',
        "kwargs": b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": %s}}',
    }[where]
    for path in POSTS:
        check(*asked.ask(path, body % deep))


@pytest.mark.parametrize("key", ["", "wrong", KEY + " ", KEY[:-1]])
@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/nowhere"])
def test_without_the_token_not_even_the_body_is_read(asked, key, path):
    async def ask():
        sent = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"authorization", f"Bearer {key}".encode())],
        }

        async def never():
            raise AssertionError("the body was asked for")

        async def send(message):
            sent.append(message)

        await asked.app(scope, never, send)
        return sent[0]

    start = asked.runner.run(ask())
    assert start["status"] == 401
    assert (b"connection", b"close") in start["headers"]


# -- by the endpoint's own description

SCHEMA = schemathesis.openapi.from_dict(openapi_document())


@pytest.fixture(scope="module")
def live(policy_dir, one_thread):
    with asking(policy_dir) as asked:
        endpoint = Endpoint(asked.app.service, api_key=KEY)
        endpoint.start()
        yield endpoint.url.removesuffix("/v1")
        endpoint.close()


@SCHEMA.parametrize()
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
def test_the_endpoint_keeps_to_its_own_description(case, live):
    case.call_and_validate(
        base_url=live,
        headers={"authorization": f"Bearer {KEY}"},
        timeout=10,
        checks=[not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance],
    )


# -- nothing is kept


def strange_requests(rng, number):
    """(path, body, options) of requests of every kind, the answered ones among them."""
    rollout = f"rollout-{number}"
    say = [{"role": "user", "content": rng.choice(["Hello", "count to three", "größe <|im_end|>"])}]
    kinds = [
        (CHAT, js({"messages": say, wire.ROLLOUT_ID: rollout, "logprobs": True}), {}),
        (CHAT, js({"messages": say, wire.ROLLOUT_ID: rollout}), {"gone": True}),
        (CHAT, js({"messages": say, wire.ROLLOUT_ID: "unknown" * 9}), {}),
        (CHAT, js({"messages": say, "metadata": {"a": "b" * 99}}), {}),
        (CHAT, js({"messages": [{"role": "user", "content": "x" * rng.randrange(10_000)}]}), {}),
        (CHAT, js({"messages": say, "temperature": rng.random()}), {}),
        (CHAT, rng.randbytes(rng.randrange(2_000)), {}),
        (CHAT, js({"messages": say}), {"key": "wrong"}),
        ("/v1/completions", js({"prompt": [rng.randrange(800) for _ in range(5)]}), {}),
        ("/tokenize", js({"messages": say, wire.ROLLOUT_ID: rollout}), {}),
        ("/detokenize", js({"tokens": [rng.randrange(800)]}), {}),
        (f"/{rng.random()}", b"", {"method": "PUT"}),
        ("/metrics", b"", {"method": "GET"}),
    ]
    return rng.choice(kinds)


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.full)])
def test_nothing_is_kept_of_many_requests(policy_dir, one_thread, monkeypatch, count):
    monkeypatch.setattr(retries, "GRACE_S", 0.02)
    rng = random.Random(0)
    with asking(policy_dir) as asked:
        asked.ledger.stray = StrayCalls(max_tokens=1_000)  # what is remembered on purpose has bounds of its own
        asked.app.service._splicer._beginnings = Beginnings(max_tokens=1_000)

        async def many(first, last):
            for number in range(first, last):
                path, raw, options = strange_requests(rng, number)
                asked.ledger.open(f"rollout-{number}", profile="train", seed=number)
                check(*await asyncio.wait_for(asked.request(path, raw, **options), 10))
                asked.ledger.close(f"rollout-{number}")
            await asyncio.sleep(0.1)
            assert len(asyncio.all_tasks()) == 1

        asked.runner.run(many(0, 500))
        tracemalloc.start()
        asked.runner.run(many(500, 1_000))
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        asked.runner.run(many(1_000, count))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        stats = asked.app.service.stats
        assert (len(asked.app.answers), stats.waiting, len(asked.ledger), len(asked.engine._waiting)) == (0, 0, 0, 0)
        assert grown < 100_000
