"""validate: does an endpoint, a Gym, or a whole training set-up keep the contract that training on rollouts needs?

Every check says what it found and, where it failed, what to do. Checks of an endpoint and of a Gym go over HTTP and
work on anybody's; checks of the training side (`lightning_gym.validate_training`) need the model in this process.
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx

from lightning_gym.errors import GymError, LightningGymError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient
from lightning_gym.policy.breaks import first_difference
from lightning_gym.rollout import Call, Failure, Rollout, SamplingProfile
from lightning_gym.tasks import Task
from lightning_gym.trajectory import trajectories

_TIMEOUT_S = 120.0
_MAX_TOKENS = 16
_OVERFLOW_WORDS = "context length"
_TEXT = 'Grüße, 東京: {"n":  1}\n\tdone.'
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The outcome of one check."""

    name: str
    passed: bool | None
    """``None``: it does not apply here, and `found` says why."""
    found: str
    """Figures, or what was got instead of what was expected."""
    remedy: str = ""
    """What to do; empty where it passed."""


class CheckFailedError(LightningGymError):
    """A check's condition does not hold.

    Args:
        found: what was got, and what was expected.
        remedy: what to do about it.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


class NotApplicableError(LightningGymError):
    """A check has nothing to look at here."""


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run one check: it returns what it found, or raises one of the errors above."""
    try:
        return Check(name=name, passed=True, found=check())
    except NotApplicableError as reason:
        return Check(name=name, passed=None, found=str(reason))
    except CheckFailedError as failed:
        return Check(name=name, passed=False, found=str(failed), remedy=failed.remedy)
    except (httpx.HTTPError, LightningGymError, KeyError, TypeError, ValueError) as error:
        remedy = "the reply does not have the expected shape, or there is none: see the server's log"
        return Check(name=name, passed=False, found=f"{type(error).__name__}: {error}", remedy=remedy)


def check_table(checks: Iterable[Check]) -> str:
    """The checks as text: one line each, and the remedy below what failed."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines: list[str] = []
    for check in checks:
        word = {True: "PASS", False: "FAIL", None: "skip"}[check.passed]
        lines.append(f"{word}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            lines.append(f"      {'':<{width}}  -> {check.remedy}")
    return "\n".join(lines)


def check_json(checks: Iterable[Check]) -> str:
    """The checks as a JSON list."""
    return json.dumps([asdict(check) for check in checks], ensure_ascii=False)


class EndpointChecks:
    """Checks of an OpenAI-compatible endpoint that is to serve a policy being trained.

    Args:
        url: base URL, ``/v1`` included.
        api_key: bearer token.
        model: which model to ask; ``None`` takes the first of ``/v1/models``.
    """

    def __init__(self, url: str, *, api_key: str, model: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(headers={"authorization": f"Bearer {api_key}"}, timeout=_TIMEOUT_S)
        self._model = model
        self._max_model_len: int | None = None
        self._first: dict[str, Any] = {}
        """Request and reply of the first chat, for the checks that build on it."""

    def run(self) -> list[Check]:
        """All of them, in an order in which the first failure is the one to look at."""
        checks = {
            "endpoint: models": self._models,
            "endpoint: chat": self._chat,
            "endpoint: tools": self._tools,
            "endpoint: token bundle": self._bundle,
            "endpoint: tokenize": self._tokenize,
            "endpoint: token round trip": self._round_trip,
            "endpoint: second turn": self._second_turn,
            "endpoint: edited history": self._edited_history,
            "endpoint: overflow": self._overflow,
            "endpoint: bad request": self._bad_request,
        }
        with self._http:
            return [run_check(name, check) for name, check in checks.items()]

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self._http.post(f"{self._url}{path}", json={"model": self._model, **body})

    def _ask(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        response = self._post("/v1/chat/completions", {"messages": messages, "max_tokens": _MAX_TOKENS, **more})
        if response.status_code != httpx.codes.OK:
            raise CheckFailedError(
                f"HTTP {response.status_code}: {response.text[:200]}", "a plain chat request must be answered with 200"
            )
        return response.json()

    def _models(self) -> str:
        response = self._http.get(f"{self._url}/v1/models")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise CheckFailedError("HTTP 401", "pass the endpoint's bearer token with --api-key")
        listed = response.raise_for_status().json()["data"]
        if not listed:
            raise CheckFailedError("no model is listed", "the endpoint serves nothing; look at its log")
        chosen = next((one for one in listed if self._model in (None, one["id"])), None)
        if chosen is None:
            names = ", ".join(one["id"] for one in listed)
            raise CheckFailedError(f"{self._model!r} is not among {names}", "name one of these with --served-model")
        self._model = chosen["id"]
        self._max_model_len = chosen.get("max_model_len")
        return f"{self._model}, window of {self._max_model_len} tokens"

    def _chat(self) -> str:
        messages = [{"role": "user", "content": _TEXT}]
        reply = self._ask(messages)
        choice = reply["choices"][0]
        self._first = {"messages": messages, "message": choice["message"], "finish_reason": choice["finish_reason"]}
        if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
            raise CheckFailedError(
                f"finish_reason is {choice['finish_reason']!r}", "Gym expects stop, length or tool_calls"
            )
        return f"{reply['usage']['completion_tokens']} tokens, finish_reason {choice['finish_reason']}"

    def _tools(self) -> str:
        messages = self._first_messages()
        without = self._ask(messages)["usage"]["prompt_tokens"]
        with_tools = self._ask(messages, tools=[_TOOL])["usage"]["prompt_tokens"]
        if with_tools <= without:
            raise NotApplicableError("the chat template does not write `tools`, so the policy does not see them")
        return f"a tool adds {with_tools - without} prompt tokens"

    def _bundle(self) -> str:
        bundle = self._first_bundle()
        return f"{len(bundle.prompt_ids)} prompt ids, {len(bundle.token_ids)} sampled ids with logprobs"

    def _tokenize(self) -> str:
        messages, bundle = self._first_messages(), self._first_bundle()
        response = self._post("/tokenize", {"messages": messages})
        if response.status_code == httpx.codes.NOT_FOUND:
            raise NotApplicableError("no /tokenize; Gym asks for it only where the token bundle is missing")
        tokens = response.raise_for_status().json()["tokens"]
        if tokens != bundle.prompt_ids:
            raise CheckFailedError(
                f"/tokenize gives {len(tokens)} ids, the chat was prompted with {len(bundle.prompt_ids)} others",
                "both must render and tokenize alike (generation prompt, tools, special tokens)",
            )
        return f"{len(tokens)} ids, those of the chat's prompt"

    def _round_trip(self) -> str:
        tokens = self._post("/tokenize", {"prompt": _TEXT}).raise_for_status().json()["tokens"]
        response = self._post("/detokenize", {"tokens": tokens})
        if response.status_code == httpx.codes.NOT_FOUND:
            raise NotApplicableError("no /detokenize")
        text = response.raise_for_status().json()["prompt"]
        if text.strip() != _TEXT:
            raise CheckFailedError(f"{_TEXT!r} came back as {text!r}", "the tokenizer drops or changes text")
        return f"{len(_TEXT)} characters, {len(tokens)} tokens"

    def _second_turn(self) -> str:
        first = self._first_bundle()
        history = [*self._first_messages(), self._first["message"], {"role": "user", "content": "Go on."}]
        second = _bundle_of(self._ask(history)["choices"][0]["message"])
        before = [*first.prompt_ids, *first.token_ids]
        if second.prompt_ids[: len(before)] != before:
            at = first_difference(before, second.prompt_ids)
            raise CheckFailedError(
                f"the second prompt leaves the first turn's ids at token {at} of {len(before)}",
                "the history was tokenized again; the endpoint has to continue the ids that it emitted",
            )
        return f"{len(before)} ids carried over, {len(second.prompt_ids) - len(before)} new"

    def _edited_history(self) -> str:
        first = self._first_bundle()
        edited = [{"role": "user", "content": "Something else."}, self._first["message"]]
        second = _bundle_of(self._ask([*edited, {"role": "user", "content": "Go on."}])["choices"][0]["message"])
        if second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids:
            raise CheckFailedError(
                "a history whose first message was edited is prompted with the old one",
                "continue emitted ids only where the whole history before them is unchanged",
            )
        return "rendered anew"

    def _overflow(self) -> str:
        if not self._max_model_len:
            raise NotApplicableError("/v1/models does not give max_model_len")
        too_long = [{"role": "user", "content": "word " * (self._max_model_len + 1)}]
        response = self._post("/v1/chat/completions", {"messages": too_long})
        if response.status_code != httpx.codes.BAD_REQUEST or _OVERFLOW_WORDS not in response.text:
            raise CheckFailedError(
                f"HTTP {response.status_code}: {response.text[:120]}",
                'answer a prompt over the window with 400 and "maximum context length": Gym then ends the rollout',
            )
        return 'HTTP 400, "maximum context length"'

    def _bad_request(self) -> str:
        response = self._post("/v1/chat/completions", {"messages": []})
        client_error = httpx.codes.is_client_error(response.status_code)
        if not client_error or _OVERFLOW_WORDS in response.text or "max_tokens" in response.text:
            raise CheckFailedError(
                f"HTTP {response.status_code}: {response.text[:120]}",
                "answer with 4xx and without the overflow words: Gym retries 500 and scores an overflow as empty",
            )
        return f"HTTP {response.status_code}"

    def _first_messages(self) -> list[dict[str, Any]]:
        if not self._first:
            raise NotApplicableError("there is no first answer to go on from")
        return self._first["messages"]

    def _first_bundle(self) -> wire.Bundle:
        self._first_messages()
        return _bundle_of(self._first["message"])


def _bundle_of(message: Mapping[str, Any]) -> wire.Bundle:
    """The message's token bundle, checked."""
    missing = [key for key in wire.TOKEN_BUNDLE if not isinstance(message.get(key), list)]
    if missing:
        raise CheckFailedError(
            f"the message has no {', '.join(missing)}", "training needs the sampled ids and logprobs on the message"
        )
    prompt_ids, token_ids, logprobs = (message[key] for key in wire.TOKEN_BUNDLE)
    if not token_ids or len(token_ids) != len(logprobs):
        raise CheckFailedError(
            f"{len(token_ids)} sampled ids, {len(logprobs)} logprobs",
            "one logprob for every sampled id, turn end included",
        )
    bad = [value for value in logprobs if not math.isfinite(value) or value > 1e-6]
    if bad:
        raise CheckFailedError(f"a logprob is {bad[0]}", "logprobs are finite numbers of nats, at most 0")
    return wire.Bundle(prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs)


def check_gym(head_url: str, tasks: Sequence[Task], profile: SamplingProfile, *, timeout_s: float) -> list[Check]:
    """Checks of a running Gym, by playing every task once.

    Args:
        head_url: of its head server.
        tasks: few; each is one ``/run``.
        profile: how to sample.
        timeout_s: of one rollout.
    """
    return asyncio.run(_check_gym(head_url, tasks, profile, timeout_s))


async def _check_gym(head_url: str, tasks: Sequence[Task], profile: SamplingProfile, timeout_s: float) -> list[Check]:
    client = GymClient(head_url, rollout_timeout_s=timeout_s)
    try:
        try:
            await client.connect()
        except GymError as error:
            return [Check(name="gym: head server", passed=False, found=str(error), remedy="start Gym, or mend its URL")]
        head = Check(name="gym: head server", passed=True, found=f"agents: {', '.join(sorted(client.agents))}")
        unknown = sorted({task.agent for task in tasks} - client.agents.keys())
        if unknown:
            remedy = "add their environments to the Gym, or mend the rows' agent_ref"
            found = f"no agent is called {', '.join(unknown)}"
            return [head, Check(name="gym: agents of the rows", passed=False, found=found, remedy=remedy)]
        plays = [
            client.run(task.agent, task.row, f"validate-{task.index}", profile, task.index, tell_policy=False)
            for task in tasks
        ]
        played = [outcome for outcome, _ in await asyncio.gather(*plays)]
    finally:
        await client.close()
    return [head, *check_rollouts([_rollout(task, one) for task, one in zip(tasks, played, strict=True)])]


def check_rollouts(rollouts: Sequence[Rollout]) -> list[Check]:
    """Checks of rollouts that were just played."""
    return [
        run_check("gym: /run gives a reward", lambda: _rewards(rollouts)),
        run_check("gym: token ids come back", lambda: _token_ids(rollouts)),
        run_check("gym: turns are contiguous", lambda: _contiguous(rollouts)),
    ]


def _rewards(rollouts: Sequence[Rollout]) -> str:
    failed = [(rollout.task_index, rollout.failure) for rollout in rollouts if rollout.failure]
    if failed:
        task, failure = failed[0]
        raise CheckFailedError(
            f"{len(failed)} of {len(rollouts)} failed; task {task}: {failure.kind.value}: {failure.message}",
            "the message is the innermost server's; its own log says more",
        )
    rewards = [rollout.reward or 0.0 for rollout in rollouts]
    return f"{len(rewards)} rollouts, rewards {min(rewards):g} to {max(rewards):g}"


def _token_ids(rollouts: Sequence[Rollout]) -> str:
    without = sorted({rollout.task_index for rollout in _came_back(rollouts) if not rollout.calls})
    if without:
        raise CheckFailedError(
            f"tasks {without} came back without token ids",
            "set `return_token_id_information: true` on Gym's model server, and use an agent that passes ids on",
        )
    return f"{sum(len(rollout.calls) for rollout in rollouts)} model calls"


def _contiguous(rollouts: Sequence[Rollout]) -> str:
    segments = [len(trajectories(rollout)) for rollout in _came_back(rollouts) if rollout.calls]
    broken = sum(count > 1 for count in segments)
    if not segments:
        raise NotApplicableError("no rollout came back with token ids")
    if broken:
        raise CheckFailedError(
            f"{broken} of {len(segments)} rollouts fall into several segments, {max(segments)} at most",
            "exact, but each segment is trained as a row of its own; `lightning-gym inspect` shows where they break",
        )
    return f"{len(segments)} rollouts, one segment each"


def _came_back(rollouts: Sequence[Rollout]) -> list[Rollout]:
    came_back = [rollout for rollout in rollouts if rollout.failure is None]
    if not came_back:
        raise NotApplicableError("no rollout came back")
    return came_back


def _rollout(task: Task, played: wire.Played | Failure) -> Rollout:
    """What came over the wire, without a ledger to compare it with."""
    rollout = Rollout(
        rollout_id=f"validate-{task.index}", task_index=task.index, group_id=task.index, attempt=0, agent=task.agent
    )
    if isinstance(played, Failure):
        return replace(rollout, failure=played)
    calls = [
        Call(
            index=index,
            prompt_ids=bundle.prompt_ids,
            token_ids=bundle.token_ids,
            logprobs=bundle.logprobs,
            finish_reason="length" if played.truncated else "stop",
            weight_version=0,
        )
        for index, bundle in enumerate(played.bundles)
    ]
    return replace(rollout, reward=played.reward, calls=calls)
