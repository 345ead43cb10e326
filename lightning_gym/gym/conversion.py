"""Responses items to chat messages and back, as NeMo Gym 0.4.0 converts them.

Its defects are kept, because a policy endpoint has to live with them: the token ids of one assistant turn cling to a
later one that has none, and an assistant turn without text and tool calls is left out of the history.

Source: nemo-gym 0.4.0, ``nemo_gym/responses_converter.py`` and
``responses_api_models/vllm_model/app.py: _preprocess_chat_completion_create_params``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from lightning_gym.gym.wire import (
    EXTRA_BODY,
    GENERATION_LOG_PROBS,
    GENERATION_TOKEN_IDS,
    PROMPT_TOKEN_IDS,
    TOKEN_BUNDLE,
)

Json = dict[str, Any]

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
# Every other key of responses_create_params is silently lost on the way to the policy.
_PASSED_ON = (
    "metadata", "parallel_tool_calls", "service_tier", "store", "stream", "temperature", "tool_choice", "top_p", "user",
)  # fmt: skip


def chat_request(params: Mapping[str, Any], items: Iterable[Mapping[str, Any]], *, model: str) -> Json:
    """The body of ``POST /v1/chat/completions``.

    Args:
        params: the keys of ``responses_create_params`` that the row sets, explicit nulls included.
        items: the conversation so far.
        model: replaces whatever model the row asks for.
    """
    body: Json = {"messages": chat_messages(items)} | {key: params[key] for key in _PASSED_ON if key in params}
    if params.get("max_output_tokens") is not None:
        body["max_tokens"] = params["max_output_tokens"]
    if params.get("tools"):
        body["tools"] = [_chat_tool(tool) for tool in params["tools"]]
    # An explicit null fails here, as it does in Gym.
    metadata = params.get("metadata", {})
    if template_kwargs := json.loads(metadata.get("chat_template_kwargs", "{}")):
        body["chat_template_kwargs"] = template_kwargs
    body |= {"model": model, "logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}
    return json.loads(metadata.get(EXTRA_BODY, "{}")) | body


def chat_messages(items: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Responses items as chat messages: what one assistant turn left behind becomes one message."""
    draft = _Draft()
    for item in items:
        kind = item.get("type") or ("message" if item.get("role") else None)
        if kind == "message":
            draft.add_message(item)
        elif kind == "reasoning":
            draft.text += _think(part["text"] for part in item["summary"] or ())
        elif kind == "function_call":
            function = {"arguments": item["arguments"], "name": item["name"]}
            draft.tool_calls.append({"id": item["call_id"], "function": function, "type": "function"})
        elif kind == "function_call_output":
            draft.flush()
            message = {"content": item["output"], "role": "tool", "tool_call_id": item["call_id"]}
            draft.messages.append(message)
        else:
            raise NotImplementedError(f"Unsupported message type: {item}")
        if item.get(PROMPT_TOKEN_IDS):
            draft.bundle = {key: item[key] for key in TOKEN_BUNDLE}
    draft.flush()
    return draft.messages


class _Draft:
    """The messages so far, and the assistant turn being put together."""

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self.text = ""
        self.tool_calls: list[Json] = []
        self.bundle: Json = {}

    def add_message(self, item: Mapping[str, Any]) -> None:
        role, content = item["role"], item["content"]
        if role == "assistant":
            self.text += content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        elif role in ("user", "system", "developer"):
            self.flush()
            parts = content if isinstance(content, str) else [_chat_part(part) for part in content]
            self.messages.append({"content": parts, "role": role})
        else:
            raise NotImplementedError(f"Unrecognized role for message: `{role}`")

    def flush(self) -> None:
        if not (self.text or self.tool_calls):
            return
        # 0.4.0 never resets the bundle, so it goes out again with a later turn that brought none.
        message: Json = {"role": "assistant", "content": None, "tool_calls": self.tool_calls} | self.bundle
        if self.text:
            thoughts, message["content"] = _split_thinking(self.text)
            if thoughts:
                message |= {"reasoning_content": thoughts[0], "reasoning": thoughts[0]}
        self.messages.append(message)
        self.text, self.tool_calls = "", []


def response_items(message: Mapping[str, Any]) -> list[Json]:
    """The Responses items of one chat completion message; the token bundle goes on the last of them."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    thoughts, text = _split_thinking((_think([reasoning]) if reasoning else "") + (message.get("content") or ""))
    tool_calls = message.get("tool_calls") or ()
    items: list[Json] = []
    if thoughts:
        summary = [{"text": thought, "type": "summary_text"} for thought in thoughts]
        items.append({"id": f"rs_{uuid4().hex}", "summary": summary, "type": "reasoning", "encrypted_content": None})
    if text or not (thoughts or tool_calls):
        items.append(_message_item(text))
    items.extend(_function_call_item(call) for call in tool_calls)
    if PROMPT_TOKEN_IDS in message:
        items[-1] |= {key: message[key] for key in TOKEN_BUNDLE} | {"routed_experts": message.get("routed_experts")}
    return items


def bundle_from_logprobs(logprobs: Mapping[str, Any], prompt_token_ids: list[int]) -> Json:
    """The token bundle of a completion that brought ``"token_id:N"`` logprobs instead."""
    content = logprobs["content"]
    return {
        PROMPT_TOKEN_IDS: prompt_token_ids,
        GENERATION_TOKEN_IDS: [int(entry["token"].removeprefix("token_id:")) for entry in content],
        GENERATION_LOG_PROBS: [entry["logprob"] for entry in content],
    }


def _message_item(text: str) -> Json:
    content = [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}]
    identity = f"msg_{uuid4().hex}"
    return {"id": identity, "content": content, "role": "assistant", "status": "completed", "type": "message"}


def _function_call_item(call: Mapping[str, Any]) -> Json:
    function, identity = call["function"], call["id"]
    return {
        "arguments": function["arguments"],
        "call_id": identity,
        "name": function["name"],
        "type": "function_call",
        "id": identity,
        "status": "completed",
    }


def _chat_part(part: Mapping[str, Any]) -> Json:
    if part["type"] == "input_text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "input_image":
        url = {"url": part.get("image_url", ""), "detail": part.get("detail", "auto")}
        return {"type": "image_url", "image_url": url}
    raise NotImplementedError(f"Unsupported part param type: {part['type']}")


def _chat_tool(tool: Mapping[str, Any]) -> Json:
    function = {key: value for key, value in tool.items() if key not in ("type", "strict")}
    return {"type": "function", "function": function}


def _think(texts: Iterable[str]) -> str:
    return "".join(f"<think>{text}</think>" for text in texts if text)


def _split_thinking(text: str) -> tuple[list[str], str]:
    if "<think>" not in text:
        return [], text
    return _THINK.findall(text), _THINK.sub("", text)
