"""FakeGym: Gym's HTTP contract on a thread of this process."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lightning_gym.gym.environments import load_environment


class FakeGym:
    """Gym's HTTP contract on a thread of this process: agents that play `environments`, and can be told to fail.

    Fulfils `lightning_gym.gym.servers.Gym` and passes its contract tests.

    Args:
        environments: what `lightning_gym.gym.environments.load_environment` takes.
        max_steps: model calls of one rollout.
        fault: ``n -> HTTP status`` with which the n-th ``/run`` is answered instead of being played, or ``None``.
    """

    def __init__(
        self,
        environments: Sequence[str] = ("counter",),
        *,
        max_steps: int = 10,
        fault: Callable[[int], int | None] | None = None,
    ) -> None:
        self.num_runs = 0
        """``/run`` requests so far."""
        self._environments = [load_environment(spec) for spec in environments]
        self._max_steps = max_steps
        self._fault = fault
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event
        self._thread: threading.Thread | None = None

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        from lightning_gym.gym.embedded_server import Settings, listening

        settings = Settings(
            environments=[],
            policy_url=policy_url,
            api_key=api_key,
            model=model,
            max_steps=self._max_steps,
            ready_file="",
        )
        head_url: Future[str] = Future()

        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            async with listening(settings, self._environments, [self._maybe_fail()]) as url:
                head_url.set_result(url)
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="lightning-gym-fake-gym", daemon=True)
        self._thread.start()
        return head_url.result()

    def close(self) -> None:
        if self._thread is None or self._loop is None or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _maybe_fail(self) -> Any:
        from aiohttp import web

        @web.middleware
        async def maybe_fail(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.path == "/run":
                number, self.num_runs = self.num_runs, self.num_runs + 1
                status = self._fault(number) if self._fault else None
                if status is not None:
                    return web.json_response(f"fault injected into run {number}", status=status)
            return await handler(request)

        return maybe_fail
