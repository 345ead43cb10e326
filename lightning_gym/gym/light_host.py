"""Hosts NeMo Gym's own, unmodified servers for `lightning_gym.gym.servers.NemoGym`.

Run by path with Gym's Python, ``python -P light_host.py``, so it imports the standard library and nemo_gym only. Its
settings are JSON in the environment variable `SETTINGS_VARIABLE`.

Two ways. *Light*: every server in this process and on one event loop, without Ray: seconds to start, a third of a GiB.
*Stock*: a process per server and a Ray of its own, as ``gym env start`` does it. The head server and what it says are
the same.

Not covered by the light way: ``num_workers``, environments that call Ray, two servers that each have a module of the
same top-level name next to their ``app.py``.

Source: nemo-gym 0.4.0, ``nemo_gym/cli/env.py: RunHelper`` and ``nemo_gym/server_utils.py: SimpleServer.run_webserver``.
"""

import asyncio
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS_VARIABLE = "LIGHTNING_GYM_HOST"
API_KEY_VARIABLE = "LIGHTNING_GYM_POLICY_API_KEY"
"""Gym's configuration refers to the policy's key by this name: it is printed, served and passed around in clear."""

_HOST = "127.0.0.1"
_TYPES = ("resources_servers", "responses_api_agents", "responses_api_models")
# Below the ports that Linux gives to whoever asks for any (from 32768), above those of Ray's workers (to 19999).
_PORTS = (20_000, 29_999)
_PORT_TRIES = 50
_STOP_TIMEOUT_S = 0.5
_WATCH_S = 1.0


class _Server(NamedTuple):
    name: str
    kind: str
    """One of `_TYPES`."""
    folder: str
    settings: Any
    """Its part of the configuration, live."""


def main() -> int | str:
    """Serve until SIGINT or SIGTERM; returns what `sys.exit` takes."""
    settings = json.loads(os.environ.pop(SETTINGS_VARIABLE))
    try:
        version = importlib.metadata.version("nemo-gym")
        from nemo_gym.config_types import ConfigError
    except ImportError as error:  # PackageNotFoundError is one
        return f"{sys.executable} cannot import nemo_gym ({error!r}): {sys.executable} -m pip install nemo-gym==0.4.0"
    try:
        config = _configure(settings)
    except ConfigError as error:
        return f"Gym refuses its configuration: {error}"
    _limit_steps(config, settings["max_steps"])

    def ready() -> None:
        head = config["head_server"]
        url = f"http://{head['host']}:{head['port']}"
        sys.stdout.write(f"ready: nemo-gym {version}, head server at {url}\n")
        sys.stdout.flush()
        partial = Path(settings["ready_file"] + ".partial")
        partial.write_text(json.dumps({"head_url": url, "version": version}))
        partial.rename(settings["ready_file"])

    return _host_stock(config, ready) if settings["ray"] else _host_light(config, ready)


# -- configuration


def _configure(settings: dict[str, Any]) -> Any:
    """Gym's global configuration: the user's files, and what only we know on top of them."""
    from nemo_gym.global_config import (
        GlobalConfigDictParserConfig,
        get_global_config_dict,
        set_global_config_dict,
    )
    from omegaconf import OmegaConf

    for path in settings["config_paths"]:
        _link_own_server(Path(path))
    ours = OmegaConf.create(
        {
            "config_paths": settings["config_paths"],
            "policy_base_url": settings["policy_urls"],
            "policy_api_key": f"${{oc.env:{API_KEY_VARIABLE}}}",
            "policy_model_name": settings["model"],
            "head_server": {"host": _HOST, "port": _free_port()},
            "port_range_low": _PORTS[0],
            "port_range_high": _PORTS[1],
            "uv_venv_dir": str(Path.cwd() / "venvs"),
            "skip_venv_if_present": True,
        }
    )
    for key, value in settings["overrides"].items():
        OmegaConf.update(ours, key, value, force_add=True)
    set_global_config_dict(
        GlobalConfigDictParserConfig(
            initial_global_config_dict=ours, skip_load_from_cli=True, skip_load_from_dotenv=True
        )
    )
    return get_global_config_dict()


def _link_own_server(path: Path) -> None:
    """Gym looks for a server's folder in its working directory before its own tree: show it there."""
    if not path.is_absolute():
        return
    for folder in path.parents:
        kind = folder.parent.name
        if kind in _TYPES:
            if not any((folder / name).is_file() for name in ("requirements.txt", "pyproject.toml")):
                sys.exit(f"{folder} has no requirements.txt, and without one Gym does not take it for a server: add it")
            _link(Path(kind, folder.name), folder)
            return


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    # In one step: the Gym of another rank may be at it, or use it already.
    new = link.with_name(f"{link.name}.{os.getpid()}")
    new.symlink_to(target)
    new.replace(link)


def _free_port() -> int:
    for _ in range(_PORT_TRIES):
        port = random.randint(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            return port
    sys.exit(f"none of {_PORT_TRIES} ports between {_PORTS[0]} and {_PORTS[1]} is free")


def _servers(config: Any) -> Iterator[_Server]:
    from nemo_gym.global_config import NEMO_GYM_RESERVED_TOP_LEVEL_KEYS
    from omegaconf import DictConfig

    for name in config:
        if name in NEMO_GYM_RESERVED_TOP_LEVEL_KEYS or not isinstance(config[name], DictConfig):
            continue
        kind = next(iter(config[name]))
        if kind not in _TYPES:
            continue
        folder = next(iter(config[name][kind]))
        if "entrypoint" in config[name][kind][folder]:
            yield _Server(name, kind, folder, config[name][kind][folder])


def _limit_steps(config: Any, max_steps: int | None) -> None:
    """Give every agent a limit that could have one and has none: most would call tools for ever."""
    from omegaconf import open_dict

    for server in _servers(config):
        if max_steps is None or server.kind != "responses_api_agents" or server.settings.get("max_steps"):
            continue
        try:
            field = _server_class(server).model_fields["config"].annotation.model_fields.get("max_steps")
        except ImportError as error:
            sys.stdout.write(f"{server.name}: not limited to {max_steps} steps, its code cannot be read: {error!r}\n")
            continue
        if field is not None and field.default is None:
            with open_dict(server.settings):
                server.settings["max_steps"] = max_steps


def _folder(server: _Server) -> Path:
    """Where the server's code is: under the working directory, or in Gym's own tree."""
    from nemo_gym import PARENT_DIR

    own = Path.cwd() / server.kind / server.folder
    return own if own.is_dir() else Path(PARENT_DIR, server.kind, server.folder)


def _server_class(server: _Server) -> Any:
    """The class that the server's file runs when it is executed."""
    path = _folder(server) / server.settings["entrypoint"]
    module_name = ".".join((server.kind, server.folder, *Path(server.settings["entrypoint"]).with_suffix("").parts))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ImportError(f"no Python file at {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    run = re.search(r"(\w+)\.run_webserver\(\)", path.read_text())
    if run is None:
        raise ImportError(f"{path} calls run_webserver() of no class")
    return getattr(module, run[1])


# -- light


def _host_light(config: Any, ready: Callable[[], None]) -> int:
    import uvloop

    return uvloop.run(_serve_light(config, ready))


async def _serve_light(config: Any, ready: Callable[[], None]) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    servers: dict[str, tuple[Any, Awaitable[None]]] = {}
    for name, app, address in _apps(config):
        server, listener = _uvicorn_server(app), socket.create_server(address, backlog=2048)
        servers[name] = server, asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    tasks = {task for _, task in servers.values()} | {stopping}
    while not all(server.started for server, _ in servers.values()):
        if any(task.done() for task in tasks):
            break
        await asyncio.sleep(0.005)
    else:
        ready()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    dead = [name for name, (_, task) in servers.items() if task.done()]
    for server, _ in servers.values():
        server.should_exit = True
    await asyncio.gather(*(task for _, task in servers.values()), return_exceptions=True)
    await _close_http_client()
    if stop.is_set():
        return 0
    sys.stdout.write(f"these servers ended by themselves: {', '.join(dead)}\n")
    return 1


def _apps(config: Any) -> Iterator[tuple[str, Any, tuple[str, int]]]:
    """Name, web application and address of every server; the head server, which knows all others, at the end."""
    from nemo_gym.global_config import NEMO_GYM_CONFIG_PATH_ENV_VAR_NAME
    from nemo_gym.server_utils import HeadServer, ServerClient, ServerInstanceDisplayConfig

    head = ServerClient.load_head_server_config()
    instances = []
    start_time = time.time()
    for server in _servers(config):
        host, port = server.settings["host"], server.settings["port"]
        os.environ[NEMO_GYM_CONFIG_PATH_ENV_VAR_NAME] = server.name  # where load_config_from_global_config looks
        try:
            cls = _server_class(server)
        except ModuleNotFoundError as error:
            # Gym would make an environment a server, from this file; here all of them share this one.
            sys.exit(
                f"{server.name} needs a package that {sys.executable} does not have ({error}): install into it, with "
                f"pip, what {_folder(server) / 'requirements.txt'} names beside nemo-gym"
            )
        client = ServerClient(head_server_config=head, global_config_dict=config)
        instance = cls(config=cls.load_config_from_global_config(), server_client=client)
        app = instance.setup_webserver()
        instance.setup_liveness(app)
        instance.setup_exception_middleware(app)
        described = ServerInstanceDisplayConfig(
            process_name=server.name,
            server_type=server.kind,
            name=server.folder,
            dir_path=_folder(server),
            entrypoint=server.settings["entrypoint"],
            host=host,
            port=port,
            url=f"http://{host}:{port}",
            pid=os.getpid(),
            config_path=server.name,
            start_time=start_time,
        )
        instances.append(described.model_dump(mode="json"))
        yield server.name, app, (host, port)
    head_server = HeadServer(config=head)
    head_server.set_server_instances(instances)
    yield "head_server", head_server.setup_webserver(), (head.host, head.port)


def _uvicorn_server(app: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            yield  # one handler for all servers is set already

    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_STOP_TIMEOUT_S,
        )
    )


async def _close_http_client() -> None:
    """Gym closes it at exit, on an event loop that is not the client's own."""
    from nemo_gym.server_utils import get_global_aiohttp_client, is_global_aiohttp_client_setup

    if is_global_aiohttp_client_setup():
        await get_global_aiohttp_client().close()


# -- stock


def _host_stock(config: Any, ready: Callable[[], None]) -> int:
    from nemo_gym.cli.env import RunHelper
    from nemo_gym.global_config import GlobalConfigDictParserConfig

    _share_environment(config)
    helper = RunHelper()
    try:
        helper.start(GlobalConfigDictParserConfig(skip_load_from_cli=True, skip_load_from_dotenv=True))
        ready()
        while True:
            helper.poll()  # RunHelper.run_forever does this once a minute
            time.sleep(_WATCH_S)
    except KeyboardInterrupt:
        return 0
    finally:
        with contextlib.suppress(AttributeError):  # it failed before there was something to shut down
            helper.shutdown()


def _share_environment(config: Any) -> None:
    """Let Gym find this very environment where it would make one per server."""
    home = Path(sys.prefix)
    if not (home / "bin" / "activate").is_file():
        sys.exit(f"{home} is no virtual environment, and Gym's servers start in one: python3.12 -m venv .venv-gym")
    for server in _servers(config):
        _link(Path("venvs", server.kind, server.folder, ".venv"), home)


if __name__ == "__main__":
    sys.exit(main())
