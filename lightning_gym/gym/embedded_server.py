"""The server process of the embedded Gym: a head server and one agent per environment, each on a port of its own."""

import asyncio
import contextlib
import logging
import os
import signal
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml
from aiohttp import web
from aiohttp.typedefs import Middleware
from pydantic import ValidationError

from lightning_gym.errors import TaskError
from lightning_gym.gym.agent_loop import Agent, CreateParams
from lightning_gym.gym.conversion import Json
from lightning_gym.gym.environments import Environment, load_environment
from lightning_gym.gym.policy_client import InnerServerError, PolicyClient
from lightning_gym.gym.wire import RESPONSES_CREATE_PARAMS

HOST = "127.0.0.1"
_MAX_BODY_BYTES = 256 * 2**20
_TASK_INDEX = "_ng_task_index"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer tells the server process."""

    environments: list[str]
    """What `load_environment` takes."""
    policy_url: str
    """Ends with ``/v1``."""
    api_key: str
    model: str
    max_steps: int
    """Model calls of one rollout."""
    ready_file: str
    """Where `Ready` is written once all ports listen."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What the server process tells the trainer."""

    head_url: str
    pid: int


def serve(settings_json: str) -> None:
    """Serve until SIGINT or SIGTERM; `settings_json` is a `Settings`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = msgspec.json.decode(settings_json, type=Settings)
    environments = [load_environment(spec) for spec in settings.environments]
    asyncio.run(_serve(settings, environments))


async def _serve(settings: Settings, environments: Sequence[type[Environment]]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with listening(settings, environments) as head_url:
        _announce(settings.ready_file, Ready(head_url=head_url, pid=os.getpid()))
        await stop.wait()


@contextlib.asynccontextmanager
async def listening(
    settings: Settings, environments: Sequence[type[Environment]], middlewares: Sequence[Middleware] = ()
) -> AsyncGenerator[str]:
    """The head server and the agents, on the running loop; yields the head server's URL.

    Args:
        settings: without use of its ``ready_file``.
        environments: one agent each.
        middlewares: of the agents' applications.
    """
    policy = PolicyClient(base_url=settings.policy_url, api_key=settings.api_key, model=settings.model)
    runners: list[web.AppRunner] = []
    urls: dict[str, str] = {}
    try:
        for environment in environments:
            agent = Agent(environment, policy, max_steps=settings.max_steps)
            urls[agent.name] = await listen(agent_app(agent, middlewares), runners)
        yield await listen(_head_app(settings, environments, urls), runners)
    finally:
        # The rollouts first: one that finds its policy client closed would answer with an error that is not its own.
        for runner in runners:
            await runner.cleanup()
        await policy.aclose()


async def listen(app: web.Application, runners: list[web.AppRunner]) -> str:
    """Serve `app` on a free port, and return its URL; whoever cleans up `runners` ends it."""
    # Rollouts outlive the client that asked for them, as in Gym: aiohttp lets a handler finish unless told otherwise.
    # To aiohttp a shutdown timeout of 0 is none at all.
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=75.0, shutdown_timeout=0.01)
    runners.append(runner)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0, backlog=2048).start()
    return f"http://{HOST}:{runner.addresses[0][1]}"


def _announce(path: str, ready: Ready) -> None:
    partial = Path(f"{path}.partial")
    partial.write_bytes(msgspec.json.encode(ready) + b"\n")
    partial.rename(path)


def agent_app(agent: Agent, middlewares: Sequence[Middleware] = ()) -> web.Application:
    """The HTTP interface of one agent."""

    async def run(row: Any) -> Json:
        return await agent.run(row)

    async def responses(body: Any) -> Json:
        params = CreateParams.model_validate(body)
        return await agent.respond(params, agent.start({RESPONSES_CREATE_PARAMS: body}))

    async def aggregate(body: Any) -> Json:
        return aggregate_metrics(body["verify_responses"])

    app = _app(middlewares)
    app.router.add_post("/run", _json_route(run))
    app.router.add_post("/v1/responses", _json_route(responses))
    app.router.add_post("/aggregate_metrics", _json_route(aggregate))
    return app


def _head_app(
    settings: Settings, environments: Sequence[type[Environment]], urls: Mapping[str, str]
) -> web.Application:
    instances = [_instance(name, url) for name, url in urls.items()]

    async def server_instances(_: web.Request) -> web.Response:
        return _json_response(instances)

    async def config(request: web.Request) -> web.Response:
        port = request.url.port
        return _json_response(yaml.safe_dump(_global_config(settings, environments, urls, port), sort_keys=False))

    app = _app()
    app.router.add_get("/server_instances", server_instances)
    app.router.add_get("/global_config_dict_yaml", config)
    return app


def _app(middlewares: Sequence[Middleware] = ()) -> web.Application:
    async def alive(_: web.Request) -> web.Response:
        return _json_response({"status": "ok"})

    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=middlewares)
    app.router.add_get("/", alive)
    return app


def _json_route(answer: Callable[[Any], Awaitable[Json]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """An HTTP handler around `answer`, with the error replies of a Gym server."""

    async def handle(request: web.Request) -> web.Response:
        try:
            return _json_response(await answer(msgspec.json.decode(await request.read())))
        except ValidationError as error:
            found = [entry | {"loc": ("body", *entry["loc"])} for entry in error.errors(include_url=False)]
            return _json_response({"detail": found}, status=422)
        except msgspec.DecodeError as error:
            return _json_response({"detail": [_problem("json_invalid", f"JSON decode error: {error}")]}, status=422)
        except TaskError as error:
            return _json_response({"detail": [_problem("row_refused", str(error))]}, status=422)
        except InnerServerError as error:
            return web.Response(body=error.content, status=500, content_type="application/json")

    return handle


def _problem(kind: str, message: str) -> Json:
    return {"type": kind, "loc": ["body"], "msg": message, "input": None}


def _json_response(content: Any, *, status: int = 200) -> web.Response:
    body = msgspec.json.encode(content, enc_hook=str)
    return web.Response(body=body, status=status, content_type="application/json")


def _instance(name: str, url: str) -> Json:
    return {
        "config_path": name,
        "dir_path": str(Path(__file__).parent),
        "entrypoint": "embedded.py",
        "host": HOST,
        "name": "simple_agent",
        "pid": os.getpid(),
        "port": int(url.rpartition(":")[2]),
        "process_name": name,
        "server_type": "responses_api_agents",
        "start_time": time.time(),
        "status": None,
        "uptime_seconds": None,
        "url": url,
    }


def _global_config(
    settings: Settings, environments: Sequence[type[Environment]], urls: Mapping[str, str], head_port: int | None
) -> Json:
    config: Json = {}
    for environment in environments:
        name = environment.agent_name()
        agent = {
            "entrypoint": "embedded.py",
            "resources_server": {"type": "resources_servers", "name": environment.name},
            "model_server": {"type": "responses_api_models", "name": "policy_model"},
            "max_steps": settings.max_steps,
            "host": HOST,
            "port": int(urls[name].rpartition(":")[2]),
        }
        config[name] = {"responses_api_agents": {"simple_agent": agent}}
    config["policy_base_url"] = settings.policy_url
    config["policy_model_name"] = settings.model
    config["head_server"] = {"host": HOST, "port": head_port}
    return config


def aggregate_metrics(results: Sequence[Mapping[str, Any]]) -> Json:
    """mean, max, min, median and std of every number in `results` (token usage included), per task and over all."""
    tasks: dict[int, list[dict[str, float]]] = {}
    for result in results:
        usage = (result.get("response") or {}).get("usage") or {}
        numbers = {k: float(v) for k, v in {**result, **usage}.items() if isinstance(v, int | float) and k[0] != "_"}
        tasks.setdefault(result.get(_TASK_INDEX, 0), []).append(numbers)
    groups = [{_TASK_INDEX: task} | _describe(tasks[task]) for task in sorted(tasks)]
    overall = _describe([numbers for rows in tasks.values() for numbers in rows])
    headline = {name: value for name, value in overall.items() if name.startswith("mean/")}
    return {"group_level_metrics": groups, "agent_metrics": overall, "key_metrics": headline}


def _describe(rows: Sequence[Mapping[str, float]]) -> Json:
    described: Json = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        described |= {
            f"mean/{name}": statistics.fmean(values),
            f"max/{name}": max(values),
            f"min/{name}": min(values),
            f"median/{name}": statistics.median(values),
            f"std/{name}": statistics.stdev(values) if len(values) > 1 else 0.0,
        }
    return described
