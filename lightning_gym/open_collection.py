"""OpenCollection: rollouts that are being played on a thread of their own, and the wait for their end.

The trainer's thread begins a collection and waits for it, at once or after it has trained on the one before. While it
waits it looks after what the rollouts depend on: of an engine or an endpoint that died it tells at once and by name,
instead of letting every rollout run into its own failure. A Gym that is gone is `lightning_gym.gym.recovery`'s.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from lightning_gym.collection import Collection
from lightning_gym.errors import CollectionAbandonedError, CollectionError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_LOOK_S = 0.25
"""How often a wait looks after what it depends on."""
_DEATH_SHOWS_S = 1.0
"""How long after its connections broke the end of a process may take to be seen."""
_CANCEL_S = 5.0


class LoopThread:
    """An event loop on a thread of its own, for what plays rollouts. Daemon: it never keeps the process."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._stop = asyncio.Event()
        started: Future[None] = Future()

        async def run() -> None:
            started.set_result(None)
            await self._stop.wait()

        self._thread = threading.Thread(target=lambda: self._runner.run(run()), name="lightning-gym-play", daemon=True)
        self._thread.start()
        started.result()

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> "Future[_T]":
        """Run it there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._runner.get_loop())

    def close(self) -> None:
        """Cancel what runs there and end the thread; bounded."""
        self._runner.get_loop().call_soon_threadsafe(self._stop.set)
        self._thread.join(_CANCEL_S)
        if self._thread.is_alive():
            _log.error("the thread that plays rollouts did not stop within %.0f s", _CANCEL_S)
            return
        self._runner.close()


class OpenCollection:
    """A collection that has begun. Belongs to the thread that began it.

    Args:
        future: of its rollouts.
        check: raises what has died meanwhile, or that the run is to end; called again and again while it is waited for.
        finish: called once when nothing is played any more.
    """

    def __init__(self, future: "Future[Collection]", *, check: Callable[[], None], finish: Callable[[], None]) -> None:
        self._future = future
        self._check = check
        self._finish = finish
        self._outcome: Collection | Exception | None = None

    @property
    def is_abandoned(self) -> bool:
        """Whether it was given up, as at the end of a run; its tasks have to be played again."""
        return isinstance(self._outcome, CollectionAbandonedError)

    def result(self) -> Collection:
        """Wait for its end.

        Raises:
            CollectionError: too many rollouts failed.
            EngineDeadError: the engine died; the cause is chained.
            EndpointDeadError: the endpoint did.
            CollectionAbandonedError: it was given up.
        """
        self.settle()
        assert self._outcome is not None
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def settle(self) -> None:
        """Wait for its end, and leave what came of it to `result`."""
        if self._outcome is not None:
            return
        try:
            self._outcome = self._wait()
            self._finish()
        except Exception as error:  # noqa: BLE001  raised by `result`
            self._outcome = error
            self._cancel()

    def abandon(self) -> None:
        """Give it up; bounded."""
        if self._outcome is None:
            self._outcome = CollectionAbandonedError("the collection was given up before its end")
            self._cancel()

    def _wait(self) -> Collection:
        while True:
            try:
                return self._future.result(timeout=_LOOK_S)
            except TimeoutError:
                if self._future.done():
                    raise
                self._check()
            except CancelledError:
                raise CollectionAbandonedError("the collection was cancelled") from None
            except CollectionError:
                deadline = time.monotonic() + _DEATH_SHOWS_S  # a death is the better cause
                while time.monotonic() < deadline:
                    self._check()
                    time.sleep(_LOOK_S)
                raise

    def _cancel(self) -> None:
        self._future.cancel()
        try:
            self._finish()
        except Exception:  # noqa: BLE001  what is being raised already says more
            _log.debug("an engine that is not needed any more could not be paused", exc_info=True)
