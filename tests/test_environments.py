import asyncio
import json
import random
from typing import ClassVar

import pytest

from lightning_gym.errors import ConfigError, TaskError
from lightning_gym.gym.environments import Counter, Environment, ReverseString, last_text, load_environment, tool

# The first row of Gym 0.4.0's example_session_state_mgmt, as published.
GYM_ROW = (
    '{"responses_create_params": {"input": [{"content": "add 1 then add 2 then get the count", "role": "user"}], '
    '"tools": [{"name": "increment_counter", "parameters": {"type": "object", "properties": {"count": {"type": '
    '"integer", "description": ""}}, "required": ["count"], "additionalProperties": false}, "strict": true, "type": '
    '"function", "description": ""}, {"name": "get_counter_value", "parameters": {"type": "object", "properties": {}, '
    '"required": [], "additionalProperties": false}, "strict": true, "type": "function", "description": ""}]}, '
    '"expected_count": 6, "initial_count": 3}'
)


class Dice:
    """Rolls what it was told to."""

    def __init__(self, *rolls):
        self.rolls = list(rolls)

    def randint(self, low, high):
        roll = self.rolls.pop(0)
        assert low <= roll <= high
        return roll


class Toolbox(Environment):
    name = "toolbox"

    @tool
    def greet(self, name: str, times: int = 1, words: list[str] | None = None) -> dict[str, object]:
        return {"text": f"{name} é" * times, "words": words}

    @tool
    def shout(self) -> str:
        return "a"

    def verify(self, response):
        return 0.0


def said(text):
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def test_a_counter_row_is_gyms_row_with_the_agent_named():
    row = Counter.row(Dice(1, 2, 3))
    assert row.pop("agent_ref") == {
        "type": "responses_api_agents",
        "name": "example_session_state_mgmt_simple_agent",
    }
    assert row == json.loads(GYM_ROW)


def test_a_counter_answers_and_rewards_as_gyms_does():
    counter = Counter(json.loads(GYM_ROW))
    assert counter.call_tool("increment_counter", {"count": 1}) == '{"success":true}'
    assert counter.verify({"output": []}) == 0.0
    assert counter.call_tool("increment_counter", {"count": "2"}) == '{"success":true}'
    assert counter.call_tool("get_counter_value", {"what": "ever"}) == '{"count":6}'
    assert counter.verify({"output": []}) == 1.0


def test_two_rollouts_of_one_row_do_not_share_their_state():
    row = json.loads(GYM_ROW)
    first, second = Counter(row), Counter(row)
    first.call_tool("increment_counter", {"count": 5})
    assert second.call_tool("get_counter_value", {}) == '{"count":3}'


def test_a_reverse_string_row_is_solved_by_its_expected_text_and_nothing_else():
    rng = random.Random(0)
    for _ in range(100):
        row = ReverseString.row(rng)
        (message,) = row["responses_create_params"]["input"]
        letters = message["content"].removeprefix("reverse ").split(" ")
        assert 3 <= len(letters) == len(set(letters)) <= 5
        environment = ReverseString(row)
        backwards = " ".join(letters[::-1])
        assert environment.verify({"output": [said(" no"), said(f"\n{backwards} ")]}) == 1.0
        assert environment.verify({"output": [said(backwards), said(" ".join(letters))]}) == 0.0
        assert environment.verify({"output": []}) == 0.0


def test_rows_are_a_function_of_the_seed():
    for environment in (Counter, ReverseString):
        assert environment.row(random.Random(5)) == environment.row(random.Random(5))
        assert environment.row(random.Random(5)) != environment.row(random.Random(6))


def test_the_last_text_passes_over_tool_calls_and_their_results():
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    assert last_text({"output": [said("one"), call, {"type": "function_call_output", "output": "two"}]}) == "one"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"initial_count": 1}, ["expected_count", "missing", "int", "initial_count"]),
        ({"expected_count": 1, "initial_count": "three"}, ["initial_count", "'three'", "int"]),
        ({"expected_count": 1.5, "initial_count": 1}, ["expected_count", "1.5", "int"]),
    ],
)
def test_a_row_without_what_the_verifier_needs_is_refused_by_field(row, words):
    with pytest.raises(TaskError) as refused:
        Counter(row)
    assert all(word in str(refused.value) for word in ["example_session_state_mgmt", *words])


BODIES = [
    {}, [], None, 0, 5, "a", True, {"name": 1}, {"name": "x"}, {"name": "x", "more": 1}, {"name": None},
    {"name": "x", "times": "2"}, {"name": "x", "times": 1.5}, {"name": "x", "times": "é"}, {"times": []},
    {"name": "x", "words": ["a", 2, 3]}, {"name": "x", "words": None},
]  # fmt: skip


@pytest.mark.parametrize("name", ["greet", "shout", "no_such_tool", "verify", "call_tool", "__init__"])
@pytest.mark.parametrize("body", BODIES, ids=json.dumps)
def test_a_tool_answers_as_a_fastapi_route_of_the_same_signature(name, body):
    fastapi = pytest.importorskip("fastapi")
    pydantic = pytest.importorskip("pydantic")

    class Greeting(pydantic.BaseModel):
        name: str
        times: int = 1
        words: list[str] | None = None

    app = fastapi.FastAPI()

    @app.post("/greet")
    async def greet(body: Greeting):
        return Toolbox({}).greet(body.name, body.times, body.words)

    @app.post("/shout")
    async def shout():
        return "a"

    sent = b"" if body is None else json.dumps(body).encode()
    assert Toolbox({}).call_tool(name, body) == asyncio.run(posted(app, f"/{name}", sent))


async def posted(app, path, body):
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "root_path": "", "app": app,
    }  # fmt: skip
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return b"".join(message.get("body", b"") for message in sent).decode()


def test_an_inherited_tool_can_be_called_and_overridden():
    class Quiet(Toolbox):
        @tool
        def shout(self, loud: bool) -> str:
            return "A" if loud else "a"

    assert Quiet({}).call_tool("greet", {"name": "x"}) == '{"text":"x é","words":null}'
    assert Quiet({}).call_tool("shout", {"loud": True}) == '"A"'


def test_a_tool_parameter_without_an_annotation_is_refused():
    class Vague(Environment):
        name = "vague"

        @tool
        def f(self, x):
            return x

        def verify(self, response):
            return 0.0

    with pytest.raises(ConfigError, match=r"Vague\.f: parameter 'x' needs a type annotation"):
        Vague({}).call_tool("f", {"x": 1})


def test_the_short_names_and_import_paths_lead_to_the_same_classes():
    assert load_environment("counter") is Counter
    assert load_environment("lightning_gym.gym.environments:Counter") is Counter
    assert load_environment("reverse_string") is ReverseString


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("countr", ["'countr'", "'counter'", "'reverse_string'", "package.module:Class"]),
        ("package:", ["package.module:Class"]),
        ("no_such_package.module:Class", ["no_such_package", "cannot import"]),
        ("lightning_gym.gym.environments:Missing", ["lightning_gym.gym.environments", "'Missing'"]),
        ("lightning_gym.gym.environments:last_text", ["subclass of Environment"]),
        ("lightning_gym.gym.environments:Environment", ["Environment does not define verify"]),
    ],
)
def test_a_name_that_is_no_environment_is_refused_with_what_was_expected(spec, words):
    with pytest.raises(ConfigError) as refused:
        load_environment(spec)
    assert all(word in str(refused.value) for word in words)


def test_an_environment_without_a_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "nameless_environments.py").write_text(
        "from lightning_gym.gym.environments import Environment\n"
        "class Nameless(Environment):\n    def verify(self, response): return 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="Nameless has no `name"):
        load_environment("nameless_environments:Nameless")


class Sandbox(Environment):
    """Its tool and its verifier wait for each other's rollouts: none ends unless two are played at once."""

    name = "sandbox"
    waiting: ClassVar[asyncio.Barrier]

    @tool
    async def run(self, code: str) -> dict[str, int]:
        await self.waiting.wait()
        return {"length": len(code)}

    async def verify(self, response):
        await self.waiting.wait()
        return 0.5


def test_tools_and_verifiers_that_wait_hold_up_no_other_rollout():
    async def play(sandbox):
        assert await sandbox.answer("run", {"code": "ab"}) == '{"length":2}'
        assert (await sandbox.answer("run", {})).startswith('{"detail":')
        assert await sandbox.answer("stop", {}) == '{"detail":"Not Found"}'
        return await sandbox.score({"output": []})

    async def both():
        Sandbox.waiting = asyncio.Barrier(2)
        return await asyncio.wait_for(asyncio.gather(play(Sandbox({})), play(Sandbox({}))), timeout=10)

    assert asyncio.run(both()) == [0.5, 0.5]


def test_what_does_not_wait_can_be_awaited_too():
    counter = Counter({"expected_count": 3, "initial_count": 2})
    assert asyncio.run(counter.answer("increment_counter", {"count": 1})) == '{"success":true}'
    assert asyncio.run(counter.score({"output": []})) == 1.0


def test_a_tool_that_waits_says_how_it_is_called():
    with pytest.raises(TypeError, match=r"tool Sandbox\.run is async: await answer\('run', \.\.\.\)"):
        Sandbox({}).call_tool("run", {"code": "ab"})
