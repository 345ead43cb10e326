"""A policy that answers from a list and writes down what it was asked, and the rollouts that every Gym is held to."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lightning_gym.gym.wire import GENERATION_LOG_PROBS, GENERATION_TOKEN_IDS, PROMPT_TOKEN_IDS

KEY = "key-of-the-recording-policy"


class RecordingPolicy:
    """``POST`` anything: the next of `answers` comes back, and the request is in `sent`."""

    def __init__(self):
        self.answers = []
        self.sent = []

    def play(self, answers):
        self.answers, self.sent = list(answers), []

    def answer(self, _, path, headers, body):
        if headers["authorization"] != f"Bearer {KEY}":
            return 401, "wrong key"
        self.sent.append({"path": path, "body": body})
        return self.answers[min(len(self.sent), len(self.answers)) - 1]


@contextmanager
def json_server(answer):
    """An HTTP server; `answer` takes method, path, headers and body and returns status and JSON. Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, value = answer(self.command, self.path, self.headers, json.loads(body) if body else None)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = reply  # noqa: N815  http.server's names

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def recording_policy():
    policy = RecordingPolicy()
    with json_server(policy.answer) as url:
        yield policy, f"{url}/v1"


def completion(content=None, *, calls=(), finish_reason=None, ids=True, number=0, **message):
    """What the endpoint answers with; `number` makes the ids of one turn differ from another's."""
    tool_calls = [
        {"id": f"call-{number}-{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content} | message
    if tool_calls:
        message["tool_calls"] = tool_calls
    if ids:
        message |= {
            PROMPT_TOKEN_IDS: [1, 2, 3 + number],
            GENERATION_TOKEN_IDS: [10 + number, 4],
            GENERATION_LOG_PROBS: [-0.25, -0.5 - number],
        }
    reason = finish_reason or ("tool_calls" if tool_calls else "stop")
    return 200, {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "policy",
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "weight_version": 0,
    }


def refusal(status, message):
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": status}}


def add(*counts, number=0, **options):
    calls = [("increment_counter", json.dumps({"count": count})) for count in counts]
    return completion(calls=calls, number=number, **options)


def get(number=1):
    return completion(calls=[("get_counter_value", "{}")], number=number)


def row(**fields):
    """A row of the demo with little in it; `params` are further ``responses_create_params``."""
    params = {"input": [{"role": "user", "content": "add 1 then add 2 then get the count"}]} | fields.pop("params", {})
    return {"responses_create_params": params, "expected_count": 6, "initial_count": 3} | fields


OVERFLOW = refusal(400, "This model's maximum context length is 64 tokens, and the prompt has 70.")
DONE = completion("6", number=2)
ARGUMENTS = [
    "{", "", "null", "[]", "{}", "1", "0", "false", '"x"', '""',
    '{"count": NaN}', '{"count": "3"}', '{"count": "three"}', '{"count": 1.5}', '{"count": 1.0}', '{"count": true}',
    '{"count": null}', '{"count": [1]}', '{"count": 1, "more": 2}', '{"Count": 1}', '[{"count": 1}]', '{"count": 1} x',
    '{"count": 1e400}', '{"count": "ü\\u00e9"}', "[1]", "1.5", '{"count": {"a": {"b": [1, 2]}}}',
    '{"count": 9007199254740993}',
]  # fmt: skip


def scenarios(demo_row):
    """Name -> row and the policy's answers; `demo_row` is one of the demo's dataset, unchanged."""
    numbers = [
        int(word) for word in demo_row["responses_create_params"]["input"][0]["content"].split() if word.isdigit()
    ]
    history = [
        {"role": "system", "content": "Count."},
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "brief."}],
        },
        {"role": "user", "content": "add 1"},
        {"type": "function_call", "call_id": "c0", "name": "increment_counter", "arguments": '{"count": 1}'},
        {"type": "function_call_output", "call_id": "c0", "output": '{"success":true}'},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "go on"},
    ]
    return {
        "right": (demo_row, [add(*numbers), get(), DONE]),
        "wrong": (demo_row, [add(numbers[0]), DONE]),
        "one call a turn": (row(), [add(1), add(2, number=1), get(2), completion("6", number=3)]),
        "text beside a call": (row(), [add(3, content="I add 3"), completion("6", number=1)]),
        "useless arguments": (
            row(),
            [completion(calls=[("increment_counter", arguments) for arguments in ARGUMENTS]), DONE],
        ),
        "needless arguments": (
            row(),
            [completion(calls=[("get_counter_value", arguments) for arguments in ARGUMENTS]), DONE],
        ),
        "unknown tools": (
            row(),
            [completion(calls=[(name, "{}") for name in ("no_such_tool", "Increment_counter", "a/b")]), DONE],
        ),
        "first prompt too long": (row(), [OVERFLOW]),
        "later prompt too long": (row(), [add(1, 2), OVERFLOW]),
        "answer cut": (row(), [completion("I thi", finish_reason="length")]),
        "call cut": (row(), [add(3, finish_reason="length")]),
        "empty answer": (row(), [completion("")]),
        "no content": (row(), [completion(None)]),
        "reasoning": (row(), [add(3, reasoning_content="3?", reasoning="3?"), completion("6", number=1)]),
        "thinking in the text": (row(), [completion("<think>3?</think>so", calls=[]), DONE]),
        "reasoning and nothing else": (
            row(),
            [completion(None, reasoning_content="hm", reasoning="hm"), add(3, number=1), DONE],
        ),
        "a later turn without ids": (row(), [add(1), completion(calls=[("get_counter_value", "{}")], ids=False), DONE]),
        "refused": (row(), [refusal(400, "no such thing")]),
        "refused later": (row(), [add(1), refusal(410, "rollout r is over")]),
        "not found": (row(), [refusal(404, "model not found")]),
        "never done": (row(), [add(1)]),
        "input is a string": (row(params={"input": "add 3"}), [add(3), DONE]),
        "input has a history": (row(params={"input": history}), [add(3), DONE]),
        "sampled as asked": (
            row(
                params={
                    "temperature": 0.5,
                    "top_p": 0.9,
                    "max_output_tokens": 16,
                    "parallel_tool_calls": False,
                    "tool_choice": "required",
                    "user": "me",
                    "metadata": {"extra_body": '{"top_k": 7, "seed": 1}', "note": "n"},
                },
                agent_ref={"type": "responses_api_agents", "name": "example_session_state_mgmt_simple_agent"},
                _ng_task_index=4,
                difficulty=0.5,
            ),
            [add(3), DONE],
        ),
        "unknown parameter": (row(params={"max_tokens": 3}), [DONE]),
        "wrong parameter": (row(params={"temperature": "hot"}), [DONE]),
        "no input": ({"responses_create_params": {}, "expected_count": 6, "initial_count": 3}, [DONE]),
    }
