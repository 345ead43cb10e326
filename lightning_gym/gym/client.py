"""GymClient: one ``POST /run``, in and out, with our own timeout and a typed answer for everything that can go wrong.

Gym has no timeout of its own and never stops a rollout whose client has gone; it drops nothing and echoes little.
So results are matched by the request they answer, no cookies are kept (a shared session cookie would share an
environment's state between rollouts), and concurrency is bounded here.

httpx rides on aiohttp's transport: with a hundred requests in flight httpx's own pool costs milliseconds a request.
"""

import ast
import asyncio
import functools
import json
import time
from collections.abc import Mapping, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from lightning_gym.errors import ConfigError, GymError
from lightning_gym.gym import wire
from lightning_gym.rollout import Failure, FailureKind, Rollout, SamplingProfile

_CONNECT_TIMEOUT_S = 10.0
_TIMEOUT = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
_EXTENSIONS = {"timeout": _TIMEOUT.as_dict()}
_GATEWAY_ERRORS = frozenset((429, 502, 503, 504))
_MAX_HOPS = 5
_MAX_WORDS = 400
_OUR_TYPE = "invalid_request_error"  # of every refusal of our endpoint


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
        self.in_flight: dict[str, float] = {}
        """When each rollout that is being played was sent, by ``time.perf_counter``."""
        self._servers: dict[str, str] = {}
        self._head_url = head_url.rstrip("/")
        self._slots = asyncio.Semaphore(max_concurrency)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # httpx keeps a jar, aiohttp a second one

        def session() -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=max_concurrency)
            return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

        self._transport = AiohttpTransport(client=session)
        self._http = httpx.AsyncClient(transport=self._transport, timeout=_TIMEOUT, cookies=no_cookies)

    async def connect(self, head_url: str | None = None) -> None:
        """Ask the head server which agents there are.

        Args:
            head_url: of another head server, from now on.

        Raises:
            GymError: it does not answer as a Gym head server does.
        """
        if head_url is not None:
            self._head_url = head_url.rstrip("/")
        url = f"{self._head_url}/server_instances"
        try:
            response = await self._http.get(url, timeout=_CONNECT_TIMEOUT_S)
            response.raise_for_status()
            instances = response.json()
            self._servers = {instance["process_name"]: instance["url"] for instance in instances}
            self.agents = {
                instance["process_name"]: instance["url"]
                for instance in instances
                if instance["server_type"] == "responses_api_agents"
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise GymError(
                f"{url} does not answer as a Gym head server does: {error!r}; is `head_url` the head server's address?"
            ) from error

    async def answers(self, agent: str) -> bool:
        """Whether an agent's server, or what stands in front of it, has anything to say."""
        return agent in self.agents and await self._responds(self.agents[agent])

    async def silent(self) -> list[str]:
        """Names of the servers, agents or others, that have nothing to say."""
        servers = dict(self._servers)
        respond = await asyncio.gather(*map(self._responds, servers.values()))
        return [name for name, responds in zip(servers, respond, strict=True) if not responds]

    async def _responds(self, url: str) -> bool:
        try:
            response = await self._http.get(url, timeout=_CONNECT_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return response.status_code not in _GATEWAY_ERRORS

    async def run(
        self,
        agent: str,
        row: Mapping[str, Any],
        rollout_id: str,
        profile: SamplingProfile,
        seed: int,
        *,
        tell_policy: bool = True,
    ) -> tuple[wire.Played | Failure, float]:
        """Play one rollout.

        Args:
            agent: who plays it.
            row: of the dataset.
            rollout_id: what the endpoint's ledger knows it by.
            profile: how its turns are sampled.
            seed: of its first call.
            tell_policy: whether calls carry the rollout id; ``False`` where the endpoint keeps no page for it.

        Returns:
            What was played, or why it failed; and the seconds it took, waiting for a free slot excluded.
        """
        try:
            body = msgspec.json.encode(wire.run_request(row, rollout_id if tell_policy else None, profile, seed))
        except ConfigError as error:
            return Failure(kind=FailureKind.ENVIRONMENT, message=str(error)), 0.0
        async with self._slots:
            start = self.in_flight[rollout_id] = time.perf_counter()
            try:
                async with asyncio.timeout(self.rollout_timeout_s):
                    response = await self._post_run(f"{self.agents[agent]}/run", body)
                played = _read(response)
            except TimeoutError:
                message = f"no answer from {agent} within {self.rollout_timeout_s:g} s"
                played = Failure(kind=FailureKind.TIMEOUT, message=message)
            except httpx.TransportError as error:
                played = Failure(kind=FailureKind.INFRA, message=f"{agent}: {error!r}")
            finally:
                del self.in_flight[rollout_id]
            return played, time.perf_counter() - start

    async def _post_run(self, url: str, body: bytes) -> httpx.Response:
        """Past what a client adds to a transport: redirects, cookies and credentials, which cost as much again."""
        headers = {"content-type": "application/json"}
        request = httpx.Request("POST", _parsed(url), content=body, headers=headers, extensions=_EXTENSIONS)
        response = await self._transport.handle_async_request(request)
        try:
            await response.aread()
        finally:
            await response.aclose()
        return response

    async def aggregate(self, agent: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """What an agent's environment makes of several rollouts together, by Gym's names.

        Raises:
            GymError: the agent does not answer.
        """
        url = f"{self.agents[agent]}/aggregate_metrics"
        try:
            response = await self._http.post(url, json=wire.aggregate_request(rollouts), timeout=self.rollout_timeout_s)
            response.raise_for_status()
            return wire.read_aggregate_response(msgspec.json.decode(response.content))
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise GymError(f"{url} gives no metrics: {error!r}") from error

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()


@functools.lru_cache
def _parsed(url: str) -> httpx.URL:
    return httpx.URL(url)


def _read(response: httpx.Response) -> wire.Played | Failure:
    status = response.status_code
    if status != httpx.codes.OK:
        words = _unwrapped(response.text)
        kind = FailureKind.POLICY if _is_our_refusal(words) else FailureKind.ENVIRONMENT
        if status in _GATEWAY_ERRORS:
            kind = FailureKind.INFRA
        return Failure(kind=kind, message=f"HTTP {status}: {_cut(words)}")
    try:
        body = wire.decode_run_response(response.content)
        return wire.read_failure(body) or wire.read_run_response(body)
    except ValueError as error:  # msgspec's DecodeError is one
        return Failure(kind=FailureKind.ENVIRONMENT, message=str(error))


def _is_our_refusal(words: str) -> bool:
    """Whether an error's innermost words are the whole of what our endpoint answers when it refuses.

    An environment that speaks to a model of its own may quote such an error, or pass on OpenAI's, which has more keys
    and no number as its code.
    """
    try:
        error = msgspec.json.decode(words)["error"]
        return set(error) == {"message", "type", "code"} and (error["type"], type(error["code"])) == (_OUR_TYPE, int)
    except (msgspec.DecodeError, TypeError, KeyError):
        return False


def innermost(text: str, limit: int = _MAX_WORDS) -> str:
    r"""The innermost text of an error that crossed several Gym servers.

    Every hop answers with a JSON string that ends in ``calling an inner server: b'...'``, a Python bytes literal of
    what the next server answered.

    Example:
        >>> innermost("\"Hit an exception in Agent calling an inner server: b'no such count'\"")
        'no such count'
    """
    return _cut(_unwrapped(text), limit)


def _cut(text: str, limit: int = _MAX_WORDS) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _unwrapped(text: str) -> str:
    for _ in range(_MAX_HOPS):
        text = _json_text(text)
        _, found, literal = text.partition("calling an inner server: ")
        if not found:
            break
        try:
            text = ast.literal_eval(literal).decode(errors="replace")
        except (ValueError, SyntaxError, AttributeError):  # cut off, or worded otherwise: what there is says enough
            break
    return text


def _json_text(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
