"""The endpoint over real HTTP, with the fake engine behind it: what is answered, held, refused, and in which words."""

import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lightning_gym.errors import ConfigError, EngineError
from lightning_gym.gym import wire
from lightning_gym.policy import replies, retries
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.service import PolicyService, call_seed
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine

pytestmark = pytest.mark.usefixtures("one_thread")
HELLO = [{"role": "user", "content": "Hello"}]
WINDOW = 64
OVERFLOW_WORDS = ("context length", "max_tokens")
PROFILES = {
    "train": SamplingProfile(temperature=0.5, top_p=1.0, max_output_tokens=8),
    "eval": SamplingProfile(temperature=0.0, max_output_tokens=4),
}


@dataclass
class Served:
    engine: Any
    endpoint: Endpoint
    ledger: Ledger
    http: httpx.Client

    def chat(self, messages=HELLO, **body):
        return self.http.post("/chat/completions", json={"model": "policy", "messages": messages} | body)

    def open(self, rollout_id="r", *, profile="train", seed=5):
        return self.ledger.open(rollout_id, profile=profile, seed=seed)


@contextmanager
def serving(policy_dir):
    """Yields a function that makes an endpoint with an engine behind it; closes all of them."""
    running = []

    def make(*, engine=None, paused=False, policy_dir=policy_dir):
        engine = engine or FakeEngine(max_model_len=WINDOW, script=script, logprob=lambda p, t: -(p * 512 + t) / 1024)
        engine.start(EngineModel(path=policy_dir, dtype="float32", weights=lambda: ()))
        engine.update_weights(lambda: None, version=3)
        if not paused:
            engine.resume()
        ledger = Ledger()
        endpoint = Endpoint(PolicyService(engine, policy_dir, ledger, PROFILES))
        endpoint.start()
        headers = {"authorization": f"Bearer {endpoint.api_key}"}
        http = httpx.Client(base_url=endpoint.url, headers=headers, timeout=30)
        running.append((http, engine, endpoint))
        return Served(engine, endpoint, ledger, http)

    try:
        yield make
    finally:
        for http, engine, endpoint in running:
            engine.close()
            endpoint.close()
            http.close()


@pytest.fixture
def serve(policy_dir):
    with serving(policy_dir) as make:
        yield make


@pytest.fixture
def served(serve):
    return serve()


@pytest.fixture(scope="module")
def shared(policy_dir, one_thread):
    """One for the tests that it refuses."""
    with serving(policy_dir) as make:
        yield make()


def script(prompt_ids, seed):
    return [40, 41, 2] if seed % 2 else [40, 41, 42, 43, 44, 45, 46, 47]


# -- what is answered


def test_a_completion_carries_the_ids_the_engine_was_fed_and_the_ids_it_sampled(served, policy_dir):
    chat = ChatFormat(policy_dir)
    served.open(seed=odd_seed())
    body = served.chat(**{wire.ROLLOUT_ID: "r"}).json()
    (choice,) = body["choices"]
    prompt = chat.encode(chat.render(HELLO))
    assert choice["message"] == {
        "role": "assistant",
        "content": chat.decode([40, 41]),
        wire.PROMPT_TOKEN_IDS: prompt,
        wire.GENERATION_TOKEN_IDS: [40, 41, 2],
        wire.GENERATION_LOG_PROBS: [-((len(prompt) + i) * 512 + t) / 1024 for i, t in enumerate([40, 41, 2])],
    }
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 3, "total_tokens": len(prompt) + 3}
    assert (body["object"], body["model"], body["weight_version"]) == ("chat.completion", "policy", 3)


def odd_seed():
    """A rollout's seed whose first call's seed is odd, for which `script` ends its turn."""
    return next(seed for seed in range(9) if call_seed(seed, 0) % 2)


def test_every_call_of_a_rollout_is_in_the_ledger_as_it_was_answered(served):
    entry = served.open()
    first = served.chat(**{wire.ROLLOUT_ID: "r"}).json()["choices"][0]
    again = [*HELLO, first["message"], {"role": "user", "content": "more"}]
    second = served.chat(again, **{wire.ROLLOUT_ID: "r"}).json()["choices"][0]
    for index, (answered, page) in enumerate(zip((first, second), entry.served, strict=True)):
        message = answered["message"]
        assert (page.call.index, page.call.weight_version) == (index, 3)
        assert page.call.prompt_ids == message[wire.PROMPT_TOKEN_IDS]
        assert page.call.token_ids == message[wire.GENERATION_TOKEN_IDS]
        assert page.call.logprobs == message[wire.GENERATION_LOG_PROBS]
        assert page.call.finish_reason == answered["finish_reason"]
    emitted = [*entry.served[0].call.prompt_ids, *entry.served[0].call.token_ids]
    assert entry.served[1].call.prompt_ids[: len(emitted)] == emitted
    assert entry.breaks == []


def test_a_broken_history_is_answered_counted_and_written_down(served):
    entry = served.open()
    served.chat(**{wire.ROLLOUT_ID: "r"})
    served.chat([{"role": "user", "content": "Something else"}], **{wire.ROLLOUT_ID: "r"})
    assert [(b.kind, b.call_index) for b in entry.breaks] == [("edited_history", 1)]
    assert served.endpoint.service.stats.splice_breaks == {"edited_history": 1}


def test_counts_tell_what_was_encoded_and_what_was_known(served):
    served.open()
    first = served.chat(**{wire.ROLLOUT_ID: "r"}).json()["choices"][0]["message"]
    messages = [*HELLO, first, {"role": "user", "content": "more"}]
    second = served.chat(messages, **{wire.ROLLOUT_ID: "r"}).json()["choices"][0]["message"]
    lengths = [len(m[wire.PROMPT_TOKEN_IDS]) for m in (first, second)]
    known = lengths[0] + len(first[wire.GENERATION_TOKEN_IDS])
    stats = served.endpoint.service.stats
    assert stats.requests == 2
    assert stats.prompt_tokens == sum(lengths)
    assert stats.encoded_tokens == sum(lengths) - known
    assert stats.generated_tokens == sum(len(m[wire.GENERATION_TOKEN_IDS]) for m in (first, second))


def test_a_tool_call_is_said_in_openais_words(serve, policy_dir):
    words = ChatFormat(policy_dir).encode('<tool_call>{"name": "add", "arguments": {"n": 1}}</tool_call><|im_end|>')
    served = serve(engine=FakeEngine(max_model_len=256, script=lambda p, s: words))
    served.endpoint.service._profiles = {"train": SamplingProfile(), "eval": SamplingProfile()}
    choice = served.chat().json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"n": 1}'})
    assert call["id"]
    assert choice["message"]["content"] is None
    other = served.chat().json()["choices"][0]["message"]["tool_calls"][0]
    assert other["id"] != call["id"]


def test_the_smallest_of_request_profile_and_room_limits_the_turn(served):
    def sampled(**body):
        choice = served.chat(seed=2, **body).json()["choices"][0]
        return len(choice["message"][wire.GENERATION_TOKEN_IDS]), choice["finish_reason"]

    assert sampled() == (8, "length")
    assert sampled(max_tokens=5) == (5, "length")
    assert sampled(max_completion_tokens=3) == (3, "length")
    assert sampled(max_tokens=100) == (8, "length")
    prompt = len(served.chat().json()["choices"][0]["message"][wire.PROMPT_TOKEN_IDS])
    filler = {"role": "user", "content": "x" * (WINDOW - prompt - 3)}
    room = WINDOW - len(served.http.post("../tokenize", json={"messages": [filler]}).json()["tokens"])
    assert 1 <= room < 8
    choice = served.chat([filler], seed=2).json()["choices"][0]
    assert (len(choice["message"][wire.GENERATION_TOKEN_IDS]), choice["finish_reason"]) == (room, "length")


class Watched(FakeEngine):
    """Writes down how it was asked to sample."""

    def __init__(self, **options):
        super().__init__(max_model_len=WINDOW, script=script, **options)
        self.asked = []

    def generate(self, request_id, prompt_ids, sampling, deliver):
        self.asked.append(sampling)
        super().generate(request_id, prompt_ids, sampling, deliver)


def test_the_profile_is_the_rollouts_and_the_seed_a_function_of_rollout_and_call(serve):
    engine = Watched()
    served = serve(engine=engine)
    served.open("t", profile="train", seed=11)
    served.open("e", profile="eval", seed=11)
    for rollout_id in ("t", "e", "t"):
        served.chat(**{wire.ROLLOUT_ID: rollout_id, "seed": 999})
    train, evaluation, again = engine.asked
    assert (train.temperature, train.max_tokens) == (0.5, 8)
    assert (evaluation.temperature, evaluation.max_tokens) == (0.0, 4)
    assert [s.seed for s in engine.asked] == [call_seed(11, 0), call_seed(11, 0), call_seed(11, 1)]
    assert train.seed != again.seed
    assert train.stop_token_ids == (2,)
    assert (train.top_p, train.top_k) == (1.0, -1)


def test_without_a_rollout_the_models_name_picks_the_profile_and_the_seed_is_the_clients(serve):
    engine = Watched()
    served = serve(engine=engine)
    served.chat(model="policy", seed=7)
    served.chat(model="policy-eval", seed=0)
    assert [s.temperature for s in engine.asked] == [0.5, 0.0]
    assert engine.asked[0].seed == 7
    assert len(served.ledger) == 0


def test_models_and_health_say_who_is_there(served):
    models = served.http.get("/models").json()["data"]
    assert [(m["id"], m["max_model_len"]) for m in models] == [("policy", WINDOW), ("policy-eval", WINDOW)]
    health = httpx.get(served.endpoint.url.removesuffix("/v1") + "/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "weight_version": 3})


def test_tokenize_gives_the_ids_that_a_completion_would_be_fed(served):
    served.open()
    first = served.chat(**{wire.ROLLOUT_ID: "r"}).json()["choices"][0]["message"]
    messages = [*HELLO, first, {"role": "user", "content": "more"}]
    tokens = served.http.post("../tokenize", json={"messages": messages, wire.ROLLOUT_ID: "r"}).json()
    second = served.chat(messages, **{wire.ROLLOUT_ID: "r"}).json()["choices"][0]["message"]
    assert tokens == {
        "tokens": second[wire.PROMPT_TOKEN_IDS],
        "count": len(second[wire.PROMPT_TOKEN_IDS]),
        "max_model_len": WINDOW,
    }


def test_tokenize_takes_a_text_too(served, policy_dir):
    tokens = served.http.post("../tokenize", json={"prompt": "größe<|im_end|>"}).json()["tokens"]
    assert tokens == ChatFormat(policy_dir).encode("größe<|im_end|>")


# -- what is refused


def error_of(response):
    error = response.json()["error"]
    assert error["code"] == response.status_code
    assert error["type"] == "invalid_request_error"
    return error["message"]


@pytest.mark.parametrize("token", [None, "", "Bearer", "Bearer wrong", "wrong"])
def test_a_request_without_the_token_is_a_401_and_reaches_nothing(shared, token):
    before = shared.endpoint.service.stats.requests
    for method, path in (("POST", "/chat/completions"), ("GET", "/models"), ("POST", "../tokenize")):
        request = shared.http.build_request(method, path, json={"messages": HELLO})
        del request.headers["authorization"]
        if token is not None:
            request.headers.update([(b"authorization", token.encode())])
        response = shared.http.send(request)
        assert response.status_code == 401
        assert "bearer token" in error_of(response)
    assert shared.endpoint.service.stats.requests == before
    assert shared.endpoint.api_key not in response.text


def test_each_endpoint_makes_a_token_of_its_own(serve):
    assert serve().endpoint.api_key != serve().endpoint.api_key


@pytest.mark.parametrize("path", ["/chat/completions", "../tokenize"])
def test_an_unknown_or_closed_rollout_is_gone(served, path):
    served.open("closed")
    served.ledger.close("closed")
    for rollout_id in ("unknown", "closed", "", 7, ["a"]):
        response = served.http.post(path, json={"messages": HELLO, wire.ROLLOUT_ID: rollout_id})
        assert response.status_code == 410
        assert f"rollout {rollout_id} is over" in error_of(response)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"temperature": 1.0}, "0.5"),
        ({"temperature": 0}, "0.5"),
        ({"top_p": 0.9}, "1.0"),
        ({"top_k": 40}, "-1"),
        ({"max_tokens": 0}, "positive"),
        ({"max_tokens": "8"}, "positive"),
        ({"max_completion_tokens": -1}, "positive"),
        ({"max_tokens": True}, "positive"),
        ({"max_tokens": 1.5}, "positive"),
        ({"temperature": True}, "0.5"),
        ({"temperature": -1}, "0.5"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"seed": "seven"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 1 << 63}, "seed"),
    ],
)
def test_sampling_that_contradicts_the_profile_is_a_422_that_names_it(shared, asked, word):
    response = shared.chat(**asked)
    assert response.status_code == 422
    assert word in error_of(response)


def test_sampling_that_agrees_with_the_profile_is_served(served):
    agrees = {"temperature": 0.5, "top_p": 1, "top_k": -1, "max_tokens": None, "seed": None, "n": 1, "stream": False}
    assert served.chat(**agrees).status_code == 200


CALL = {"id": "1", "type": "function"}
MALFORMED = {
    "no messages": {},
    "messages null": {"messages": None},
    "messages empty": {"messages": []},
    "messages text": {"messages": "Hello"},
    "a message of text": {"messages": ["Hello"]},
    "a message without role": {"messages": [{"content": "Hello"}]},
    "stream": {"messages": HELLO, "stream": True},
    "two answers": {"messages": HELLO, "n": 2},
    "content a number": {"messages": [{"role": "assistant", "content": 7}]},
    "a part without text": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "a part that is none": {"messages": [{"role": "user", "content": [7]}]},
    "a call without function": {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    "calls a number": {"messages": [{"role": "assistant", "content": "", "tool_calls": 7}]},
    "a call without name": {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {}}]}]},
    "tools text": {"messages": HELLO, "tools": 7},
    "template arguments text": {"messages": HELLO, "chat_template_kwargs": "x"},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_a_4xx_that_says_what_was_expected(shared, body):
    response = shared.http.post("/chat/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)
    assert shared.chat().status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b"{'a': 1}"])
def test_a_body_that_is_no_json_object_is_a_400(shared, content):
    response = shared.http.post("/chat/completions", content=content)
    assert response.status_code == 400
    assert "JSON" in error_of(response)


def test_a_body_over_the_limit_is_a_413_before_it_is_read(served):
    port = int(served.endpoint.url.rpartition(":")[2].removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {served.endpoint.api_key}\r\n"
        raw.sendall(f"{head}content-length: {1 << 40}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(1000).partition(b"\r\n")[0]


def connected(served):
    return socket.create_connection(("127.0.0.1", int(served.endpoint.url.rpartition(":")[2].removesuffix("/v1"))), 10)


def test_a_chunked_body_over_the_limit_is_a_413_and_is_not_read_on(served, monkeypatch):
    monkeypatch.setattr(replies, "MAX_BODY_BYTES", 1 << 20)
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connected(served) as raw:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {served.endpoint.api_key}\r\n"
        raw.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + 16 * chunk)
        raw.settimeout(0.3)
        with pytest.raises(TimeoutError):
            raw.recv(1000)  # not over it yet
        raw.settimeout(10)
        raw.sendall(chunk)
        reply = raw.recv(1000)
        assert b" 413 " in reply.partition(b"\r\n")[0]
        assert b"connection: close" in reply
    assert served.chat().status_code == 200


@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 100, b"\x16\x03\x01 tls", b"GET / HTTP/9.9\r\n\r\n", b"NONSENSE\r\n\r\n", b"POST /%ff HTTP/1.1\r\n\r\n"]
    + [b"POST /v1/chat/completions HTTP/1.1\r\n" + header + b"\r\n\r\n" for header in (
        b"content-length: -1", b"content-length: 99999999999999999999999", b"transfer-encoding: nonsense",
        b"x: " + b"y" * 300_000, b"no colon", b"upgrade: websocket\r\nconnection: upgrade",
    )],
)  # fmt: skip
def test_garbage_on_the_wire_is_refused_and_the_next_request_is_served(shared, garbage):
    with connected(shared) as raw:
        raw.settimeout(2)
        try:
            raw.sendall(garbage)
            assert b" 200 " not in raw.recv(1000).partition(b"\r\n")[0]
        except (TimeoutError, ConnectionError):
            pass  # it waits for more, or has hung up
    assert shared.chat().status_code == 200


def test_other_routes_and_methods_do_not_exist(shared):
    for method, path, status in (
        ("POST", "/responses", 404),
        ("GET", "../docs", 404),
        ("GET", "/chat/completions", 405),
        ("DELETE", "/models", 405),
        ("POST", "../health", 405),
    ):
        response = shared.http.request(method, path)
        assert response.status_code == status
        assert error_of(response)
    assert response.headers["allow"] == "GET"


def test_the_endpoint_describes_itself_without_a_token(shared):
    paths = httpx.get(shared.endpoint.url.replace("/v1", "/openapi.json")).json()["paths"]
    served = {*shared.endpoint.app.gets, *shared.endpoint.app.posts}
    assert set(paths) == served


# -- an overflow, and nothing else, says what Gym takes for one


def test_a_prompt_without_room_for_a_token_is_the_one_reply_that_says_context_length(served):
    response = served.chat([{"role": "user", "content": "x" * WINDOW}])
    assert response.status_code == 400
    assert f"maximum context length is {WINDOW} tokens, and the prompt has" in error_of(response)


def test_a_refused_overflow_is_no_call_and_takes_no_seed(served):
    entry = served.open()
    served.chat([{"role": "user", "content": "x" * WINDOW}], **{wire.ROLLOUT_ID: "r"})
    assert entry.served == []
    assert entry.calls_started == 0


class Refusing(FakeEngine):
    """Answers every prompt with the words of vLLM that Gym would take for an overflow."""

    def generate(self, request_id, prompt_ids, sampling, deliver):
        deliver(EngineError("max_tokens must be at least 1; the model's context length is 8"))


def test_no_other_error_says_what_gym_takes_for_an_overflow(serve):
    traps = [
        {"n": "max_tokens"},
        {"temperature": "context length"},
        {"max_tokens": 0},
        {"max_tokens": "context length"},
        {"model": "max_tokens", "n": 2},
        {wire.ROLLOUT_ID: "context length"},
        {"messages": [{"content": "max_tokens"}]},
        {"messages": [{"role": "user", "content": [{"type": "max_tokens"}, 7]}]},
        {"chat_template_kwargs": {"messages": "context length"}},
        *MALFORMED.values(),
        {},  # the engine's own words
    ]
    served = serve(engine=Refusing(max_model_len=WINDOW))
    for trap in traps:
        response = served.http.post("/chat/completions", json={"messages": HELLO} | trap)
        assert 400 <= response.status_code < 500, trap
        assert not any(word in response.text for word in OVERFLOW_WORDS), (trap, response.text)


# -- the engine's life


def test_a_request_is_held_while_the_engine_is_paused_and_answered_when_it_goes_on(serve):
    served = serve(paused=True)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.chat().status_code))
    thread.start()
    time.sleep(0.2)
    assert answers == []
    assert httpx.get(served.endpoint.url.removesuffix("/v1") + "/health").status_code == 200
    served.engine.resume()
    thread.join(10)
    assert answers == [200]


def test_a_request_that_a_pause_ended_is_a_503_and_asked_again_it_waits_for_its_turn(serve):
    served = serve(paused=True)
    served.open("r")
    answers = []
    threads = [
        threading.Thread(target=lambda body=body: answers.append(served.chat(**body)))
        for body in ({}, {wire.ROLLOUT_ID: "r"})
    ]
    for thread in threads:
        thread.start()
    until(lambda: served.endpoint.service.stats.waiting == 2)
    served.ledger.close("r")
    served.engine.pause()
    for thread in threads:
        thread.join(10)
    assert [(a.status_code, a.headers["retry-after"]) for a in answers] == [(503, "1")] * 2
    served.engine.resume()
    assert served.chat().status_code == 200
    assert served.chat(**{wire.ROLLOUT_ID: "r"}).status_code == 410
    assert len(served.endpoint.app.answers) == 0


def until(condition):
    """Waits for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_generation_that_nobody_asks_for_again_is_aborted_after_the_grace_and_never_recorded(serve, monkeypatch):
    monkeypatch.setattr(retries, "GRACE_S", 0.3)
    served = serve(paused=True)
    entry = served.open()
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/chat/completions", json={"messages": HELLO, wire.ROLLOUT_ID: "r"}, timeout=0.2)
    assert len(served.engine._waiting) == 1
    until(lambda: not served.engine._waiting)
    assert (served.endpoint.service.stats.waiting, entry.served) == (0, [])
    served.engine.resume()
    assert served.chat(**{wire.ROLLOUT_ID: "r"}).status_code == 200
    assert len(entry.served) == 1


def test_a_generation_that_ended_after_its_client_had_gone_is_no_call_of_the_rollout(serve, monkeypatch):
    monkeypatch.setattr(retries, "GRACE_S", 0.3)
    served = serve(paused=True)
    entry = served.open()
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/chat/completions", json={"messages": HELLO, wire.ROLLOUT_ID: "r"}, timeout=0.2)
    served.engine.resume()
    until(lambda: len(served.endpoint.app.answers) == 0)
    assert served.endpoint.service.stats.generated_tokens > 0
    assert entry.served == []


def test_when_the_engine_dies_the_waiting_and_the_next_request_are_refused_for_good(serve):
    served = serve(paused=True)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.chat()))
    thread.start()
    time.sleep(0.2)
    served.engine.close()
    thread.join(10)
    for response in (*answers, served.chat()):
        assert response.status_code == 410
        assert "this policy is gone" in error_of(response)


def test_a_port_that_is_taken_is_a_config_error_that_names_it(policy_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}.*choose another port"):
            Endpoint(PolicyService(FakeEngine(), policy_dir, Ledger(), PROFILES), port=port)


def test_closing_twice_or_before_the_start_is_no_error_and_frees_the_port(serve, policy_dir):
    endpoint = Endpoint(PolicyService(FakeEngine(), policy_dir, Ledger(), PROFILES))
    port = int(endpoint.url.rpartition(":")[2].removesuffix("/v1"))
    endpoint.close()
    endpoint.close()
    again = Endpoint(PolicyService(FakeEngine(), policy_dir, Ledger(), PROFILES), port=port)
    again.start()
    again.close()
    again.close()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=2)


def test_an_answer_that_comes_after_the_end_is_dropped(serve):
    served = serve(paused=True)
    outcomes = []

    def ask():
        try:
            outcomes.append(served.chat().status_code)
        except httpx.TransportError as error:
            outcomes.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    served.endpoint.close()
    served.engine.close()  # delivers its last words to nobody
    thread.join(10)
    assert len(outcomes) == 1
    assert outcomes[0] != 200


def test_rollouts_that_are_served_at_once_keep_their_own_pages(served):
    names = [f"r{i}" for i in range(12)]
    entries = {name: served.open(name, seed=i) for i, name in enumerate(names)}

    def play(name):
        messages = [{"role": "user", "content": name}]
        served.chat(messages, **{wire.ROLLOUT_ID: name})

    threads = [threading.Thread(target=play, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name, entry in entries.items():
        (page,) = entry.served
        assert name in served.endpoint.service.chat.decode(page.call.prompt_ids)
    assert served.endpoint.service.stats.requests == 12


def test_a_connection_lost_mid_answer_and_asked_again_is_one_call_of_the_rollout(serve):
    served = serve(paused=True)
    served.open("lost")
    body = {"messages": HELLO, wire.ROLLOUT_ID: "lost"}
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/chat/completions", json=body, timeout=0.3)
    served.engine.resume()
    message = served.http.post("/chat/completions", json=body).json()["choices"][0]["message"]
    entry = served.ledger.close("lost")
    assert [made.call.token_ids for made in entry.served] == [message["generation_token_ids"]]
    assert entry.calls_started == 1


def test_a_text_or_a_list_of_ids_is_continued_with_its_ids_and_logprobs(served):
    ids = served.http.post("../tokenize", json={"prompt": "Hello there"}).json()["tokens"]
    by_text = served.http.post("/completions", json={"prompt": "Hello there", "seed": 3}).json()
    by_ids = served.http.post("/completions", json={"prompt": ids, "seed": 3}).json()
    choice = by_text["choices"][0]
    assert choice["prompt_token_ids"] == by_ids["choices"][0]["prompt_token_ids"] == ids
    assert choice["token_ids"] == by_ids["choices"][0]["token_ids"]
    assert (
        len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"]) == by_text["usage"]["completion_tokens"]
    )
    assert served.http.post("../detokenize", json={"tokens": ids}).json() == {"prompt": "Hello there"}
    for prompt in ([], [1.5], ["a"], [True], [-1], [1 << 40], None, 7):
        assert served.http.post("/completions", json={"prompt": prompt}).status_code == 400


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
GYM_SENDS = {  # one entry a field that Gym 0.4.0 or its main branch puts into a request, with values it may have
    "model": ["policy", "anything"],
    "max_tokens": [8],
    "max_completion_tokens": [8],
    "temperature": [0.5],
    "top_p": [1, 1.0],
    "top_k": [-1],
    "tools": [[TOOL], []],
    "tool_choice": ["auto", "none"],
    "parallel_tool_calls": [False, True],
    "metadata": [{"extra_body": "{}", "task": "7"}, {}],
    "user": ["somebody"],
    "logprobs": [True, False],
    "top_logprobs": [0],
    "service_tier": ["auto"],
    "store": [True],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "return_tokens_as_token_ids": [True],
    "return_token_ids": [True],
    "seed": [3],
    "min_p": [0, 0.0],
    "skip_special_tokens": [False],
    "reasoning_effort": ["low"],
    "mm_processor_kwargs": [{}],
    "required_prefix_token_ids": [[1, 2]],
    "frequency_penalty": [0.0],
    "presence_penalty": [0],
    "repetition_penalty": [1.0],
    "n": [1],
    "stop": [[]],
    "stream": [False],
    "nobody_knows_this_field": [{"a": [1]}],
}


@pytest.mark.parametrize("path", ["/chat/completions", "../tokenize"])
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in GYM_SENDS.items() for v in [*values, None]])
def test_every_field_that_gym_sends_is_accepted(shared, path, field, value):
    reply = shared.http.post(path, json={"messages": HELLO, field: value})
    assert reply.status_code == 200, reply.text


def test_metadata_and_user_come_back_as_they_went(shared):
    carried = {"metadata": {"task": "größe", "extra_body": "{}"}, "user": "somebody"}
    body = shared.chat(**carried).json()
    assert {key: body[key] for key in carried} == carried
    assert not carried.keys() & shared.chat().json().keys()


REFUSED = {
    "n": 2, "best_of": 2, "stream": True, "echo": True, "suffix": "a", "use_beam_search": True, "top_logprobs": 1,
    "prompt_logprobs": 0, "stop": ["a"], "stop_token_ids": [3], "ignore_eos": True,
    "response_format": {"type": "json_object"}, "structured_outputs": {"json": {}}, "guided_json": {"type": "object"},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a", "logit_bias": {"5": 1},
    "allowed_token_ids": [1], "bad_words": ["a"], "tool_choice": "required", "functions": [{}], "function_call": "add",
    "truncate_prompt_tokens": 5, "chat_template": "{{ 1 }}", "chat_template_kwargs": {"chat_template": "{{ 1 }}"},
    "continue_final_message": True, "add_generation_prompt": False,
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [*REFUSED.items(), ("n", True), ("stream", 1), ("tool_choice", TOOL)])
def test_what_is_not_supported_is_a_400_that_names_it_and_says_why(shared, field, value):
    reply = shared.chat(**{field: value})
    assert reply.status_code == 400
    assert f"`{field.removesuffix('_kwargs')}`" in error_of(reply)


def test_tools_are_not_shown_to_a_policy_that_must_not_call_them(shared):
    reply = shared.chat(tools=[TOOL], tool_choice="none")
    assert reply.status_code == 400
    assert "`tool_choice`" in error_of(reply)


def test_logprobs_are_those_of_the_sampled_tokens_by_text_or_by_id(served, policy_dir):
    plain = served.chat(seed=1, logprobs=True).json()["choices"][0]
    by_id = served.chat(seed=1, logprobs=True, top_logprobs=0, return_tokens_as_token_ids=True).json()["choices"][0]
    chat = ChatFormat(policy_dir)
    for choice, name in ((plain, lambda i: chat.decode([i])), (by_id, lambda i: f"token_id:{i}")):
        ids, logprobs = (choice["message"][key] for key in (wire.GENERATION_TOKEN_IDS, wire.GENERATION_LOG_PROBS))
        assert choice["logprobs"]["content"] == [
            {"token": name(i), "logprob": value, "bytes": None, "top_logprobs": []}
            for i, value in zip(ids, logprobs, strict=True)
        ]
    assert "logprobs" not in served.chat().json()["choices"][0]


def test_without_parallel_calls_the_first_is_the_only_one(serve, policy_dir):
    said = '<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b", "arguments": {}}</tool_call>'
    words = ChatFormat(policy_dir).encode(said + "<|im_end|>")
    served = serve(engine=FakeEngine(max_model_len=256, script=lambda p, s: words))
    served.endpoint.service._profiles = {"train": SamplingProfile(), "eval": SamplingProfile()}

    def called(**body):
        message = served.chat(**body).json()["choices"][0]["message"]
        return [call["function"]["name"] for call in message["tool_calls"]]

    assert called() == called(parallel_tool_calls=True) == ["a", "b"]
    assert called(parallel_tool_calls=False) == ["a"]


@pytest.mark.parametrize("path", ["/chat/completions", "../tokenize"])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_text_that_no_tokenization_fits_is_an_overflow_at_once(shared, path, role):
    start = time.perf_counter()
    reply = shared.http.post(path, json={"messages": [*HELLO, {"role": role, "content": "a" * 10_000_000}]})
    assert reply.status_code == 400
    assert f"maximum context length is {WINDOW} tokens, and the prompt has" in error_of(reply)
    assert shared.http.post("/completions", json={"prompt": "a" * 10_000_000}).status_code == 400
    assert time.perf_counter() - start < 5  # tokenizing it takes more than ten seconds


def test_reasoning_effort_reaches_the_template(serve, policy_dir, tmp_path):
    for file in policy_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ reasoning_effort or '' }}" + template.read_text())
    served = serve(policy_dir=tmp_path)

    def prompt(**body):
        return served.http.post("../tokenize", json={"messages": HELLO} | body).json()["tokens"]

    effort = served.endpoint.service.chat.encode("low")
    assert (
        prompt(reasoning_effort="low")
        == [*effort, *prompt()]
        == prompt(chat_template_kwargs={"reasoning_effort": "low"})
    )


def test_metrics_are_prometheus_text_and_count_what_happened(served):
    served.chat()
    text = httpx.get(served.endpoint.url.replace("/v1", "/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines())
    stats = served.endpoint.service.stats
    assert float(values["lightning_gym_requests_total"]) == stats.requests
    assert float(values["lightning_gym_generated_tokens_total"]) == stats.generated_tokens > 0
    assert float(values["lightning_gym_waiting_requests"]) == 0
    assert float(values["lightning_gym_weight_version"]) == 3
