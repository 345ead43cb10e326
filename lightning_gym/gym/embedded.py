"""EmbeddedGym: a small, real, Gym-compatible server in a process of its own, with nothing to install.

``python -m lightning_gym.gym.embedded`` is that process; it imports no torch, vllm, transformers or lightning.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from lightning_gym.errors import ConfigError, GymStartError
from lightning_gym.gym.environments import Environment, load_environment
from lightning_gym.gym.ready import ReadyFile
from lightning_gym.gym.supervisor import Supervised

SETTINGS_VARIABLE = "LIGHTNING_GYM_EMBEDDED"
"""The server process finds its settings here: the policy's key must not show up in a list of processes."""

_GRACE_S = 3.0


class EmbeddedGym:
    """Agents that play `environments`, over Gym's HTTP interface.

    Args:
        environments: what `load_environment` takes, or `Environment` classes that the server process can import.
        max_steps: model calls of one rollout; a policy that never stops calling tools is stopped here, as by
            simple_agent's option of that name.
        start_timeout_s: how long the server may take until its ports listen.

    Not covered, where Gym 0.4.0 does more: resources and model servers of their own, cookies, MCP tools, audio, Gym's
    own routes (``verify``, ``seed_session``) as tool names, tools other than functions.

    Example::

        with EmbeddedGym(["counter"]) as gym:
            head_url = gym.start(policy_url="http://127.0.0.1:8000/v1", api_key="...", model="policy", run_dir=run_dir)
    """

    def __init__(
        self,
        environments: Sequence[str | type[Environment]] = ("counter",),
        *,
        max_steps: int = 10,
        start_timeout_s: float = 30.0,
    ) -> None:
        if isinstance(environments, str) or not environments:
            raise ConfigError(f"environments: expected a list of at least one environment, got {environments!r}")
        if max_steps < 1:
            raise ConfigError(f"max_steps: expected at least 1 model call per rollout, got {max_steps}")
        self.environments = [_spec(environment) for environment in environments]
        self.max_steps = max_steps
        self.start_timeout_s = start_timeout_s
        self._server: Supervised | None = None
        names = [load_environment(spec).name for spec in self.environments]
        if len(set(names)) < len(names):
            raise ConfigError(f"environments: expected every name once, got {names}")

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        """Start the server and wait until it listens; again, if it has ended.

        Args:
            policy_url: our endpoint; ends with ``/v1``.
            run_dir: gets ``embedded_gym.log``.

        Returns:
            The head server's URL.

        Raises:
            GymStartError: it is running already, or did not come up; the message ends with its log's last lines.
        """
        if self._server is not None and self._server.poll() is None:
            raise GymStartError("the embedded Gym was started already: close it first, or make a new EmbeddedGym")
        self.close()
        if not policy_url.endswith("/v1"):
            raise ConfigError(f"policy_url: expected an URL that ends with '/v1', got {policy_url!r}")
        run_dir.mkdir(parents=True, exist_ok=True)
        log_path = run_dir / "embedded_gym.log"
        with ReadyFile(run_dir, log_path) as ready:
            settings = {
                "environments": self.environments,
                "policy_url": policy_url,
                "api_key": api_key,
                "model": model,
                "max_steps": self.max_steps,
                "ready_file": str(ready.path),
            }
            self._server = Supervised(
                [sys.executable, "-P", "-m", "lightning_gym.gym.embedded"],
                env=_child_environment(msgspec.json.encode(settings).decode()),
                cwd=Path.cwd(),
                log_path=log_path,
                grace_s=_GRACE_S,
            )
            try:
                said = ready.wait(self._server, name="the embedded Gym", timeout_s=self.start_timeout_s)
            except BaseException:
                self.close()
                raise
        return said["head_url"]

    def poll(self) -> int | None:
        """The server's exit code, or ``None`` while it runs or before it was started."""
        return self._server.poll() if self._server else None

    def close(self) -> None:
        """Stop the server, with its rollouts, within 5 seconds. Closing twice, or before `start`, is fine."""
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _spec(environment: str | type[Environment]) -> str:
    if isinstance(environment, str):
        return environment
    where = f"{environment.__module__}:{environment.__qualname__}"
    if environment.__module__ == "__main__" or "<locals>" in environment.__qualname__:
        raise ConfigError(
            f"environment {where}: the embedded Gym is another process and must be able to import the class; "
            "put it at the top level of a module of its own, and import it from there"
        )
    return where


def _child_environment(settings: str) -> dict[str, str]:
    # Whatever the trainer can import, the server can: modules of the user's included.
    search_path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1", SETTINGS_VARIABLE: settings}


if __name__ == "__main__":
    from lightning_gym.gym.embedded_server import serve

    serve(os.environ.pop(SETTINGS_VARIABLE))
