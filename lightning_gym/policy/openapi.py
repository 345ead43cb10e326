"""The endpoint's own description, OpenAPI 3.1: what a client may send, what comes back, and every status there is.

Small on purpose: objects are open, since unknown fields are tolerated, and what is listed is what is looked at.
"""

from typing import Any

from lightning_gym.gym import wire

Schema = dict[str, Any]


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _array(items: Schema, min_items: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": min_items}


_INT: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_IDS = _array(_COUNT)
_LOGPROBS = _array({"type": "number", "maximum": 0})
_LIMIT: Schema = {"type": ["integer", "null"], "minimum": 1}
_PINNED: Schema = {"type": ["number", "null"], "description": "the profile's value, or left out"}
_OPEN: Schema = {"type": ["object", "null"]}
_CALL = _object("function", id=_TEXT, type={"const": "function"}, function=_object("name", name=_TEXT))

_SAMPLING: dict[str, Schema] = {
    "model": _TEXT | {"description": "`<name>-eval` has the eval profile, where no rollout is named"},
    wire.ROLLOUT_ID: _TEXT | {"description": "an open rollout, whose profile and seed then hold"},
    "temperature": _PINNED,
    "top_p": _PINNED,
    "top_k": _PINNED,
    "max_tokens": _LIMIT,
    "max_completion_tokens": _LIMIT,
    "seed": {"type": ["integer", "null"], "minimum": 0, "maximum": (1 << 63) - 1},
    "n": {"enum": [1, None]},
    "stream": {"enum": [False, None]},
    "metadata": _OPEN | {"description": "comes back as it went"},
    "user": {"type": ["string", "null"], "description": "comes back as it went"},
    "return_tokens_as_token_ids": {
        "type": ["boolean", "null"],
        "description": "names tokens `token_id:7` in `logprobs`",
    },
}

_MESSAGE = _object(
    "role",
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content={
        "anyOf": [{"type": ["string", "null"]}, _array(_object("type", "text", type={"const": "text"}, text=_TEXT))]
    },
    tool_calls={"anyOf": [{"type": "null"}, _array(_CALL)]},
    tool_call_id={"type": ["string", "null"]},
)
_TOOL = _object("type", "function", type={"const": "function"}, function=_object("name", name=_TEXT))
_CONVERSATION: dict[str, Schema] = {
    "messages": _array(_MESSAGE, 1),
    "tools": {"anyOf": [{"type": "null"}, _array(_TOOL)]},
    "chat_template_kwargs": _OPEN,
}

_USAGE = _object(
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
)
_BUNDLE = {
    wire.PROMPT_TOKEN_IDS: _IDS | {"description": "what the engine was fed"},
    wire.GENERATION_TOKEN_IDS: _IDS | {"description": "what it sampled, the turn's end included"},
    wire.GENERATION_LOG_PROBS: _LOGPROBS | {"description": "of the distribution that was sampled from, in nats"},
}
_ANSWERED = _object("role", "content", *_BUNDLE, role={"const": "assistant"}, **_BUNDLE)


def _completion(choice: Schema) -> Schema:
    version = _INT | {"description": "the optimizer step whose weights sampled this"}
    return _object(
        "id", "object", "created", "model", "choices", "usage", "weight_version",
        id=_TEXT, object=_TEXT, created=_INT, model=_TEXT, usage=_USAGE,
        choices=_array(choice, 1), weight_version=version,
    )  # fmt: skip


_CHAT_COMPLETION = _completion(
    _object(
        "index", "finish_reason", "message", finish_reason={"enum": ["stop", "length", "tool_calls"]}, message=_ANSWERED
    )
)
_COMPLETION = _completion(
    _object("index", "text", "token_ids", text=_TEXT, finish_reason={"enum": ["stop", "length"]}, token_ids=_IDS)
)
_ERROR = _object("error", error=_object("message", "type", "code", message=_TEXT, type=_TEXT, code=_INT))
_REFUSALS = {
    400: "malformed, or not supported; a prompt over the window, and nothing else, says `maximum context length`",
    401: "the bearer token is missing or wrong",
    410: "the rollout is over, or the policy is gone",
    413: "the body is too large",
    422: "a sampling parameter contradicts the profile",
    503: "the engine was paused; ask again",
}


def openapi_document() -> Schema:
    """The document.

    Example:
        >>> sorted(openapi_document()["paths"])[:3]
        ['/detokenize', '/health', '/metrics']
    """
    text_or_ids = {"anyOf": [_TEXT, _array(_COUNT, 1)]}
    counted = _object("tokens", "count", "max_model_len", tokens=_IDS, count=_COUNT, max_model_len=_COUNT)
    chat = _object(
        "messages",
        **_CONVERSATION,
        **_SAMPLING,
        logprobs={"type": ["boolean", "null"]},
        top_logprobs={"enum": [0, None]},
    )
    complete = _object("prompt", prompt=text_or_ids, **_SAMPLING, logprobs={"enum": [0, None]})
    to_count = {"anyOf": [_object("messages", **_CONVERSATION), _object("prompt", prompt=_TEXT)]}
    to_decode = _object("tokens", tokens=_array(_COUNT, 1))
    health = _object("status", "weight_version", status={"const": "ok"}, weight_version={"type": ["integer", "null"]})
    models = _object("object", "data", object={"const": "list"}, data=_array(_object("id", id=_TEXT), 1))
    return {
        "openapi": "3.1.0",
        "info": {"title": "lightning_gym: the policy that is being trained", "version": "1"},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/chat/completions": _post("One turn of a conversation", chat, _CHAT_COMPLETION),
            "/v1/completions": _post("A text or token ids, continued", complete, _COMPLETION),
            "/tokenize": _post("The ids that a completion would be fed", to_count, counted),
            "/detokenize": _post("The text of ids", to_decode, _object("prompt", prompt=_TEXT)),
            "/v1/models": {"get": _operation("The policy, by profile", models, (401,))},
            "/health": {"get": _operation("Whether there is somebody", health, ()) | {"security": []}},
            "/metrics": {"get": _operation("Counters for Prometheus", None, ()) | {"security": []}},
            "/openapi.json": {"get": _operation("This document", _object("openapi", "paths"), ()) | {"security": []}},
        },
    }  # fmt: skip


def _post(summary: str, request: Schema, answer: Schema) -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": request}}}
    return {"post": _operation(summary, answer, tuple(_REFUSALS)) | {"requestBody": body}}


def _operation(summary: str, answer: Schema | None, refusals: tuple[int, ...]) -> Schema:
    content = {"text/plain": {"schema": _TEXT}} if answer is None else {"application/json": {"schema": answer}}
    refused = {
        str(status): {"description": _REFUSALS[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in refusals
    }
    answered = {"200": {"description": summary, "content": content}}
    return {"summary": summary, "security": [{"token": []}], "responses": answered | refused}
