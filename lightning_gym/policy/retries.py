"""Answers that are being made: one for a request, however often it is asked.

A client that lost its connection asks again, and must get the answer that is on its way, not a second sample.
A request is such a retry only while an identical one of the same rollout is unfinished, or was finished for a
connection that had closed by then. The same request after a delivered answer is a new call: Gym 0.4.0 drops empty
turns from the history and then asks in the same words again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

GRACE_S = 2.0
"""How long an answer that nobody waits for is still made and kept: Gym asks again every 0.5 s."""


class ClientGoneError(Exception):
    """The connection closed before the answer was ready."""


@dataclass(slots=True, eq=False)
class _Pending(Generic[_T]):
    task: "asyncio.Task[_T]"
    waiting: int = 0
    """Connections that want the answer."""


class PendingAnswers(Generic[_T]):
    """Shares answers between identical requests. Belongs to one event loop.

    Args:
        delivered: called once with each answer that somebody gets, just before it is handed over; not with those that
            nobody asked for again.
    """

    def __init__(self, delivered: Callable[[_T], None]) -> None:
        self._delivered = delivered
        self._pending: dict[Any, _Pending[_T]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    async def answer(
        self, key: Any, make: Callable[[], Coroutine[Any, Any, _T]], gone: Callable[[], Awaitable[None]]
    ) -> _T:
        """The answer to the request `key`, made unless it is being made already.

        Args:
            key: equal for identical requests of one rollout.
            make: makes the answer; cancelled when nobody has wanted it for `GRACE_S`.
            gone: returns when this connection has closed.

        Raises:
            ClientGoneError: it closed first.
        """
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _Pending(asyncio.ensure_future(make()))
            pending.task.add_done_callback(_unheard)
        pending.waiting += 1
        watch = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({pending.task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                raise ClientGoneError
            first = self._forget(key, pending)
            answer = pending.task.result()
            if first:
                self._delivered(answer)
            return answer
        finally:
            watch.cancel()
            pending.waiting -= 1
            if not pending.waiting and self._pending.get(key) is pending:
                asyncio.get_running_loop().call_later(GRACE_S, self._give_up, key, pending)

    def _give_up(self, key: Any, pending: _Pending[_T]) -> None:
        if not pending.waiting and self._forget(key, pending):
            pending.task.cancel()

    def _forget(self, key: Any, pending: _Pending[_T]) -> bool:
        if self._pending.get(key) is not pending:
            return False
        del self._pending[key]
        return True


def _unheard(task: "asyncio.Task[Any]") -> None:
    """Look at an error, so that asyncio does not report one that nobody is left to hear."""
    if not task.cancelled():
        task.exception()
