"""What a Gym's head server knows: which servers there are, whether they answer, and whose policy they ask.

Source: nemo-gym 0.4.0, ``nemo_gym/server_utils.py: HeadServer``.
"""

import hmac
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import yaml

from lightning_gym.errors import GymStartError

_log = logging.getLogger(__name__)
_MODELS = "responses_api_models"
_AGENTS = "responses_api_agents"
_ANSWER_TIMEOUT_S = 5.0
_RETRY_S = 0.1
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_TRAINING_CONFIG = "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One server of a Gym."""

    name: str
    """What `agent_ref` and the configuration call it."""
    url: str


class Head:
    """Reads a Gym's head server.

    Example::

        head = Head("http://127.0.0.1:11000")
        head.wait_until_ready(timeout_s=30.0)
        head.check_policy(policy_url="http://127.0.0.1:8000/v1", api_key="...", model="policy")
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the head server and every server that it lists answer ``GET /``.

        Raises:
            GymStartError: one of them does not, after `timeout_s`; says which.
        """
        deadline = time.monotonic() + timeout_s
        with _client() as client:
            for instance in self._instances(client, deadline):
                if not _answers(client, instance.url, deadline):
                    raise GymStartError(
                        f"Gym's server {instance.name} does not answer at {instance.url} within {timeout_s:g} s, "
                        f"though the head server {self.url} lists it; look into Gym's log"
                    )

    def _instances(self, client: httpx.Client, deadline: float) -> list[Instance]:
        problem: object = "not asked yet"
        while True:
            try:
                response = client.get(f"{self.url}/server_instances")
                response.raise_for_status()
                found = [Instance(name=entry["process_name"], url=entry["url"]) for entry in response.json()]
                # Gym lists nothing until it has started its servers.
                if found:
                    return found
                problem = "it lists no servers"
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                problem = repr(error)
            if time.monotonic() > deadline:
                raise GymStartError(
                    f"{self.url}/server_instances does not answer as a Gym head server does: {problem}; is that the "
                    "head server's address, and is Gym running?"
                )
            time.sleep(_RETRY_S)

    def config(self) -> Mapping[str, Any]:
        """Gym's global configuration. It may hold keys in clear: not for logs.

        Raises:
            GymStartError: the head server does not tell.
        """
        url = f"{self.url}/global_config_dict_yaml"
        try:
            with _client() as client:
                response = client.get(url)
            response.raise_for_status()
            config = yaml.safe_load(str(json.loads(response.text)))  # YAML inside a JSON string
        except (httpx.HTTPError, ValueError, yaml.YAMLError) as error:
            # Not the error's words: they may quote a key.
            raise GymStartError(f"{url} does not answer as a Gym head server does: {type(error).__name__}") from None
        if not isinstance(config, dict):
            raise GymStartError(f"{url}: expected a mapping, got {type(config).__name__}")
        return config

    def check_policy(self, *, policy_url: str, api_key: str, model: str) -> None:
        """Refuse a Gym whose model servers do not ask our endpoint in the way that training needs.

        Raises:
            GymStartError: says which setting of which model server is wrong, and what it has to be.
        """
        config = self.config()
        servers = list(_servers(config, _MODELS))
        ours = {
            name: settings for name, settings in servers if _same_url(policy_url) in _urls(config, settings["base_url"])
        }
        if not ours:
            asked = {name: _urls(config, settings["base_url"]) for name, settings in servers}
            raise GymStartError(
                f"no model server of the Gym at {self.url} asks our endpoint {policy_url}; they ask {asked}; start Gym "
                f"with policy_base_url={policy_url}, or let our endpoint listen where Gym asks (endpoint_port)"
            )
        for name, settings in ours.items():
            self._check_settings(f"Gym's model server {name}", config, settings, api_key=api_key, model=model)
        for name, settings in _servers(config, _AGENTS):
            asked = settings.get("model_server")
            if isinstance(asked, dict) and asked.get("name") not in ours:
                _log.warning("the agent %s asks %s, which is not the policy being trained", name, asked.get("name"))

    def _check_settings(
        self, where: str, config: Mapping[str, Any], settings: Mapping[str, Any], *, api_key: str, model: str
    ) -> None:
        if _resolved(config, settings.get("return_token_id_information")) is not True:
            raise GymStartError(
                f"{where} has return_token_id_information="
                f"{settings.get('return_token_id_information')!r}: rollouts would come back without the token ids that "
                f"training needs; set it to true, or use Gym's {_TRAINING_CONFIG}"
            )
        if _resolved(config, settings.get("uses_reasoning_parser")) is not True:
            raise GymStartError(
                f"{where} has uses_reasoning_parser={settings.get('uses_reasoning_parser')!r}: our endpoint splits "
                f"reasoning from the answer, and later turns would lose it; set it to true, or use Gym's "
                f"{_TRAINING_CONFIG}"
            )
        named = _resolved(config, settings.get("model"))
        if named != model:
            raise GymStartError(f"{where} asks for the model {named!r} and ours is {model!r}: set policy_model_name")
        key = _resolved(config, settings.get("api_key"))
        # A key that Gym reads from its own environment is not shown here.
        shown = isinstance(key, str) and "${" not in key
        if shown and not hmac.compare_digest(key.encode(), api_key.encode()):
            raise GymStartError(
                f"{where} has another key than our endpoint: set Gym's policy_api_key to the endpoint's"
            )


def _client() -> httpx.Client:
    # trust_env: a proxy must not be asked for a server on loopback.
    return httpx.Client(timeout=_ANSWER_TIMEOUT_S, trust_env=False)


def _answers(client: httpx.Client, url: str, deadline: float) -> bool:
    """Whether something speaks HTTP there; a server need not have a route at ``/``."""
    while True:
        try:
            client.get(url)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_RETRY_S)
        else:
            return True


def _servers(config: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and settings of the servers of one kind; Gym nests them as ``name: {kind: {folder: settings}}``."""
    for name, entry in config.items():
        implementations = entry.get(kind) if isinstance(entry, dict) else None
        for settings in (implementations or {}).values():
            if isinstance(settings, dict) and (kind == _AGENTS or "base_url" in settings):
                yield name, settings


def _urls(config: Mapping[str, Any], base_url: Any) -> list[str]:
    value = _resolved(config, base_url)
    return [_same_url(url) for url in (value if isinstance(value, list) else [value]) if isinstance(url, str)]


def _same_url(url: str) -> str:
    return url.rstrip("/").replace("//localhost", "//127.0.0.1")


def _resolved(config: Mapping[str, Any], value: Any) -> Any:
    """`value`, with OmegaConf's ``${a.b}`` followed as far as it names other keys.

    Example:
        >>> _resolved({"policy": {"url": ["u"]}, "base": "${policy.url}"}, "${base}")
        ['u']
    """
    seen: set[str] = set()
    while isinstance(value, str) and value not in seen and (reference := _REFERENCE.fullmatch(value)):
        seen.add(value)
        found: Any = config
        for key in reference[1].split("."):
            found = found.get(key) if isinstance(found, dict) else None
        value = found
    return value
