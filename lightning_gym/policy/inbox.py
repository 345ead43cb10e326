"""Inbox: results of the engine's thread, brought to the event loop that waits for them."""

import asyncio
import contextlib
from collections import deque

from lightning_gym.errors import EngineError
from lightning_gym.policy.engine import Generation


class Inbox:
    """Brings results from the engine's thread to the loop's, one wake-up for all that arrive together."""

    def __init__(self) -> None:
        self._results: deque[tuple[asyncio.Future[Generation], Generation | BaseException]] = deque()
        self._waking = False

    def put(self, future: asyncio.Future[Generation], result: Generation | BaseException) -> None:
        self._results.append((future, result))
        if not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                future.get_loop().call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._waking = False  # before the deque is read: a result put after this line wakes the loop again
        while self._results:
            future, result = self._results.popleft()
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(_engine_error(result))
            else:
                future.set_result(result)


def _engine_error(error: BaseException) -> EngineError:
    return error if isinstance(error, EngineError) else EngineError(str(error))
