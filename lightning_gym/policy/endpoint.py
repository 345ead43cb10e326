"""Endpoint: the colocated engine as an OpenAI-compatible server on loopback, and the thread it runs on.

What is answered is `lightning_gym.policy.service`'s business, and who may ask is `lightning_gym.policy.app`'s; here are
the socket and the thread.
"""

import asyncio
import logging
import secrets
import socket
import threading
from concurrent.futures import Future

import uvicorn

from lightning_gym.errors import ConfigError, EndpointDeadError
from lightning_gym.policy.app import App
from lightning_gym.policy.service import PolicyService

_log = logging.getLogger(__name__)
_KEEP_ALIVE_S = 24 * 3600  # idle connections outlast any pause: a client reusing one that just closed sees a reset
_MAX_CONNECTIONS = 8192
_STOP_TIMEOUT_S = 5.0


class Endpoint:
    """Serves `service` on ``http://host:port/v1``.

    Args:
        service: what is answered.
        host: loopback unless you know why not; requests need the bearer token either way.
        port: 0 picks a free one.
        api_key: bearer token; ``None`` makes a random one.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(
        self,
        service: PolicyService,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
    ) -> None:
        self.api_key = api_key or secrets.token_urlsafe(24)
        self.service = service
        self.app = App(service, self.api_key)
        self._socket = _bind(host, port)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}/v1"
        self._server: uvicorn.Server
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._death: BaseException | None = None
        self._is_over = False

    def start(self) -> None:
        """Serve from now on."""
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            log_level="error",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
            server_header=False,
            date_header=False,
        )
        self._server = uvicorn.Server(config)
        ready: Future[None] = Future()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            ready.set_result(None)
            await self._server.serve(sockets=[self._socket])

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                try:
                    runner.run(serve())
                except BaseException as error:  # noqa: BLE001  `check_alive` raises it
                    self._death = error
                self._is_over = True

        self._thread = threading.Thread(target=run, name="lightning-gym-http", daemon=True)
        self._thread.start()
        ready.result()

    def check_alive(self) -> None:
        """Look whether requests are still answered.

        Raises:
            EndpointDeadError: the thread that answers them has ended; what ended it is chained.
        """
        if self._is_over:
            why = "it stopped serving" if self._death is None else repr(self._death)
            raise EndpointDeadError(f"the endpoint {self.url} is dead: {why}") from self._death

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
