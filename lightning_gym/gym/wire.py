"""NeMo Gym's JSON, translated once.

The only module that spells Gym's key names. Checked against nemo-gym 0.4.0 (``nemo_gym/openai_utils.py``,
``nemo_gym/responses_converter.py``, ``responses_api_agents/simple_agent/app.py``).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_gym.rollout import SamplingProfile

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
    """The token ids of one model call as they came back over the wire."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A ``/run`` response, translated."""

    reward: float
    prompt: list[dict[str, Any]]
    """Input messages as Gym echoes them."""
    output: list[dict[str, Any]]
    """Responses items after the prompt, without token ids."""
    bundles: list[Bundle]
    """One a model call, in order."""
    truncated: bool
    metrics: dict[str, float]
    """Numeric fields that the environment returned beside the reward."""


def run_request(row: Mapping[str, Any], rollout_id: str, profile: SamplingProfile, seed: int) -> dict[str, Any]:
    """The body of ``POST /run``: the row, sampled as `profile` says, carrying its rollout id to our endpoint.

    The row's own ``max_output_tokens`` holds where it is smaller.
    """
    params = dict(row[RESPONSES_CREATE_PARAMS])
    params["temperature"] = profile.temperature
    params["top_p"] = profile.top_p
    limits = [limit for limit in (params.get("max_output_tokens"), profile.max_output_tokens) if limit is not None]
    if limits:
        params["max_output_tokens"] = min(limits)
    metadata = dict(params.get("metadata", {}))
    extra_body = json.loads(metadata.get(EXTRA_BODY, "{}"))
    extra_body |= {ROLLOUT_ID: rollout_id, "top_k": profile.top_k, "seed": seed}
    params["metadata"] = metadata | {EXTRA_BODY: json.dumps(extra_body)}
    return {**row, RESPONSES_CREATE_PARAMS: params}


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
    numbers = {
        key: float(value)
        for key, value in body.items()
        if key != "reward"
        and not key.startswith("_")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }
    for where, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ValueError(f"output item {where} is a {type(item).__name__}, expected an object")  # noqa: TRY004  as above
    params = body.get(RESPONSES_CREATE_PARAMS)
    prompt = (params.get("input") if isinstance(params, Mapping) else None) or []
    return Played(
        reward=float(reward),
        prompt=[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        output=[_readable(item) for item in items],
        bundles=[_bundle(item, where) for where, item in enumerate(items) if item.get(GENERATION_TOKEN_IDS)],
        truncated=bool(response.get("incomplete_details")),  # type: ignore[union-attr]  items came from it
        metrics=numbers,
    )


def _bundle(item: Mapping[str, Any], where: int) -> Bundle:
    match [item.get(key) for key in TOKEN_BUNDLE]:
        case [list(prompt_ids), list(token_ids), list(logprobs)] if prompt_ids and len(token_ids) == len(logprobs):
            return Bundle(prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs)
        case found:
            counts = {key: len(v) if isinstance(v, list) else v for key, v in zip(TOKEN_BUNDLE, found, strict=True)}
            raise ValueError(f"output item {where} has an incomplete token bundle: {counts}")


_NOT_READABLE = frozenset((*TOKEN_BUNDLE, "routed_experts"))


def _readable(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in _NOT_READABLE and value is not None}


def _keys(body: Any) -> str:
    return ", ".join(sorted(body)) if isinstance(body, Mapping) else type(body).__name__


def input_messages(value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row's ``input`` as chat messages, as Gym's model server would send the first turn."""
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
