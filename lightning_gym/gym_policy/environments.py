"""NeMo Gym's environments as these recipes use them: which rows, and a teacher who is right often enough to learn from.

A teacher sees what a policy sees, a row's prompt and what was said since, and says the next turn; it errs on purpose.
Its rewards are Gym's: see `lightning_gym.gym_policy.demonstrations`.
"""

import ast
import json
import random
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.gym.environments import Counter
from lightning_gym.gym.wire import AGENT_REF, RESPONSES_CREATE_PARAMS

Row = Mapping[str, Any]
Message = dict[str, Any]
"""One chat message as OpenAI's chat schema has it."""
Turn = Callable[[Row, Sequence[Message], random.Random], Message]
"""Row, conversation so far, and where chance comes from -> the assistant's next message."""

_NUM_ROWS = 16
"""Of the environments whose rows are made here: few enough for a tiny policy to know them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GymEnvironment:
    """One environment of Gym's tree."""

    name: str
    """Of its folder in ``resources_servers``, and of its configuration."""
    agent: str
    rows: Callable[["GymTree", int], list[Row]]
    """Gym's tree and a seed -> rows."""
    turn: Turn
    max_steps: int | None = None
    """Model calls of a rollout, where the environment is meant for a certain number."""
    demonstrations_per_row: int = 24

    @property
    def config(self) -> str:
        """Its YAML file, as `lightning_gym.NemoGym` takes it."""
        return f"resources_servers/{self.name}/configs/{self.name}.yaml"

    @property
    def overrides(self) -> dict[str, Any]:
        """What has to be set on top of the file."""
        if self.max_steps is None:
            return {}
        return {f"{self.agent}.responses_api_agents.simple_agent.max_steps": self.max_steps}


class GymTree:
    """The files of an installed NeMo Gym.

    Args:
        python: the interpreter that it is installed for.
    """

    def __init__(self, python: Path) -> None:
        self.python = python.absolute()
        found = "import importlib.util as u; print(u.find_spec('nemo_gym').submodule_search_locations[0])"
        self.root = Path(self.run("-c", found).strip()).parent

    def run(self, *arguments: str) -> str:
        """What Gym's interpreter prints.

        Raises:
            ConfigError: it is missing, or fails; with its last words.
        """
        try:
            done = subprocess.run(
                [self.python, "-P", *arguments], capture_output=True, text=True, check=True, cwd=tempfile.gettempdir()
            )
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no Python interpreter {self.python} with NeMo Gym; make one with `make setup-gym`"
            ) from error
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"{self.python} {arguments[0]} failed: {error.stderr[-400:]}") from error
        return done.stdout

    def examples(self, name: str) -> list[Row]:
        """The example rows that Gym ships with an environment."""
        lines = (self.root / "resources_servers" / name / "data" / "example.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def call(name: str, arguments: Mapping[str, Any] | str, number: int = 0) -> dict[str, Any]:
    """A tool call; `number` tells those of a turn apart."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": text}}


def _calls(*calls: dict[str, Any], content: str | None = None) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def _says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _results(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "tool"]


def _prompt(row: Row) -> str:
    return row[RESPONSES_CREATE_PARAMS]["input"][-1]["content"]


def _with_agent(rows: Sequence[Row], agent: str) -> list[Row]:
    """As Gym's collation writes them: its examples leave the agent to the command line."""
    return [{**row, AGENT_REF: {"type": "responses_api_agents", "name": agent}} for row in rows]


# -- example_session_state_mgmt: add two numbers to a counter by tool calls, and tell it


def _counter_rows(_: GymTree, seed: int) -> list[Row]:
    rng = random.Random(f"counter {seed}")
    return [Counter.row(rng) for _ in range(_NUM_ROWS)]


def _counter_turn(row: Row, messages: Sequence[Message], rng: random.Random) -> Message:
    results = _results(messages)
    if not results:
        numbers = [int(word) for word in _prompt(row).split() if word.isdigit()]
        said = [number if rng.random() < 0.7 else rng.randint(1, 9) for number in numbers]
        return _calls(*(call("increment_counter", {"count": number}, i) for i, number in enumerate(said)))
    if len(results) == 2:
        return _calls(call("get_counter_value", {}))
    return _says(str(json.loads(results[-1]["content"])["count"]))


# -- example_multi_turn_gymnasium: a scripted user asks on; the last answer counts


def _multi_turn_rows(tree: GymTree, _: int) -> list[Row]:
    return tree.examples("example_multi_turn_gymnasium")


_LAST_ANSWERS = ("Eiffel Tower", "20", "95", "1991", "2")
_EARLIER_ANSWERS = ("Paris, about 2 million", "120", "Jupiter", "Python", "H2O")


def _multi_turn_turn(row: Row, messages: Sequence[Message], rng: random.Random) -> Message:
    asked = sum(message["role"] == "user" for message in messages)
    if asked <= len(row["follow_ups"]):
        return _says(rng.choice(_EARLIER_ANSWERS))
    right = next(answer for answer in _LAST_ANSWERS if answer.startswith(row["expected_answer"]))
    return _says(right if rng.random() < 0.4 else rng.choice(_LAST_ANSWERS))


# -- reasoning_gym: sums of two digits, made by the package's own generator

_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def _reasoning_rows(tree: GymTree, seed: int) -> list[Row]:
    script = tree.root / "resources_servers/reasoning_gym/scripts/create_dataset.py"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        what = ("--task", "chain_sum", "--size", str(_NUM_ROWS), "--seed", str(seed), "--config", json.dumps(_SUMS))
        tree.run(str(script), *what, "--output", str(path))
        return [json.loads(line) for line in path.read_text().splitlines()]


def _reasoning_turn(row: Row, _: Sequence[Message], rng: random.Random) -> Message:
    right = int(row["answer"])
    return _says(str(right if rng.random() < 0.45 else right + rng.choice((-3, -2, -1, 1, 2, 3))))


# -- example_tool_call_multireward: one tool call, graded in three parts


def _weather_rows(tree: GymTree, _: int) -> list[Row]:
    return tree.examples("example_tool_call_multireward")


_CITIES = ("San Francisco", "New York", "Seattle", "London", "Tokyo")


def _weather_turn(row: Row, _: Sequence[Message], rng: random.Random) -> Message:
    right = row["expected_call"]["arguments"]["city"]
    city = right if rng.random() < 0.5 else rng.choice(_CITIES)
    key = "city" if rng.random() < 0.8 else "town"
    one = call("get_weather", {key: city})
    if rng.random() < 0.3:  # two calls where one was asked for
        return _calls(one, call("get_weather", {"city": rng.choice(_CITIES)}, 1))
    return _calls(one)


# -- math_advanced_calculations: calculators whose results are not the usual ones

_MAX_DEPTH = 2
_OPERATIONS: Mapping[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.Pow: "power",
}
_ARGUMENTS = {"sin": ("radians",), "cos": ("radians",), "log": ("a", "base")}


def _math_rows(tree: GymTree, _: int) -> list[Row]:
    return [row for row in tree.examples("math_advanced_calculations") if row["depth"] <= _MAX_DEPTH]


def _math_turn(row: Row, messages: Sequence[Message], rng: random.Random) -> Message:
    """What can be calculated from the results so far, one call a turn; a mistake is not made good."""
    text = _prompt(row).partition(" for ")[2].removesuffix(" using only the given tools.").replace(" and ", " ")
    terms = ast.parse(f"[{text}]", mode="eval").body
    assert isinstance(terms, ast.List)
    known = _known(messages)
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for term in terms.elts:
        _value(term, known, calls)
    due = [one for key, one in calls.items() if key not in known]
    if not due or known.keys() - calls.keys():
        return _says("done")
    name, arguments = due[0]
    return _calls(call(name if rng.random() < 0.85 else rng.choice(("add", "multiply", "negate")), arguments))


def _known(messages: Sequence[Message]) -> dict[str, float | None]:
    """Call -> its result; ``None`` where the tool refused."""
    asked = [one["function"] for message in messages for one in message.get("tool_calls") or ()]
    known: dict[str, float | None] = {}
    for function, result in zip(asked, _results(messages), strict=True):
        key = _key(function["name"], json.loads(function["arguments"]))
        try:
            known[key] = json.loads(result["content"])["solution"]
        except (ValueError, KeyError):
            known[key] = None
    return known


def _key(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name} {json.dumps(arguments)}"


def _value(
    node: ast.expr, known: Mapping[str, float | None], calls: dict[str, tuple[str, dict[str, Any]]]
) -> float | None:
    """The value of an expression, if it is known; the calls that it needs and whose arguments are go into `calls`."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            inner: list[ast.expr] = []
            names: tuple[str, ...] = ()
        case ast.BinOp(left=left, op=op, right=right):
            name, inner, names = _OPERATIONS[type(op)], [left, right], ("a", "b")
        case ast.UnaryOp(operand=operand):
            name, inner, names = "negate", [operand], ("a",)
        case ast.Call(func=ast.Name(id=name), args=inner):
            names = _ARGUMENTS[name]
        case _:
            raise ConfigError(f"the expression {ast.unparse(node)!r} is none of this environment's")
    values = [_value(argument, known, calls) for argument in inner]
    if None in values:
        return None
    arguments = dict(zip(names, values, strict=True))
    key = _key(name, arguments)
    calls[key] = name, arguments
    return known.get(key)


# -- workplace_assistant: the right changes in an office's databases


def _workplace_rows(tree: GymTree, _: int) -> list[Row]:
    return tree.examples("workplace_assistant")


def _workplace_turn(row: Row, messages: Sequence[Message], rng: random.Random) -> Message:
    done, right = len(_results(messages)), row["ground_truth"]
    if done == len(right):
        return _says("done")
    arguments = right[done]["arguments"]
    if rng.random() < 0.25:
        arguments = arguments.replace("00000", "00001", 1)
    return _calls(call(right[done]["name"], arguments))


GYM_ENVIRONMENTS: Mapping[str, GymEnvironment] = {
    environment.name: environment
    for environment in (
        GymEnvironment(
            name="example_session_state_mgmt",
            agent="example_session_state_mgmt_simple_agent",
            rows=_counter_rows,
            turn=_counter_turn,
        ),
        GymEnvironment(
            name="example_multi_turn_gymnasium",
            agent="example_multi_turn_gymnasium_agent",
            rows=_multi_turn_rows,
            turn=_multi_turn_turn,
            demonstrations_per_row=48,
        ),
        GymEnvironment(
            name="reasoning_gym",
            agent="reasoning_gym_simple_agent",
            rows=_reasoning_rows,
            turn=_reasoning_turn,
        ),
        GymEnvironment(
            name="example_tool_call_multireward",
            agent="example_tool_call_multireward_simple_agent",
            rows=_weather_rows,
            turn=_weather_turn,
            # A second call could only add the text that costs the third part of the reward.
            max_steps=1,
            demonstrations_per_row=48,
        ),
        GymEnvironment(
            name="math_advanced_calculations",
            agent="math_advanced_calculations_simple_agent",
            rows=_math_rows,
            turn=_math_turn,
            demonstrations_per_row=48,
        ),
        GymEnvironment(
            name="workplace_assistant",
            agent="workplace_assistant_simple_agent",
            rows=_workplace_rows,
            turn=_workplace_turn,
        ),
    )
}


def rows_of(environment: GymEnvironment, tree: GymTree, seed: int) -> list[Row]:
    """Its rows, each with its agent."""
    return _with_agent(environment.rows(tree, seed), environment.agent)
