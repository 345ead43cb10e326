"""A policy that answers at once, for what Gym and its client cost: plays the counter right. Prints its URL.

A process of its own, as small as it can be: a real policy would not share Gym's cores either.
"""

import asyncio
import json
import re
from typing import Any

import msgspec
from aiohttp import web

from lightning_gym.gym.wire import GENERATION_LOG_PROBS, GENERATION_TOKEN_IDS, PROMPT_TOKEN_IDS

PROMPT_TOKENS = 64
"""Of the first call; a later one has the earlier ones and 24 more each."""
SAMPLED_TOKENS = 24


async def main() -> None:
    """Serve until killed."""
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


async def _answer(request: web.Request) -> web.Response:
    body = msgspec.json.decode(await request.read())
    return web.Response(body=msgspec.json.encode(_completion(body)), content_type="application/json")


def _completion(body: dict[str, Any]) -> dict[str, Any]:
    results = [message["content"] for message in body["messages"] if message["role"] == "tool"]
    said = sum(message["role"] == "assistant" for message in body["messages"])
    message: dict[str, Any] = {"role": "assistant", "content": None}
    if not results:
        numbers = re.findall(r"add (\d+)", body["messages"][-1]["content"])
        message["tool_calls"] = [_call(i, "increment_counter", {"count": int(n)}) for i, n in enumerate(numbers)]
    elif len(results) == 2:
        message["tool_calls"] = [_call(2, "get_counter_value", {})]
    else:
        message["content"] = str(json.loads(results[-1])["count"])
    message |= {
        PROMPT_TOKEN_IDS: list(range(PROMPT_TOKENS + said * 2 * SAMPLED_TOKENS)),
        GENERATION_TOKEN_IDS: list(range(SAMPLED_TOKENS)),
        GENERATION_LOG_PROBS: [-0.1234567] * SAMPLED_TOKENS,
    }
    reason = "tool_calls" if "tool_calls" in message else "stop"
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def _call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call-{number}", "type": "function", "function": function}


if __name__ == "__main__":
    asyncio.run(main())
