"""One model call of a rollout, over HTTP, with the retries of NeMo Gym 0.4.0.

Source: nemo-gym 0.4.0, ``responses_api_models/vllm_model/app.py: chat_completions``,
``nemo_gym/openai_utils.py: NeMoGymAsyncOpenAI`` and ``nemo_gym/server_utils.py: request``.
"""

import asyncio
import json
import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from lightning_gym.errors import TaskError
from lightning_gym.gym.conversion import Json, bundle_from_logprobs, chat_request, response_items
from lightning_gym.gym.wire import PROMPT_TOKEN_IDS

_LOG = logging.getLogger(__name__)

RETRY_DELAY_S = 0.5
SERVER_ERROR_TRIES = 3
_WAIT_STATUSES = frozenset((429, 502, 503, 504, 520))
_FINISH_REASONS = frozenset(("stop", "length", "tool_calls", "content_filter", "function_call"))
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_TOKENIZE_KEYS = ("model", "messages", "tools", "chat_template_kwargs")


class InnerServerError(Exception):
    """A server answered with an error; `content` is the body it sent."""

    def __init__(self, content: bytes, *, status: int = 500) -> None:
        super().__init__(content.decode(errors="replace"))
        self.content = content
        self.status = status


@contextmanager
def gym_server(name: str) -> Generator[None]:
    """Whatever goes wrong inside leaves as the 500 that Gym's server `name` answers its caller with.

    The body is a JSON string which quotes the body of the server further in, so the innermost cause survives, escaped
    once per hop.
    """
    try:
        yield
    except TaskError:
        # The row is at fault, and /run says so instead of hiding it in a 500.
        raise
    except Exception as error:
        text = repr(error)
        if isinstance(error, InnerServerError):
            text = f"Hit an exception in {name} calling an inner server: {error.content}"
        else:
            _LOG.warning("%s: %s", name, text, exc_info=True)
        raise InnerServerError(json.dumps(text, ensure_ascii=False).encode()) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one model call added to the conversation."""

    items: list[Json]
    """Responses items in the order reasoning, message, function calls."""
    incomplete_reason: str | None
    """``"max_output_tokens"`` where the answer was cut, or the prompt was too long to be answered at all."""
    usage: Json | None
    """Chat usage as the endpoint counted it."""


class PolicyClient:
    """Calls one OpenAI-compatible endpoint; `aclose` it."""

    def __init__(self, *, base_url: str, api_key: str, model: str) -> None:
        self.model = model
        self._chat_url = f"{base_url}/chat/completions"
        self._tokenize_url = f"{base_url.removesuffix('/v1')}/tokenize"
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        # Gym's client: no time limit, no cookies, and idle connections kept for 15 s. Keeping them for longer than
        # the endpoint does would lose a call to a closed connection, and half a second with it.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15.0),
            timeout=aiohttp.ClientTimeout(),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def aclose(self) -> None:
        await self._session.close()

    async def complete(self, params: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> Turn:
        """Ask for the next turn of the conversation `items`.

        Raises:
            InnerServerError: as Gym's model server would answer.
        """
        with gym_server("VLLMModel___policy_model"):
            request = chat_request(params, items, model=self.model)
            try:
                completion = await self._post(self._chat_url, request)
            except InnerServerError as error:
                if not _is_overflow(error):
                    raise
                return Turn(items=response_items({}), incomplete_reason=_INCOMPLETE["length"], usage=None)
            choice = completion["choices"][0]
            if choice["finish_reason"] not in _FINISH_REASONS:
                expected = ", ".join(sorted(_FINISH_REASONS))
                raise ValueError(f"finish_reason: expected one of {expected}, got {choice['finish_reason']!r}")
            message = choice["message"]
            if PROMPT_TOKEN_IDS not in message:
                message |= await self._fetch_bundle(request, choice.get("logprobs"))
            return Turn(
                items=response_items(message),
                incomplete_reason=_INCOMPLETE.get(choice["finish_reason"]),
                usage=completion.get("usage"),
            )

    async def _fetch_bundle(self, request: Json, logprobs: Any) -> Json:
        if not logprobs or logprobs.get("content") is None:
            raise RuntimeError(
                "`policy_model` requested per-token logprobs from vLLM (return_token_id_information=True, "
                f"logprobs=True, top_logprobs=0), but the response had none (choice.logprobs={logprobs!r}). "
                "Cannot extract token ids or logprobs."
            )
        prompt = {key: request[key] for key in _TOKENIZE_KEYS if key in request}
        return bundle_from_logprobs(logprobs, (await self._post(self._tokenize_url, prompt))["tokens"])

    async def _post(self, url: str, body: Json) -> Any:
        """POST until an answer comes: a busy or absent endpoint is asked again for ever, a failing one three times."""
        data = msgspec.json.encode(body)
        failures = 0
        while True:
            try:
                async with self._session.post(url, data=data, headers=self._headers) as response:
                    content = await response.read()
                    status = response.status
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                await asyncio.sleep(RETRY_DELAY_S)
                continue
            if status < 400:
                return msgspec.json.decode(content)
            if status not in _WAIT_STATUSES and status != 500:
                raise InnerServerError(content, status=status)
            await asyncio.sleep(RETRY_DELAY_S)
            failures += status == 500
            if failures == SERVER_ERROR_TRIES:
                raise InnerServerError(content, status=status)


def _is_overflow(error: InnerServerError) -> bool:
    return error.status == 400 and (b"context length" in error.content or b"max_tokens" in error.content)
