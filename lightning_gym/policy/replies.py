"""What the endpoint says in HTTP's terms: bodies in, JSON out, and refusals that Gym takes the right way.

Gym treats a 400 that says "context length" or "max_tokens" as an empty answer and scores it, so only a true overflow
says so; it retries a 500 three times and a 503 for ever, so what would fail again is a plain 4xx.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lightning_gym.errors import EngineDeadError, PromptTooLongError
from lightning_gym.policy.retries import ClientGoneError

_MAX_BODY_BYTES = 64 << 20


class Refusal(Exception):  # noqa: N818  it is an answer, not an accident
    """A request that gets a 4xx."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def body_of(request: Request) -> bytes:
    """The request's bytes; refused above the limit."""
    length = int(request.headers.get("content-length", 0))
    if length > _MAX_BODY_BYTES:
        raise Refusal(413, f"the request has {length} bytes; at most {_MAX_BODY_BYTES} are read")
    return await request.body()


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that `raw` spells."""
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise Refusal(400, f"the request body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"expected a JSON object, got {type(body).__name__}")
    return body


def json_reply(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def reply_to(error: Exception) -> Response:
    """The refusal that an exception stands for."""
    match error:
        case Refusal():
            return error_reply(error.status, str(error))
        case PromptTooLongError():
            return error_reply(400, str(error), overflow=True)
        case EngineDeadError():
            return error_reply(410, f"this policy is gone: {error}")
        case ClientGoneError():
            return error_reply(499, "the client closed the connection")
        case _:
            return error_reply(400, f"the engine refused the request: {error}")


def error_reply(status: int, message: str, *, overflow: bool = False) -> Response:
    """An error in OpenAI's shape; says the overflow words only where it is one."""
    if not overflow:  # a request's or an engine's own words must not be taken for one
        message = message.replace("context length", "context-length").replace("max_tokens", "max-tokens")
    return json_reply({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)
