"""What a Gym is to the trainer, and the two ways to NeMo Gym's real servers: start them, or attach to running ones.

They run in a Python environment of their own, because Gym's pins exclude vLLM's, and are reached over HTTP only.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import msgspec

from lightning_gym.errors import ConfigError, GymStartError
from lightning_gym.gym.head import Head
from lightning_gym.gym.light_host import API_KEY_VARIABLE, SETTINGS_VARIABLE
from lightning_gym.gym.ready import ReadyFile
from lightning_gym.gym.supervisor import Supervised

PYTHON_VARIABLE = "LIGHTNING_GYM_GYM_PYTHON"
"""Names Gym's Python interpreter where the configuration does not."""

_log = logging.getLogger(__name__)
_DEFAULT_PYTHON = ".venv-gym/bin/python"
_MODEL_SERVERS = "responses_api_models"
_MODEL_CONFIG = f"{_MODEL_SERVERS}/vllm_model/configs/vllm_model_for_training.yaml"
_HOST = Path(__file__).with_name("light_host.py")
_LIGHT_GRACE_S = 3.0
_STOCK_GRACE_S = 16.0
_ATTACH_TIMEOUT_S = 10.0
_TESTED = "0.4."
# What would lead Gym's interpreter to the trainer's packages, or hand it another Gym's configuration.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "NEMO_GYM_CONFIG_DICT", "NEMO_GYM_CONFIG_PATH")


class Gym(Protocol):
    """A Gym that plays against our endpoint."""

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        """Start it, or attach to it, and wait until it answers.

        Args:
            policy_url: our endpoint, ending in ``/v1``.
            api_key: its bearer token.
            model: the name to ask it for.
            run_dir: where logs go.

        Returns:
            The head server's URL.

        Raises:
            GymStartError: it did not come up.
        """
        ...

    def close(self) -> None:
        """Stop what `start` started; bounded, idempotent. Then it may start again."""
        ...


@runtime_checkable
class SpawnedGym(Gym, Protocol):
    """A Gym that runs in processes of ours, which may end by themselves; then it can be started again."""

    def poll(self) -> int | None:
        """The exit code, or ``None`` while it runs or before it was started."""
        ...


class AttachedGym:
    """A Gym that somebody else started, with our endpoint as its policy, and will stop.

    Args:
        head_url: its head server, for example ``"http://127.0.0.1:11000"``.
        timeout_s: how long its servers may take to answer.
    """

    def __init__(self, head_url: str, *, timeout_s: float = _ATTACH_TIMEOUT_S) -> None:
        self.head_url = head_url
        self.timeout_s = timeout_s

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        """Check that it runs and asks our endpoint in the way that training needs.

        Raises:
            GymStartError: a server does not answer, or a setting of a model server is wrong; says which.
        """
        head = Head(self.head_url)
        head.wait_until_ready(self.timeout_s)
        head.check_policy(policy_url=policy_url, api_key=api_key, model=model)
        return head.url

    def close(self) -> None:
        """Leave it running."""


class NemoGym:
    """NeMo Gym's own servers, started from Gym's own Python environment and stopped with the trainer.

    Args:
        config_paths: Gym's YAML files. A relative path lies in Gym's tree, as in
            ``resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml``; an absolute one
            is yours, and a server of your own is found next to it (``<anything>/resources_servers/<name>/configs/``).
            Where none is of ``responses_api_models/``, Gym's ``vllm_model_for_training.yaml`` is added.
        ray: ``False``: all servers in one process, without Ray; starts in seconds. ``True``: a process per server and
            a Ray, as ``gym env start``: slower and larger, uses several cores, for environments that call Ray.
        python: Gym's interpreter; ``$LIGHTNING_GYM_GYM_PYTHON`` or ``.venv-gym/bin/python`` if ``None``.
        overrides: configuration on top of the files; keys may be dotted, as in
            ``{"my_agent.responses_api_agents.simple_agent.max_steps": 4}``. Write secrets as ``"${oc.env:NAME}"``: the
            head server shows its configuration to anyone on this machine, and Ray's way puts it on command lines.
        max_steps: model calls of one rollout, for agents that know such a limit and have none set; ``None`` leaves
            them without.
        start_timeout_s: how long the servers may take until all of them answer.

    Not covered: servers that need packages of their own (all of them run in `python`'s environment).

    Example::

        path = "resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml"
        with NemoGym([path]) as gym:
            head_url = gym.start(policy_url="http://127.0.0.1:8000/v1", api_key="...", model="policy", run_dir=run_dir)
    """

    def __init__(
        self,
        config_paths: Sequence[str | Path],
        *,
        ray: bool = False,
        python: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        max_steps: int | None = 10,
        start_timeout_s: float = 120.0,
    ) -> None:
        if isinstance(config_paths, str) or not config_paths:
            raise ConfigError(f"config_paths: expected a list of at least one path, got {config_paths!r}")
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"max_steps: expected at least 1 model call per rollout, or None, got {max_steps}")
        self.config_paths = _with_model_config([str(path) for path in config_paths])
        self.ray = ray
        self.python = gym_python(python)
        self.overrides = dict(overrides or {})
        self.max_steps = max_steps
        self.start_timeout_s = start_timeout_s
        self._host: Supervised | None = None

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        """Start the servers and wait until every one answers; again, if they have ended.

        Args:
            policy_url: our endpoint; ends with ``/v1``.
            run_dir: gets ``nemo_gym.log`` and Gym's working directory ``nemo_gym``.

        Returns:
            The head server's URL.

        Raises:
            ConfigError: a configuration file of the user's or Gym's interpreter does not exist.
            GymStartError: it is running already, or did not come up; the message ends with its log's last lines.
        """
        if self._host is not None and self._host.poll() is None:
            raise GymStartError("this Gym was started already: close it first, or make a new NemoGym")
        self.close()
        _check_files(self.config_paths, self.python)
        # Not the trainer's own directory: Gym would take a folder `benchmarks` there for its own.
        folder = run_dir.absolute() / "nemo_gym"
        folder.mkdir(parents=True, exist_ok=True)
        log_path = run_dir / "nemo_gym.log"
        deadline = time.monotonic() + self.start_timeout_s
        with ReadyFile(folder, log_path) as ready:
            settings = {
                "config_paths": self.config_paths,
                "policy_urls": [policy_url],
                "model": model,
                "overrides": self.overrides,
                "max_steps": self.max_steps,
                "ray": self.ray,
                "ready_file": str(ready.path),
            }
            self._host = Supervised(
                [str(self.python.absolute()), "-P", str(_HOST)],
                env=_host_environment(msgspec.json.encode(settings).decode(), api_key),
                cwd=folder,
                log_path=log_path,
                grace_s=_STOCK_GRACE_S if self.ray else _LIGHT_GRACE_S,
            )
            try:
                said = ready.wait(self._host, name="NeMo Gym", timeout_s=self.start_timeout_s)
                head = Head(said["head_url"])
                head.wait_until_ready(max(1.0, deadline - time.monotonic()))
                head.check_policy(policy_url=policy_url, api_key=api_key, model=model)
            except BaseException:
                self.close()
                raise
        _report_version(said["version"])
        return head.url

    def poll(self) -> int | None:
        """The exit code, or ``None`` while it runs or before it was started; it ends if one of its servers does."""
        return self._host.poll() if self._host else None

    def close(self) -> None:
        """Stop the servers, with their rollouts, within 5 seconds, or 18 with Ray. Closing twice is fine."""
        if self._host is not None:
            self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def gym_python(python: str | Path | None = None) -> Path:
    """Gym's interpreter: `python`, else what ``$LIGHTNING_GYM_GYM_PYTHON`` names, else ``.venv-gym/bin/python``."""
    return Path(python or os.environ.get(PYTHON_VARIABLE) or _DEFAULT_PYTHON)


def _with_model_config(paths: list[str]) -> list[str]:
    own = any(_MODEL_SERVERS in Path(path).parts for path in paths)
    return paths if own else [*paths, _MODEL_CONFIG]


def _check_files(config_paths: Sequence[str], python: Path) -> None:
    for path in config_paths:
        if Path(path).is_absolute() and not Path(path).is_file():
            raise ConfigError(f"config_paths: there is no file {path}")
    if not os.access(python, os.X_OK):
        raise ConfigError(
            f"there is no Python interpreter {python} to run NeMo Gym with: make one with `make setup-gym`, or "
            "`python3.12 -m venv .venv-gym && .venv-gym/bin/pip install nemo-gym==0.4.0`, or name yours in "
            f"${PYTHON_VARIABLE}"
        )


def _host_environment(settings: str, api_key: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1,localhost")))
    return inherited | {
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
        # Never a Ray that happens to run on this machine, the trainer's or a stale one.
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_MODE": "disabled",
        SETTINGS_VARIABLE: settings,
        API_KEY_VARIABLE: api_key,
    }


def _report_version(version: str) -> None:
    _log.info("nemo-gym %s is ready", version)
    if not version.startswith(_TESTED):
        _log.warning("nemo-gym %s: this package is tested with %sx", version, _TESTED)
