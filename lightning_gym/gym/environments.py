"""Environments that the embedded Gym plays: one instance is the state of one rollout."""

import importlib
import inspect
import random
import string
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError, create_model
from pydantic_core import to_json

from lightning_gym.errors import ConfigError, TaskError
from lightning_gym.gym.wire import AGENT_REF, RESPONSES_CREATE_PARAMS

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])
_TOOL_MARK = "__lightning_gym_tool__"


def tool(method: Method) -> Method:
    """Mark a method of an `Environment` as a tool that the agent can call by the method's name.

    The annotations of its parameters are what the agent's arguments are validated against, and what it returns is
    sent as compact JSON: ``{"success": True}`` is read by the agent as ``{"success":true}``.
    """
    setattr(method, _TOOL_MARK, True)
    return method


class Environment(ABC):
    """The world of one rollout: made from its dataset row, asked for tool results, then for the reward.

    Methods run on the server's event loop, so one that blocks holds up every other rollout: let tools and `verify` that
    wait for something (a sandbox, a judge) be ``async def``.

    Example, played by the agent ``guess_simple_agent``::

        class Guess(Environment):
            name = "guess"

            def __init__(self, row):
                super().__init__(row)
                self.secret = self.require("secret", int)

            @tool
            def compare(self, number: int) -> dict[str, bool]:
                return {"higher": self.secret > number}

            def verify(self, response):
                return float(last_text(response) == str(self.secret))
    """

    name: ClassVar[str]
    """What Gym calls the environment; ``<name>_simple_agent`` plays it."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        """Start a rollout of `row`; raise `TaskError` (see `require`) where it lacks what `verify` needs."""
        self.task = row
        """The whole dataset row."""

    def require(self, field: str, kind: type[T]) -> T:
        """The row's `field` as a `kind`, by pydantic's rules: ``"3"`` is an ``int``, ``"three"`` is not."""
        where = f"environment {self.name!r}: row field {field!r}"
        if field not in self.task:
            raise TaskError(f"{where} is missing; expected {kind.__name__}, got a row with {sorted(self.task)}")
        try:
            return TypeAdapter(kind).validate_python(self.task[field])
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise TaskError(f"{where}: expected {kind.__name__}, got {self.task[field]!r} ({reason})") from error

    def call_tool(self, name: str, arguments: Any) -> str:
        """What the agent reads after it called `name`; `arguments` is any JSON value, already parsed.

        A name that is no tool and arguments that do not fit are answered as Gym's servers (FastAPI) answer them.

        Raises:
            TypeError: the tool is ``async def``; `answer` waits for it.
        """
        try:
            returned = self._called(name, arguments)
        except _RefusedError as refused:
            return refused.body
        if isinstance(returned, Coroutine):
            returned.close()
            raise TypeError(f"tool {type(self).__name__}.{name} is async: await answer({name!r}, ...)")
        return to_json(returned).decode()

    async def answer(self, name: str, arguments: Any) -> str:
        """`call_tool`, which waits for a tool that is ``async def``."""
        try:
            returned = self._called(name, arguments)
        except _RefusedError as refused:
            return refused.body
        return to_json(await returned if inspect.isawaitable(returned) else returned).decode()

    def _called(self, name: str, arguments: Any) -> Any:
        validator = _tools(type(self)).get(name)
        if validator is None:
            raise _RefusedError('{"detail":"Not Found"}')
        return getattr(self, name)(**validator(arguments))

    @abstractmethod
    def verify(self, response: Mapping[str, Any]) -> float | Awaitable[float]:
        """The reward of the finished rollout; ``response["output"]`` holds all its items, tool results included."""

    async def score(self, response: Mapping[str, Any]) -> float:
        """`verify`, which waits for one that is ``async def``."""
        reward = self.verify(response)
        return await reward if inspect.isawaitable(reward) else reward

    def report(self) -> Mapping[str, Any]:
        """Further numbers that go out beside the reward; asked for after `verify`."""
        return {}

    @classmethod
    def row(cls, rng: random.Random) -> dict[str, Any]:
        """One new dataset row."""
        raise NotImplementedError(f"{cls.__name__} makes no rows of its own: write them to a JSONL file instead")

    @classmethod
    def agent_name(cls) -> str:
        """The agent that plays this environment."""
        return f"{cls.name}_simple_agent"

    @classmethod
    def agent_ref(cls) -> dict[str, str]:
        """What a dataset row names its agent with."""
        return {"type": "responses_api_agents", "name": cls.agent_name()}


class Counter(Environment):
    """Gym's ``example_session_state_mgmt``: a counter is to be moved by tool calls to an expected value."""

    name = "example_session_state_mgmt"

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.expected_count = self.require("expected_count", int)
        self.count = self.require("initial_count", int)

    @tool
    def increment_counter(self, count: int) -> dict[str, bool]:
        self.count += count
        return {"success": True}

    @tool
    def get_counter_value(self) -> dict[str, int]:
        return {"count": self.count}

    def verify(self, response: Mapping[str, Any]) -> float:
        return float(self.count == self.expected_count)

    @classmethod
    def row(cls, rng: random.Random) -> dict[str, Any]:
        """Gym's own row with other numbers: "add 1 then add 2 then get the count", from 3 to 6."""
        first, second, initial = rng.randint(1, 9), rng.randint(1, 9), rng.randint(0, 9)
        prompt = f"add {first} then add {second} then get the count"
        tools = [
            _function("increment_counter", {"count": {"type": "integer", "description": ""}}),
            _function("get_counter_value", {}),
        ]
        return {
            RESPONSES_CREATE_PARAMS: {"input": [{"content": prompt, "role": "user"}], "tools": tools},
            "expected_count": initial + first + second,
            "initial_count": initial,
            AGENT_REF: cls.agent_ref(),
        }


class ReverseString(Environment):
    """One turn, no tools: answer "reverse a b c d" with "d c b a"."""

    name = "reverse_string"

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.expected = self.require("expected", str)

    def verify(self, response: Mapping[str, Any]) -> float:
        return float(last_text(response).strip() == self.expected)

    @classmethod
    def row(cls, rng: random.Random) -> dict[str, Any]:
        letters = rng.sample(string.ascii_lowercase, rng.randint(3, 5))
        return {
            RESPONSES_CREATE_PARAMS: {"input": [{"content": f"reverse {' '.join(letters)}", "role": "user"}]},
            "expected": " ".join(reversed(letters)),
            AGENT_REF: cls.agent_ref(),
        }


def last_text(response: Mapping[str, Any]) -> str:
    """The text of the last assistant message of `response`, or ``""`` where there is none."""
    for item in reversed(response["output"]):
        if item.get("type") == "message" and item.get("role") == "assistant":
            return "".join(part.get("text", "") for part in item["content"])
    return ""


def load_environment(spec: str) -> type[Environment]:
    """The environment class that `spec` names: ``"counter"``, ``"reverse_string"`` or ``"package.module:Class"``.

    Raises:
        ConfigError: there is no such class, or it is not a complete `Environment`.
    """
    if spec in _BUILT_IN:
        return _BUILT_IN[spec]
    module_name, colon, class_name = spec.partition(":")
    if not (module_name and colon and class_name):
        known = ", ".join(repr(name) for name in _BUILT_IN)
        raise ConfigError(f"environment {spec!r}: expected {known} or an import path 'package.module:Class'")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"environment {spec!r}: cannot import module {module_name!r}: {error}") from error
    for part in class_name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"environment {spec!r}: module {module_name!r} has no {class_name!r}")
        found = getattr(found, part)
    return _checked(spec, found)


def _checked(spec: str, found: Any) -> type[Environment]:
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ConfigError(f"environment {spec!r}: expected a subclass of Environment, got {found!r}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"environment {spec!r}: {found.__name__} does not define {missing}")
    if not isinstance(getattr(found, "name", None), str):
        raise ConfigError(f"environment {spec!r}: {found.__name__} has no `name: ClassVar[str]`")
    _tools(found)
    return found


_BUILT_IN: dict[str, type[Environment]] = {"counter": Counter, "reverse_string": ReverseString}


class _RefusedError(Exception):
    """There is no such tool, or the agent's arguments do not fit it; `body` is what it is told."""

    def __init__(self, body: str) -> None:
        super().__init__(body)
        self.body = body


@cache
def _tools(environment: type[Environment]) -> dict[str, Callable[[Any], dict[str, Any]]]:
    """Tool name -> what turns the agent's arguments into the method's keyword arguments."""
    marked = inspect.getmembers(environment, lambda member: getattr(member, _TOOL_MARK, False))
    return {name: _validator(environment, name, method) for name, method in marked}


def _validator(environment: type[Environment], name: str, method: Any) -> Callable[[Any], dict[str, Any]]:
    hints = get_type_hints(method, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(
                f"tool {environment.__name__}.{name}: parameter {parameter.name!r} needs a type annotation of its own "
                "(*args and **kwargs cannot be tool arguments)"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    if not fields:
        # A FastAPI route without a body parameter never looks at the body.
        return lambda _: {}
    try:
        model = create_model(f"{name}_arguments", __config__=ConfigDict(from_attributes=True), **fields)
    except PydanticUserError as error:
        raise ConfigError(f"tool {environment.__name__}.{name}: {error}") from error

    def validate(arguments: Any) -> dict[str, Any]:
        try:
            if arguments is None:
                # Gym's agent sends JSON null as a request without a body.
                raise _RefusedError(_detail([{"type": "missing", "loc": (), "msg": "Field required", "input": None}]))
            parsed = model.model_validate(arguments)
        except ValidationError as error:
            raise _RefusedError(_detail(error.errors(include_url=False))) from error
        return {field: getattr(parsed, field) for field in fields}

    return validate


def _detail(errors: Any) -> str:
    located = [error | {"loc": ("body", *error["loc"])} for error in errors]
    return to_json({"detail": located}, fallback=lambda _: {}).decode()


def _function(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"name": name, "parameters": parameters, "strict": True, "type": "function", "description": ""}
