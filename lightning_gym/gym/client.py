"""GymClient: one ``POST /run``, in and out, with our own timeout and a typed answer for everything that can go wrong.

Gym has no timeout of its own and never stops a rollout whose client has gone; it drops nothing and echoes little.
So results are matched by the request they answer, no cookies are kept (a shared session cookie would share an
environment's state between rollouts), and concurrency is bounded here.

httpx rides on aiohttp's transport: with a hundred requests in flight httpx's own pool costs milliseconds a request.
"""

import ast
import asyncio
import json
import time
from collections.abc import Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from lightning_gym.errors import GymError
from lightning_gym.gym import wire
from lightning_gym.rollout import Failure, FailureKind, SamplingProfile

_CONNECT_TIMEOUT_S = 10.0
_GATEWAY_ERRORS = frozenset((429, 502, 503, 504))
_MAX_HOPS = 5
_OUR_ERROR = "invalid_request_error"  # the endpoint's error type; Gym nests the text, escaped once per hop


class GymClient:
    """Talks to the agents of one running Gym. Belongs to the event loop it was connected on.

    Args:
        head_url: Gym's head server, which knows every other server.
        max_concurrency: ``/run`` requests in flight.
        rollout_timeout_s: after this the rollout counts as failed; the caller has to tell the endpoint to refuse
            what it still sends.
    """

    def __init__(self, head_url: str, *, max_concurrency: int = 512, rollout_timeout_s: float = 600.0) -> None:
        self.agents: dict[str, str] = {}
        """Agent name -> base URL, known after `connect`."""
        self.rollout_timeout_s = rollout_timeout_s
        self._head_url = head_url.rstrip("/")
        self._slots = asyncio.Semaphore(max_concurrency)
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # httpx keeps a jar, aiohttp a second one

        def session() -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=max_concurrency)
            return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

        self._http = httpx.AsyncClient(transport=AiohttpTransport(client=session), timeout=timeout, cookies=no_cookies)

    async def connect(self) -> None:
        """Ask the head server which agents there are.

        Raises:
            GymError: it does not answer as a Gym head server does.
        """
        url = f"{self._head_url}/server_instances"
        try:
            response = await self._http.get(url, timeout=_CONNECT_TIMEOUT_S)
            response.raise_for_status()
            instances = response.json()
            self.agents = {
                instance["process_name"]: instance["url"]
                for instance in instances
                if instance["server_type"] == "responses_api_agents"
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise GymError(
                f"{url} does not answer as a Gym head server does: {error!r}; is `head_url` the head server's address?"
            ) from error

    async def run(
        self, agent: str, row: Mapping[str, Any], rollout_id: str, profile: SamplingProfile, seed: int
    ) -> tuple[wire.Played | Failure, float]:
        """Play one rollout.

        Returns:
            What was played, or why it failed; and the seconds it took, waiting for a free slot excluded.
        """
        body = msgspec.json.encode(wire.run_request(row, rollout_id, profile, seed))
        async with self._slots:
            start = time.perf_counter()
            try:
                async with asyncio.timeout(self.rollout_timeout_s):
                    response = await self._http.post(
                        f"{self.agents[agent]}/run", content=body, headers={"content-type": "application/json"}
                    )
                played = _read(response)
            except TimeoutError:
                message = f"no answer from {agent} within {self.rollout_timeout_s:g} s"
                played = Failure(kind=FailureKind.TIMEOUT, message=message)
            except httpx.TransportError as error:
                played = Failure(kind=FailureKind.INFRA, message=f"{agent}: {error!r}")
            return played, time.perf_counter() - start

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()


def _read(response: httpx.Response) -> wire.Played | Failure:
    status = response.status_code
    if status in _GATEWAY_ERRORS:
        return Failure(kind=FailureKind.INFRA, message=f"HTTP {status}: {innermost(response.text)}")
    if status != httpx.codes.OK:
        kind = FailureKind.POLICY if _OUR_ERROR in response.text else FailureKind.ENVIRONMENT
        return Failure(kind=kind, message=f"HTTP {status}: {innermost(response.text)}")
    try:
        return wire.read_run_response(msgspec.json.decode(response.content))
    except ValueError as error:  # msgspec's DecodeError is one
        return Failure(kind=FailureKind.ENVIRONMENT, message=str(error))


def innermost(text: str, limit: int = 400) -> str:
    r"""The innermost text of an error that crossed several Gym servers.

    Every hop answers with a JSON string that ends in ``calling an inner server: b'...'``, a Python bytes literal of
    what the next server answered.

    Example:
        >>> innermost("\"Hit an exception in Agent calling an inner server: b'no such count'\"")
        'no such count'
    """
    for _ in range(_MAX_HOPS):
        text = _json_text(text)
        _, found, literal = text.partition("calling an inner server: ")
        if not found:
            break
        try:
            text = ast.literal_eval(literal).decode(errors="replace")
        except (ValueError, SyntaxError, AttributeError):  # cut off, or worded otherwise: what there is says enough
            break
    return text if len(text) <= limit else text[:limit] + "..."


def _json_text(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
