"""An environment that takes time, for `benchmarks.step`: imported by the Gym's process as well."""

import asyncio
from typing import Any

from lightning_gym.gym.environments import Counter

WAIT_S = 0.2


class SlowCounter(Counter):
    """`Counter`, each of whose tools takes a while without a core, as one that asks a sandbox does."""

    name = "slow_counter"

    async def answer(self, name: str, arguments: Any) -> str:
        await asyncio.sleep(WAIT_S)
        return await super().answer(name, arguments)
