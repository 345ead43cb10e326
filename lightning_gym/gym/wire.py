"""NeMo Gym's JSON, translated once.

The only module that spells Gym's key names. Checked against nemo-gym 0.4.0 (``nemo_gym/openai_utils.py``,
``nemo_gym/responses_converter.py``, ``responses_api_agents/simple_agent/app.py``).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from lightning_gym.errors import ConfigError
from lightning_gym.gym.number_arrays import NumberArray, array_at, cut_arrays, opening_of
from lightning_gym.rollout import Failure, FailureKind, Rollout, SamplingProfile

# The token bundle: on ``choices[0].message`` of a chat completion, and on the last Responses item of a model call.
PROMPT_TOKEN_IDS = "prompt_token_ids"
GENERATION_TOKEN_IDS = "generation_token_ids"
GENERATION_LOG_PROBS = "generation_log_probs"
TOKEN_BUNDLE = (PROMPT_TOKEN_IDS, GENERATION_TOKEN_IDS, GENERATION_LOG_PROBS)

# A dataset row.
RESPONSES_CREATE_PARAMS = "responses_create_params"
AGENT_REF = "agent_ref"
EXTRA_BODY = "extra_body"
"""``metadata[EXTRA_BODY]`` is a JSON object in a string; Gym's model server merges it into every chat request."""

ROLLOUT_ID = "lightning_gym_rollout_id"
"""Our key inside ``metadata.extra_body``: which rollout a chat request belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The token ids of one model call as they came back over the wire: unchecked, lists or `NumberArray`s."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]

    @property
    def is_whole(self) -> bool:
        """Whether there are ids of both kinds and a logprob for every sampled one."""
        return bool(self.prompt_ids) and 0 < len(self.token_ids) == len(self.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A ``/run`` response, translated."""

    reward: float
    prompt: list[dict[str, Any]]
    """Input messages as Gym echoes them."""
    output: list[dict[str, Any]]
    """Responses items after the prompt, without token ids."""
    bundles: list[Bundle]
    """One a model call that kept any of its ids, in order."""
    truncated: bool
    context_overflow: bool = False
    """The last answer is Gym's stand-in for a prompt that did not fit: empty, cut, and without ids."""
    masked: bool = False
    """The environment asks to leave the rollout out of the loss."""
    invalid_tool_calls: int = 0
    """Answers with a tool-call tag in their text."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Numeric fields that the environment returned beside the reward."""
    reward_components: dict[str, float] = field(default_factory=dict[str, float])
    """What the reward is made of, by name."""


def run_request(row: Mapping[str, Any], rollout_id: str | None, profile: SamplingProfile, seed: int) -> dict[str, Any]:
    """The body of ``POST /run``: the row, sampled as `profile` says, carrying its rollout id to our endpoint.

    The row's own ``max_output_tokens`` holds where it is smaller. Without a rollout id the policy may be anyone's.

    Raises:
        ConfigError: the row has an image.
    """
    params = dict(row[RESPONSES_CREATE_PARAMS])
    _refuse_images(params.get("input"))
    params["temperature"] = profile.temperature
    params["top_p"] = profile.top_p
    limits = [limit for limit in (params.get("max_output_tokens"), profile.max_output_tokens) if limit is not None]
    if limits:
        params["max_output_tokens"] = min(limits)
    metadata = dict(params.get("metadata", {}))
    extra_body = json.loads(metadata.get(EXTRA_BODY, "{}"))
    extra_body |= {"top_k": profile.top_k, "seed": seed}
    if rollout_id is not None:
        extra_body[ROLLOUT_ID] = rollout_id
    params["metadata"] = metadata | {EXTRA_BODY: json.dumps(extra_body)}
    return {**row, RESPONSES_CREATE_PARAMS: params}


def _refuse_images(items: Any) -> None:
    for index, item in enumerate(items if isinstance(items, list) else ()):
        for part in (item.get("content") if isinstance(item, Mapping) else None) or ():
            if isinstance(part, Mapping) and "image" in str(part.get("type")):
                raise ConfigError(
                    f"input item {index} has a part of type {part['type']!r}; the policy reads text only: leave the "
                    "task out, or say in words what the image shows"
                )


_OPENING = opening_of(TOKEN_BUNDLE)


def decode_run_response(content: bytes) -> Any:
    """The JSON of a ``/run``, the token arrays of its output left as `NumberArray`s.

    Raises:
        msgspec.DecodeError: it is not JSON.
    """
    text, arrays = cut_arrays(content, _OPENING)
    try:
        body = msgspec.json.decode(text)
        for item in body["response"]["output"]:
            for key in TOKEN_BUNDLE:
                if key in item:
                    item[key] = array_at(item[key], arrays)
    except (msgspec.DecodeError, TypeError, LookupError, AttributeError):  # `read_run_response` says what is wrong
        return msgspec.json.decode(content)
    return body


_FAILURE_CLASS = "_ng_failure_class"
_FAILURE_KINDS = {
    "transient": FailureKind.INFRA,
    "kill_shaped": FailureKind.INFRA,
    "timeout_exceeded": FailureKind.TIMEOUT,
}
"""Gym's classes that mean one of ours; what else fails is the environment's. Those it calls terminal are too."""


def read_failure(body: Any) -> Failure | None:
    """The failure that a ``/run`` with status 200 reports in place of a rollout, if it does."""
    reported = body.get(_FAILURE_CLASS) if isinstance(body, Mapping) else None
    if not reported:
        return None
    kind = _FAILURE_KINDS.get(str(reported), FailureKind.ENVIRONMENT)
    if kind is FailureKind.INFRA and body.get("_ng_failure_terminal"):
        kind = FailureKind.ENVIRONMENT
    said = next((body[key] for key in ("error_message", "failure_reason", "error") if body.get(key)), "no reason given")
    return Failure(kind=kind, message=f"Gym reports `{reported}`: {said}")


def read_run_response(body: Any) -> Played:
    """Translate the JSON of a successful ``/run``.

    Raises:
        ValueError: it does not have Gym's shape; says which key is missing or wrong.
    """
    response = body.get("response") if isinstance(body, Mapping) else None
    items = response.get("output") if isinstance(response, Mapping) else None
    if not isinstance(items, list):
        raise ValueError(f"expected `response.output` (a list) in the /run response, got keys {_keys(body)}")  # noqa: TRY004  a malformed document, whatever the wrong type was
    reward = body.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ValueError(f"expected a finite number as `reward` in the /run response, got {reward!r}")
    for where, item in enumerate(items):
        if not isinstance(item, dict):  # what JSON makes; a check against an ABC costs more than reading the item
            raise ValueError(f"output item {where} is a {type(item).__name__}, expected an object")  # noqa: TRY004  as above
    bundles = [_bundle(item) for item in items]
    truncated = bool(response.get("incomplete_details"))  # type: ignore[union-attr]  items came from it
    return Played(
        reward=float(reward),
        prompt=_prompt(body.get(RESPONSES_CREATE_PARAMS)),
        output=[_readable(item) for item in items],
        bundles=[bundle for bundle in bundles if bundle],
        truncated=truncated,
        context_overflow=bool(items) and truncated and bundles[-1] is None and _is_empty_answer(items[-1]),
        masked=_is_masked(body),
        invalid_tool_calls=sum(
            any(tag in text for tag in _TOOL_TAGS) for item in items for text in _answer_texts(item)
        ),
        metrics=_numbers(body),
        reward_components=_numbers(body.get("reward_components")),
    )


def _prompt(params: Any) -> list[dict[str, Any]]:
    said = params.get("input") if isinstance(params, Mapping) else None
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    return [_readable(item) for item in said or () if isinstance(item, dict)]


def _bundle(item: Mapping[str, Any]) -> Bundle | None:
    """What an item has of the three; ``None`` where it has nothing, or says that nothing was sampled."""
    prompt_ids, token_ids, logprobs = [item.get(key) for key in TOKEN_BUNDLE]
    if not logprobs and (not token_ids if prompt_ids is None else token_ids is not None and not token_ids):
        return None
    arrays: list[Any] = [
        value if isinstance(value, list | NumberArray) else [] for value in (prompt_ids, token_ids, logprobs)
    ]
    return Bundle(prompt_ids=arrays[0], token_ids=arrays[1], logprobs=arrays[2])


def _numbers(values: Any) -> dict[str, float]:
    """The numeric fields of an object, its reward and Gym's own fields excepted."""
    return {
        key: float(value)
        for key, value in (values.items() if isinstance(values, Mapping) else ())
        if key != "reward"
        and not key.startswith("_")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _is_masked(body: Mapping[str, Any]) -> bool:
    """Environments say it on the result; Gym's software-engineering agents in the settings that they return with it."""
    places = (body, body.get("instance_config"))
    return any(isinstance(place, Mapping) and bool(place.get("mask_sample")) for place in places)


_TOOL_TAGS = ("<tool_call>", "</tool_call>", "<function_call>", "<function=", "<|python_tag|>", "[TOOL_CALLS]")


def _answer_texts(item: Mapping[str, Any]) -> list[str]:
    """The text of an item that the policy wrote as a message."""
    if item.get("type") != "message" or item.get("role", "assistant") != "assistant":
        return []
    content = item.get("content")
    if isinstance(content, str):
        return [content]
    parts = cast("list[Any]", content) if isinstance(content, list) else []
    return [str(part.get("text") or "") for part in parts if isinstance(part, dict)]


def _is_empty_answer(item: Mapping[str, Any]) -> bool:
    return item.get("type") == "message" and not any(_answer_texts(item)) and item.get("role") == "assistant"


_NOT_READABLE = frozenset((*TOKEN_BUNDLE, "routed_experts"))


def _readable(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in _NOT_READABLE and value is not None}


def _keys(body: Any) -> str:
    return ", ".join(sorted(body)) if isinstance(body, Mapping) else type(body).__name__


def aggregate_request(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The body of ``POST /aggregate_metrics``: the rollouts of one agent that were rewarded."""
    return {
        "verify_responses": [
            {
                **rollout.metrics,
                "_ng_task_index": rollout.group_id,
                "_ng_rollout_index": rollout.attempt,
                "reward": rollout.reward,
                "response": {"usage": None},
            }
            for rollout in rollouts
            if rollout.reward is not None
        ]
    }


def read_aggregate_response(body: Any) -> dict[str, float]:
    """The agent's metrics, by Gym's names: ``mean/reward`` and whatever its environment adds."""
    return _numbers(body.get("agent_metrics")) if isinstance(body, Mapping) else {}


def input_messages(value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row's ``input`` as chat messages, as Gym's model server would send the first turn.

    Raises:
        ConfigError: it has an image.
    """
    _refuse_images(value)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return [{"role": item["role"], "content": _chat_content(item["content"])} for item in value if "role" in item]


def _chat_content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part["text"]} if "text" in part else part for part in content]


def chat_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A row's Responses tools as chat-completion tools; Gym drops ``strict``."""
    if not tools:
        return None
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key not in ("type", "strict")}}
        for tool in tools
    ]
