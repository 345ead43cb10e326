"""What the endpoint says in HTTP's terms: bodies in, JSON out, and refusals that Gym takes the right way.

Gym treats a 400 that says "context length" or "max_tokens" as an empty answer and scores it, so only a true overflow
says so; it retries a 500 three times and a 503 for ever, so what would fail again is a plain 4xx.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lightning_gym.errors import EngineDeadError, PromptTooLongError, RequestAbortedError
from lightning_gym.gym.number_arrays import as_written
from lightning_gym.policy.retries import ClientGoneError

MAX_BODY_BYTES = 64 << 20
_MAX_MESSAGE_CHARS = 1000
_CLOSE = {"connection": "close"}  # a body was left unread


class Refusal(Exception):  # noqa: N818  it is an answer, not an accident
    """A request that gets a 4xx, and headers that go with it."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def unauthorized() -> Refusal:
    """The request's token is not ours; its body is not read."""
    return Refusal(401, "the bearer token is missing or wrong", {"www-authenticate": "Bearer"} | _CLOSE)


async def body_of(headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> bytes:
    """The bytes of an ASGI request; refused above `MAX_BODY_BYTES`, without reading on.

    Raises:
        ClientGoneError: the connection closed in the middle of it.
    """
    declared = int(headers.get(b"content-length", 0))  # the server's parser has seen to it that this is a number
    body = bytearray()
    more = True
    while more:
        if max(declared, len(body)) > MAX_BODY_BYTES:
            raise Refusal(413, f"the request has more than the {MAX_BODY_BYTES} bytes that are read", _CLOSE)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that `raw` spells."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the request body is not JSON that is understood here: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"expected a JSON object, got {type(body).__name__}")
    return body


def text_reply(text: str, media_type: str) -> Reply:
    """Plain text."""
    return _reply(200, text.encode(), {"content-type": media_type})


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """`value` as JSON."""
    body = msgspec.json.encode(value, enc_hook=as_written)
    return _reply(status, body, {"content-type": "application/json", **(headers or {})})


def _reply(status: int, body: bytes, headers: Mapping[str, str]) -> Reply:
    named = (*headers.items(), ("content-length", str(len(body))))
    return Reply(status, body, tuple((name.encode(), value.encode()) for name, value in named))


def reply_to(error: Exception) -> Reply:
    """The refusal that an exception stands for."""
    match error:
        case Refusal():
            return error_reply(error.status, str(error), error.headers)
        case PromptTooLongError():
            return error_reply(400, str(error), overflow=True)
        case RequestAbortedError():
            return error_reply(503, str(error), {"retry-after": "1"})
        case EngineDeadError():
            return error_reply(410, f"this policy is gone: {error}")
        case ClientGoneError():
            return error_reply(499, "the client closed the connection")
        case _:
            return error_reply(400, f"the engine refused the request: {error}")


def error_reply(
    status: int, message: str, headers: Mapping[str, str] | None = None, *, overflow: bool = False
) -> Reply:
    """An error in OpenAI's shape; says the overflow words only where it is one."""
    if not overflow:  # a request's or an engine's own words must not be taken for one
        message = message.replace("context length", "context-length").replace("max_tokens", "max-tokens")
    error = {"message": message[:_MAX_MESSAGE_CHARS], "type": "invalid_request_error", "code": status}
    return json_reply({"error": error}, status, headers)
