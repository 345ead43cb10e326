"""A teacher plays real Gym: a chat endpoint that answers as a teacher would, and Gym's own servers in front of it.

So tool results are the environment's own words, the user's turns its own, and the rewards are Gym's.
"""

import asyncio
import json
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from lightning_gym.errors import GymError
from lightning_gym.gym.client import GymClient
from lightning_gym.gym.servers import NemoGym
from lightning_gym.gym.wire import GENERATION_LOG_PROBS, GENERATION_TOKEN_IDS, PROMPT_TOKEN_IDS, ROLLOUT_ID
from lightning_gym.gym_policy.environments import GymEnvironment, Message, Row
from lightning_gym.rollout import Failure, SamplingProfile

_CONCURRENCY = 16
# Gym asks a policy for ids; nobody reads a teacher's.
_NO_IDS = {PROMPT_TOKEN_IDS: [0], GENERATION_TOKEN_IDS: [0], GENERATION_LOG_PROBS: [0.0]}


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One rollout of the teacher's."""

    messages: list[Message]
    """From the row's prompt to the teacher's last turn."""
    reward: float


class _Teacher:
    """Answers chat requests; which rollout one belongs to stands in it."""

    def __init__(self) -> None:
        self._playing: dict[str, tuple[GymEnvironment, Row, random.Random]] = {}
        self._said: dict[str, list[Message]] = {}

    def begin(self, rollout_id: str, environment: GymEnvironment, row: Row) -> None:
        self._playing[rollout_id] = environment, row, random.Random(rollout_id)

    def end(self, rollout_id: str) -> list[Message]:
        """The whole conversation."""
        del self._playing[rollout_id]
        return self._said.pop(rollout_id)

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        rollout_id = body[ROLLOUT_ID]
        environment, row, rng = self._playing[rollout_id]
        messages = [_plain(message) for message in body["messages"]]
        said = environment.turn(row, messages, rng)
        if body.get("parallel_tool_calls") is False and len(said.get("tool_calls") or ()) > 1:
            raise GymError(f"{environment.name}'s teacher makes several calls where the row allows one a turn")
        self._said[rollout_id] = [*messages, said]
        choice = {
            "index": 0,
            "finish_reason": "tool_calls" if said.get("tool_calls") else "stop",
            "message": said | _NO_IDS,
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return web.json_response(head | {"choices": [choice], "usage": usage})


def _plain(message: dict[str, Any]) -> Message:
    """A message as it was said, without the ids that Gym sends back."""
    return {key: message[key] for key in ("role", "content", "tool_calls", "tool_call_id") if message.get(key)}


def play(
    plan: Sequence[tuple[GymEnvironment, Row]], *, python: Path, run_dir: Path, seed: int = 0
) -> list[Demonstration]:
    """One rollout of the teacher for each entry of `plan`, in real Gym.

    Args:
        plan: environment and row.
        python: Gym's interpreter.
        run_dir: where Gym's log goes.
        seed: of the teacher's mistakes.

    Raises:
        GymStartError: Gym did not come up.
        GymError: a rollout failed.
    """
    environments = {environment.name: environment for environment, _ in plan}.values()
    gym = NemoGym(
        [environment.config for environment in environments],
        python=python,
        overrides={key: value for environment in environments for key, value in environment.overrides.items()},
    )
    with socket.create_server(("127.0.0.1", 0)) as listener, gym:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        head_url = gym.start(policy_url=url, api_key="teacher", model="teacher", run_dir=run_dir)
        return asyncio.run(_play(plan, head_url, listener, seed))


async def _play(
    plan: Sequence[tuple[GymEnvironment, Row]], head_url: str, listener: socket.socket, seed: int
) -> list[Demonstration]:
    teacher = _Teacher()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", teacher.answer)
    server = web.AppRunner(app)
    await server.setup()
    await web.SockSite(server, listener).start()
    client = GymClient(head_url, max_concurrency=_CONCURRENCY, rollout_timeout_s=60.0)
    await client.connect()

    async def one(number: int, environment: GymEnvironment, row: Row) -> Demonstration:
        rollout_id = f"demonstration-{seed}-{number}"
        teacher.begin(rollout_id, environment, row)
        played, _ = await client.run(environment.agent, row, rollout_id, SamplingProfile(), seed)
        if isinstance(played, Failure):
            raise GymError(f"{environment.name} failed the teacher with {json.dumps(row)[:200]}: {played.message}")
        return Demonstration(teacher.end(rollout_id), played.reward)

    try:
        async with asyncio.TaskGroup() as tasks:
            playing = [tasks.create_task(one(number, *entry)) for number, entry in enumerate(plan)]
        return [task.result() for task in playing]
    finally:
        await client.close()
        await server.cleanup()
