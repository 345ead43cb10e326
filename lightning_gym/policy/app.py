"""App: the endpoint's ASGI application: who may ask what.

A handful of fixed paths need no router. ``/health``, ``/metrics`` and ``/openapi.json`` hold no secret and are open;
everything else wants the bearer token, and a request without it is answered before its body is read.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from lightning_gym.errors import EngineError
from lightning_gym.gym import wire
from lightning_gym.policy.openapi import openapi_document
from lightning_gym.policy.replies import (
    Refusal,
    Reply,
    body_of,
    json_object,
    json_reply,
    reply_to,
    text_reply,
    unauthorized,
)
from lightning_gym.policy.retries import ClientGoneError, PendingAnswers
from lightning_gym.policy.service import Answer, PolicyService

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = frozenset(("/health", "/metrics", "/openapi.json"))


class App:
    """Answers HTTP requests with what `service` says.

    Args:
        service: what is answered.
        api_key: the bearer token.
    """

    def __init__(self, service: PolicyService, api_key: str) -> None:
        self.answers: PendingAnswers[Answer] = PendingAnswers(lambda answer: answer.delivered())
        self.service = service
        self._expected = f"Bearer {api_key}".encode()
        self.gets: dict[str, Callable[[], Reply]] = {
            "/health": lambda: json_reply(service.health()),
            "/metrics": lambda: text_reply(service.metrics(), "text/plain; version=0.0.4"),
            "/openapi.json": lambda: json_reply(openapi_document()),
            "/v1/models": lambda: json_reply(service.models()),
        }
        self.posts = {
            "/v1/chat/completions": service.chat_completions,
            "/v1/completions": service.completions,
            "/tokenize": service.tokenize,
            "/detokenize": service.detokenize,
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            reply = await self._reply(scope, receive)
        except (Refusal, EngineError, ClientGoneError) as error:
            self.service.stats.refused += 1
            reply = reply_to(error)
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
        await send({"type": "http.response.body", "body": reply.body})

    async def _reply(self, scope: Mapping[str, Any], receive: Receive) -> Reply:
        path, headers = scope["path"], dict(scope["headers"])
        if path not in OPEN_PATHS and not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            raise unauthorized()
        allowed = "GET" if path in self.gets else "POST" if path in self.posts else None
        if allowed is None:
            known = ", ".join((*self.gets, *self.posts))
            raise Refusal(404, f"there is no {path} here; there are {known}")
        if scope["method"] != allowed:
            raise Refusal(405, f"{path} takes {allowed}, not {scope['method']}", {"allow": allowed})
        if allowed == "GET":
            return self.gets[path]()
        return json_reply((await self._answer(path, await body_of(headers, receive), receive)).body)

    async def _answer(self, path: str, raw: bytes, receive: Receive) -> Answer:
        """The service's answer, shared with an identical request of the same rollout that is still unanswered."""
        body = json_object(raw)
        key = (path, raw) if isinstance(body.get(wire.ROLLOUT_ID), str) else object()

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        return await self.answers.answer(key, lambda: self.posts[path](body), gone)
