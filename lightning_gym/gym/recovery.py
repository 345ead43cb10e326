"""Recovery: a Gym whose connection was lost is started again if it is ours, and waited for if it is somebody else's.

A rollout that lost its server has no result to lose: it is tried again from its first call. Tried at once, it would
find the same closed door and use its tries up in milliseconds; so it asks here first.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from lightning_gym.errors import GymError
from lightning_gym.gym.client import GymClient

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class Recovery:
    """Waits until an agent can be asked again, and what it may ask in turn.

    Args:
        client: connected; learns a new head server and new addresses of agents.
        restart: starts the Gym again if it has ended by itself, and returns the new head server's URL; ``None`` where
            there was nothing to start.
        away_s: how long a Gym may be away. After that its rollouts fail without another wait, until it answers again.
        max_restarts: of a run; a Gym that ends more often has a fault that another start does not cure.
    """

    def __init__(
        self,
        client: GymClient,
        restart: Callable[[], str | None] = lambda: None,
        *,
        away_s: float = 60.0,
        max_restarts: int = 3,
    ) -> None:
        self.num_restarts = 0
        self._client = client
        self._restart = restart
        self._away_s = away_s
        self._max_restarts = max_restarts
        self._lock = asyncio.Lock()
        self._away_since: float | None = None
        self._found: tuple[float, bool] = (0.0, False)
        """What the last one found who looked, and when."""

    async def wait_for(self, agent: str) -> bool:
        """Return whether `agent` answers: as soon as all servers do, or `away_s` after one was first found gone.

        Raises:
            GymError: the Gym ended by itself more than `max_restarts` times, or does not start again.
        """
        asked = time.monotonic()
        async with self._lock:
            when, found = self._found
            if when < asked:  # otherwise somebody has looked for this one as well
                found = await self._look(agent)
                self._found = time.monotonic(), found
            return found

    async def _look(self, agent: str) -> bool:
        pause = _FIRST_PAUSE_S
        while True:
            await self._start_again()
            answers = await self._client.answers(agent)
            silent = await self._client.silent() if answers else [agent]
            if not silent:
                self._away_since = None
                return True
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                _log.warning("no answer from %s; waiting up to %g s for it", ", ".join(silent), self._away_s)
            if now - self._away_since >= self._away_s:
                return answers
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            with contextlib.suppress(GymError):  # not back yet; or back, under other addresses
                await self._client.connect()

    async def _start_again(self) -> None:
        head_url = self._restart()
        if head_url is None:
            return
        self.num_restarts += 1
        if self.num_restarts > self._max_restarts:
            raise GymError(
                f"the Gym ended by itself {self.num_restarts} times; its log in the run directory says of what"
            )
        await self._client.connect(head_url)
