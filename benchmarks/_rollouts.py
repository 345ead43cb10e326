"""A client in a process of its own: plays rows on running Gym servers, and says how long it took.

``python _rollouts.py ours|gym HOST PORT``: our `GymClient`, or Gym's own `RolloutCollectionHelper` (run with Gym's
Python). One JSON object a line on stdin (`rows`, `concurrency`), one a line on stdout (`seconds`, `reward`).
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

Play = Callable[[list[dict[str, Any]], int], Awaitable[list[float]]]


async def main(who: str, host: str, port: int) -> None:
    """Answer lines until stdin ends."""
    play = await (_ours if who == "ours" else _gyms)(host, port)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        start = time.perf_counter()
        rewards = await play(asked["rows"], asked["concurrency"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "reward": sum(rewards) / len(rewards)}), flush=True)


async def _ours(host: str, port: int) -> Play:
    from lightning_gym.gym.client import GymClient
    from lightning_gym.gym.wire import Played
    from lightning_gym.rollout import SamplingProfile

    profile = SamplingProfile()
    clients: dict[int, GymClient] = {}

    async def play(rows: list[dict[str, Any]], concurrency: int) -> list[float]:
        if concurrency not in clients:
            clients[concurrency] = GymClient(f"http://{host}:{port}", max_concurrency=concurrency)
            await clients[concurrency].connect()
        client = clients[concurrency]
        runs = [client.run(row["agent_ref"]["name"], row, f"r{n}", profile, n) for n, row in enumerate(rows)]
        rewards: list[float] = []
        for played, _ in await asyncio.gather(*runs):
            if not isinstance(played, Played):
                raise RuntimeError(str(played))  # noqa: TRY004  a rollout that failed, no wrong argument
            rewards.append(played.reward)
        return rewards

    return play


async def _gyms(host: str, port: int) -> Play:
    from nemo_gym.config_types import BaseServerConfig  # type: ignore[import-not-found]  it is Gym's Python that does
    from nemo_gym.rollout_collection import RolloutCollectionHelper  # type: ignore[import-not-found]

    del sys.argv[1:]  # Gym would read them as its own
    helper, head = RolloutCollectionHelper(), BaseServerConfig(host=host, port=port)

    async def play(rows: list[dict[str, Any]], concurrency: int) -> list[float]:
        slots = asyncio.Semaphore(concurrency)
        rewards: list[float] = []
        for future in helper.run_examples(rows, head_server_config=head, semaphore=slots):
            _, result = await future
            rewards.append(result["reward"])
        return rewards

    return play


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
