"""The agent of the embedded Gym: plays one dataset row to its reward, as NeMo Gym 0.4.0's ``simple_agent`` does.

Source: nemo-gym 0.4.0, ``responses_api_agents/simple_agent/app.py`` and ``nemo_gym/openai_utils.py``.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NotRequired
from uuid import uuid4

import msgspec
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from lightning_gym.gym.conversion import Json
from lightning_gym.gym.environments import Environment
from lightning_gym.gym.policy_client import PolicyClient, gym_server
from lightning_gym.gym.wire import RESPONSES_CREATE_PARAMS

_LOG = logging.getLogger(__name__)


class FunctionTool(TypedDict):
    """A tool, as a dataset row declares it. Gym insists on `strict` being there, and so do we."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool | None
    type: Literal["function"]
    description: NotRequired[str | None]


class CreateParams(BaseModel):
    """``responses_create_params`` of a row, with the defaults that Gym's echo shows; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid")

    background: bool | None = None
    include: list[str] | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    model: str | None = None
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: bool | None = None
    temperature: float | None = None
    text: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[FunctionTool] = []
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    stream: Literal[False] | None = None

    def echo(self) -> Json:
        """The parameters as a ``/run`` result repeats them: defaults, nulls and item types filled in."""
        echo = self.model_dump()
        if isinstance(self.input, list):
            echo["input"] = [_filled_in(item) for item in self.input]
        return echo


class RunRequest(BaseModel):
    """A dataset row; what else it holds is the environment's business."""

    model_config = ConfigDict(extra="allow")

    responses_create_params: CreateParams


class Agent:
    """Plays rows of one environment with one policy."""

    def __init__(self, environment: type[Environment], policy: PolicyClient, *, max_steps: int) -> None:
        self.environment = environment
        self.name = environment.agent_name()
        self.max_steps = max_steps
        self._policy = policy
        self._server = f"SimpleAgent___{self.name}"
        self._resources = f"{environment.__name__}___{environment.name}"

    async def run(self, row: Mapping[str, Any]) -> Json:
        """Play `row` and score it.

        Raises:
            pydantic.ValidationError: the row is no valid request.
            TaskError: the environment refuses the row.
            InnerServerError: everything else; its content is what ``/run`` answers with status 500.
        """
        params = RunRequest.model_validate(row).responses_create_params
        with gym_server(self._server):
            environment = self.start(row)
            response = await self.respond(params, environment)
            with gym_server(self._resources):
                reward = float(await environment.score(response))
                if not math.isfinite(reward):
                    raise ValueError(f"{type(environment).__name__}.verify: expected a finite reward, got {reward}")
                report = environment.report()
        return {RESPONSES_CREATE_PARAMS: params.echo(), "response": response, **report, "reward": reward}

    def start(self, row: Mapping[str, Any]) -> Environment:
        """A fresh environment for `row`."""
        with gym_server(self._resources):
            return self.environment(row)

    async def respond(self, params: CreateParams, environment: Environment) -> Json:
        """The whole conversation as one Response: model calls and tool calls in turn until the model only talks."""
        given = params.model_dump(exclude_unset=True)
        prompt = params.input if isinstance(params.input, list) else [{"role": "user", "content": params.input}]
        output: list[Json] = []
        usage: Json | None = None
        incomplete_reason: str | None = None
        with gym_server(self._server):
            for _ in range(self.max_steps):
                turn = await self._policy.complete(given, prompt + output)
                output += turn.items
                usage = _add_usage(usage, turn.usage)
                incomplete_reason = turn.incomplete_reason
                calls = [item for item in turn.items if item["type"] == "function_call"]
                talked = any(item["type"] == "message" for item in turn.items)
                if incomplete_reason or (talked and not calls):
                    break
                output += [await self._tool_output(environment, call) for call in calls]
        incomplete = {"reason": incomplete_reason} if incomplete_reason else None
        return self._response(params, output, usage=usage, incomplete=incomplete)

    async def _tool_output(self, environment: Environment, call: Mapping[str, Any]) -> Json:
        try:
            arguments = json.loads(call["arguments"])
        except (json.JSONDecodeError, TypeError) as error:
            return _output_item(call, json.dumps({"error": f"Invalid tool call arguments: {error!r}"}))
        sent = _through_json(arguments)
        try:
            return _output_item(call, await environment.answer(call["name"], sent))
        except Exception as error:  # noqa: BLE001 (the code of the user)
            # What a tool raises is told to the agent, not to the caller of /run.
            _LOG.warning("%s: tool %r", self._resources, call["name"], exc_info=True)
            return _output_item(call, to_json(repr(error)).decode())

    def _response(self, params: CreateParams, output: list[Json], *, usage: Json | None, incomplete: Any) -> Json:
        return {
            "id": f"resp_{uuid4().hex}",
            "created_at": float(int(time.time())),
            "error": None,
            "incomplete_details": incomplete,
            "instructions": params.instructions,
            "metadata": params.metadata,
            "model": self._policy.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": params.parallel_tool_calls,
            "temperature": params.temperature,
            "tool_choice": params.tool_choice,
            "tools": [{"description": None} | tool for tool in params.tools],
            "top_p": params.top_p,
            "background": params.background,
            "conversation": None,
            "max_output_tokens": params.max_output_tokens,
            "max_tool_calls": params.max_tool_calls,
            "previous_response_id": params.previous_response_id,
            "prompt": params.prompt,
            "prompt_cache_key": None,
            "reasoning": params.reasoning,
            "safety_identifier": None,
            "service_tier": params.service_tier,
            "status": None,
            "text": params.text,
            "top_logprobs": params.top_logprobs,
            "truncation": params.truncation,
            "usage": usage,
            "user": params.user,
        }


def _through_json(arguments: Any) -> Any:
    """Tool arguments as they leave Gym's JSON encoder (orjson).

    NaN becomes null; a lone surrogate or an integer beyond 64 bits cannot be sent, and the rollout fails.
    """
    pending = [arguments]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise TypeError("Integer exceeds 64-bit range")
    return msgspec.json.decode(msgspec.json.encode(arguments))


def _output_item(call: Mapping[str, Any], text: str) -> Json:
    return {"call_id": call["call_id"], "output": text, "type": "function_call_output", "id": None, "status": None}


def _add_usage(total: Json | None, usage: Mapping[str, int] | None) -> Json | None:
    if not usage:
        return total
    prompt, generated = usage["prompt_tokens"], usage["completion_tokens"]
    if total:
        prompt, generated = prompt + total["input_tokens"], generated + total["output_tokens"]
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
    }


def _filled_in(item: Mapping[str, Any]) -> Json:
    match item.get("type", "message"):
        case "function_call" | "function_call_output":
            return {"id": None, "status": None, **item}
        case "reasoning":
            return {"encrypted_content": None, **item}
        case kind:
            return {**item, "type": kind}
