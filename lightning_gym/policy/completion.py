"""A generation in OpenAI's words: the message with its tool calls and token ids, logprobs, usage."""

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.engine import Generation

_CARRIED = ("metadata", "user")
"""Fields that are their sender's own and come back as they went."""


class TokenLogprob(msgspec.Struct, gc=False):
    """One entry of ``logprobs.content``. No dictionary: there is one a sampled token, and garbage collection counts."""

    token: str
    logprob: float
    bytes: None = None
    top_logprobs: tuple[()] = ()


def message_of(chat: ChatFormat, number: int, body: Mapping[str, Any], generation: Generation) -> dict[str, Any]:
    """The assistant's message as an agent sees it.

    Args:
        chat: reads the turn.
        number: the call's own; ids of its tool calls are made from it.
        body: the request.
        generation: what was sampled.
    """
    parsed = chat.parse(generation.token_ids, body)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        message["reasoning_content"] = message["reasoning"] = parsed.reasoning
    calls = parsed.tool_calls[:1] if body.get("parallel_tool_calls") is False else parsed.tool_calls
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call-{number}-{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(calls)
        ]
    return message


def chat_completion(
    chat: ChatFormat,
    number: int,
    body: Mapping[str, Any],
    message: dict[str, Any],
    prompt_ids: list[int],
    generation: Generation,
    *,
    model: str,
) -> dict[str, Any]:
    """A chat completion: `message` with the whole token bundle on it."""
    finish_reason = generation.finish_reason
    if finish_reason == "stop" and "tool_calls" in message:
        finish_reason = "tool_calls"
    bundle = {
        wire.PROMPT_TOKEN_IDS: prompt_ids,
        wire.GENERATION_TOKEN_IDS: generation.token_ids,
        wire.GENERATION_LOG_PROBS: generation.logprobs,
    }
    choice = {"index": 0, "finish_reason": finish_reason, "message": message | bundle}
    if body.get("logprobs"):
        names = _token_names(chat, body, generation)
        choice["logprobs"] = {"content": list(map(TokenLogprob, names, generation.logprobs))}
    return _completion(number, body, "chat.completion", model, choice, len(prompt_ids), generation)


def text_completion(
    chat: ChatFormat, number: int, body: Mapping[str, Any], prompt_ids: list[int], generation: Generation, *, model: str
) -> dict[str, Any]:
    """A text completion, with the ids where vLLM puts them."""
    choice = {
        "index": 0,
        "text": chat.decode(chat.words(generation.token_ids)),
        "finish_reason": generation.finish_reason,
        "prompt_token_ids": prompt_ids,
        "token_ids": generation.token_ids,
        "logprobs": {
            "tokens": _token_names(chat, body, generation),
            "token_logprobs": generation.logprobs,
            "top_logprobs": None,
            "text_offset": None,
        },
    }
    return _completion(number, body, "text_completion", model, choice, len(prompt_ids), generation)


def _completion(
    number: int,
    body: Mapping[str, Any],
    kind: str,
    model: str,
    choice: dict[str, Any],
    num_prompt: int,
    generation: Generation,
) -> dict[str, Any]:
    num_sampled = len(generation.token_ids)
    carried = {key: body[key] for key in _CARRIED if body.get(key) is not None}
    return carried | {
        "id": f"cmpl-{number}",
        "object": kind,
        "created": int(time.time()),
        "model": asked if isinstance(asked := body.get("model"), str) else model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
        },
        "weight_version": generation.weight_version,
    }


def _token_names(chat: ChatFormat, body: Mapping[str, Any], generation: Generation) -> list[str]:
    """Sampled tokens as logprobs list them: text, or vLLM's ``token_id:7`` where the client wants ids."""
    if body.get("return_tokens_as_token_ids"):
        return [f"token_id:{token_id}" for token_id in generation.token_ids]
    return [chat.decode([token_id]) for token_id in generation.token_ids]
