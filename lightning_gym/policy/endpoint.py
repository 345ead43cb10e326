"""Endpoint: the colocated engine as an OpenAI-compatible server on loopback, and the thread it runs on.

What is answered is `lightning_gym.policy.service`'s business; here are the socket, the thread, the token, and retries.
"""

import asyncio
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightning_gym.errors import ConfigError, EngineError
from lightning_gym.gym import wire
from lightning_gym.policy.engine import Engine
from lightning_gym.policy.inbox import Inbox
from lightning_gym.policy.ledger import Ledger, Profile
from lightning_gym.policy.replies import Refusal, body_of, json_object, json_reply, reply_to
from lightning_gym.policy.retries import ClientGoneError, PendingAnswers
from lightning_gym.policy.service import PolicyService
from lightning_gym.rollout import SamplingProfile

_log = logging.getLogger(__name__)
_KEEP_ALIVE_S = 24 * 3600  # idle connections outlast any pause: a client reusing one that just closed sees a reset
_MAX_CONNECTIONS = 8192
_STOP_TIMEOUT_S = 5.0


class Endpoint:
    """Serves `engine` on ``http://host:port/v1``.

    Args:
        engine: what samples.
        model_path: directory with the tokenizer and its chat template.
        ledger: where every call of an opened rollout is written.
        profiles: sampling of train and eval rollouts; contradicting requests are refused.
        model_name: what ``/v1/models`` lists; ``<name>-eval`` is the eval profile, for clients without a rollout id.
        host: loopback unless you know why not; requests need the bearer token either way.
        port: 0 picks a free one.
        api_key: bearer token; ``None`` makes a random one.

    Raises:
        ConfigError: the port is taken, or the model has no usable chat template.
    """

    def __init__(
        self,
        engine: Engine,
        model_path: Path,
        ledger: Ledger,
        *,
        profiles: Mapping[Profile, SamplingProfile],
        model_name: str = "policy",
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
    ) -> None:
        self.api_key = api_key or secrets.token_urlsafe(24)
        self._inbox = Inbox()
        self.service = PolicyService(engine, model_path, ledger, profiles, model_name=model_name, inbox=self._inbox)
        self._answers: PendingAnswers[dict[str, Any]] = PendingAnswers()
        self._socket = _bind(host, port)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}/v1"
        self._server: uvicorn.Server
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve from now on."""
        config = uvicorn.Config(
            self._app(),
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
            server_header=False,
            date_header=False,
        )
        self._server = uvicorn.Server(config)
        ready: Future[None] = Future()

        async def serve() -> None:
            self._inbox.loop = asyncio.get_running_loop()
            ready.set_result(None)
            await self._server.serve(sockets=[self._socket])

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())

        self._thread = threading.Thread(target=run, name="lightning-gym-http", daemon=True)
        self._thread.start()
        ready.result()

    def close(self) -> None:
        """Stop serving; bounded, idempotent."""
        if self._thread is None:
            self._socket.close()
            return
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("the endpoint's thread did not stop within %.0f s", _STOP_TIMEOUT_S)
        self._socket.close()

    def _app(self) -> Starlette:
        service = self.service

        async def metrics(_request: Request) -> Response:
            return Response(service.metrics(), media_type="text/plain; version=0.0.4")

        async def health(_request: Request) -> Response:
            return json_reply(await service.health({}))

        posts = {
            "/v1/chat/completions": service.chat_completions,
            "/v1/completions": service.completions,
            "/tokenize": service.tokenize,
            "/detokenize": service.detokenize,
        }
        return Starlette(
            routes=[
                *(Route(path, self._guarded(answer), methods=["POST"]) for path, answer in posts.items()),
                Route("/v1/models", self._guarded(service.models), methods=["GET"]),
                Route("/metrics", metrics, methods=["GET"]),
                Route("/health", health, methods=["GET"]),
            ]
        )

    def _guarded(self, handler: Any) -> Any:
        """Authenticate, decode, and turn refusals into OpenAI-shaped errors."""
        expected = f"Bearer {self.api_key}".encode()

        async def handle(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").encode()
                if not hmac.compare_digest(given, expected):
                    raise Refusal(401, "the bearer token is missing or wrong")
                if request.method == "GET":
                    return json_reply(await handler({}))
                return json_reply(await self._once(request, await body_of(request), handler))
            except (Refusal, EngineError, ClientGoneError) as error:
                self.service.stats.refused += 1
                return reply_to(error)

        return handle

    async def _once(self, request: Request, raw: bytes, handler: Any) -> Any:
        """The handler's answer, shared with an identical request of the same rollout that is still unanswered."""
        body = json_object(raw)
        rollout_id = body.get(wire.ROLLOUT_ID)
        key = (request.url.path, raw) if isinstance(rollout_id, str) else object()

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return await self._answers.answer(key, lambda: handler(body), gone)


def _bind(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"the endpoint cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
