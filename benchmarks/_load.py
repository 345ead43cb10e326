"""A client in a process of its own: sends the chat requests it is given, so many at once, and says how long it took.

One JSON object a line on stdin (`bodies`, `concurrency`), one a line on stdout (`seconds`, `tokens`).
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
import msgspec


async def main(url: str, api_key: str) -> None:
    """Answer lines until stdin ends."""
    headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            print(json.dumps(await _round(session, asked["bodies"], asked["concurrency"])), flush=True)


async def _round(session: aiohttp.ClientSession, bodies: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
    waiting = iter([msgspec.json.encode(body) for body in bodies])
    tokens = 0

    async def work() -> None:
        nonlocal tokens
        for raw in waiting:
            async with session.post("chat/completions", data=raw) as reply:
                if reply.status != 200:
                    raise RuntimeError(f"the endpoint answered {reply.status}: {await reply.text()}")
                tokens += msgspec.json.decode(await reply.read())["usage"]["completion_tokens"]

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] + "/", sys.argv[2]))
