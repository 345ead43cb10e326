"""Endpoint: the colocated engine as an OpenAI-compatible server on loopback, and the thread it runs on.

Its one job beyond OpenAI's is exactness: it puts the ids the engine was fed and the ids it sampled on the message
(`lightning_gym.gym.wire.TOKEN_BUNDLE`), writes every call into the ledger, and builds later prompts from emitted ids.
"""

import asyncio
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightning_gym.errors import ConfigError, EngineError, PromptTooLongError
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.engine import Engine, Generation, SamplingParams
from lightning_gym.policy.inbox import Inbox
from lightning_gym.policy.ledger import Entry, Ledger, Profile, Served
from lightning_gym.policy.replies import Refusal, body_of, json_object, json_reply, reply_to
from lightning_gym.policy.retries import ClientGoneError, PendingAnswers
from lightning_gym.policy.splice import Conversation, Spliced, Splicer, canonical_message, conversation
from lightning_gym.rollout import Call, SamplingProfile

_log = logging.getLogger(__name__)
_KEEP_ALIVE_S = 24 * 3600  # idle connections outlast any pause: a client reusing one that just closed sees a reset
_MAX_CONNECTIONS = 8192
_STOP_TIMEOUT_S = 5.0


@dataclass(slots=True)
class EndpointStats:
    """Counts since the start; read by anyone, written by the endpoint's thread."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    encoded_tokens: int = 0
    """Prompt tokens that had to be tokenized; the rest was known from earlier calls."""
    generated_tokens: int = 0
    splice_breaks: dict[str, int] = field(default_factory=dict)


class Endpoint:
    """Serves `engine` on ``http://host:port/v1``.

    Args:
        engine: what samples.
        model_path: directory with the tokenizer and its chat template.
        ledger: where every call of an opened rollout is written.
        profiles: sampling of train and eval rollouts; contradicting requests are refused.
        model_name: what ``/v1/models`` lists; ``<name>-eval`` is the eval profile, for clients without a rollout id.
        host: loopback unless you know why not; requests need the bearer token either way.
        port: 0 picks a free one.
        api_key: bearer token; ``None`` makes a random one.

    Raises:
        ConfigError: the port is taken, or the model has no usable chat template.
    """

    def __init__(
        self,
        engine: Engine,
        model_path: Path,
        ledger: Ledger,
        *,
        profiles: Mapping[Profile, SamplingProfile],
        model_name: str = "policy",
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
    ) -> None:
        self.model_name = model_name
        self.api_key = api_key or secrets.token_urlsafe(24)
        self.stats = EndpointStats()
        self.chat = ChatFormat(model_path)
        self._engine = engine
        self._ledger = ledger
        self._profiles = profiles
        self._splicer = Splicer(self.chat)
        self._num_submitted = 0
        self._inbox = Inbox()
        self._answers: PendingAnswers[dict[str, Any]] = PendingAnswers()
        self._socket = _bind(host, port)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}/v1"
        self._server: uvicorn.Server
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve from now on."""
        config = uvicorn.Config(
            self._app(),
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
            server_header=False,
            date_header=False,
        )
        self._server = uvicorn.Server(config)
        ready: Future[None] = Future()

        async def serve() -> None:
            self._inbox.loop = asyncio.get_running_loop()
            ready.set_result(None)
            await self._server.serve(sockets=[self._socket])

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())

        self._thread = threading.Thread(target=run, name="lightning-gym-http", daemon=True)
        self._thread.start()
        ready.result()

    def close(self) -> None:
        """Stop serving; bounded, idempotent."""
        if self._thread is None:
            self._socket.close()
            return
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("the endpoint's thread did not stop within %.0f s", _STOP_TIMEOUT_S)
        self._socket.close()

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self._chat_completions), methods=["POST"]),
                Route("/tokenize", self._guarded(self._tokenize), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models), methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
            ]
        )

    def _guarded(self, handler: Any) -> Any:
        """Authenticate, decode, and turn refusals into OpenAI-shaped errors."""
        expected = f"Bearer {self.api_key}".encode()

        async def handle(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").encode()
                if not hmac.compare_digest(given, expected):
                    raise Refusal(401, "the bearer token is missing or wrong")
                if request.method == "GET":
                    return json_reply(await handler({}))
                return json_reply(await self._once(request, await body_of(request), handler))
            except (Refusal, EngineError, ClientGoneError) as error:
                self.stats.refused += 1
                return reply_to(error)

        return handle

    async def _once(self, request: Request, raw: bytes, handler: Any) -> Any:
        """The handler's answer, shared with an identical request of the same rollout that is still unanswered."""
        body = json_object(raw)
        rollout_id = body.get(wire.ROLLOUT_ID)
        key = (request.url.path, raw) if isinstance(rollout_id, str) else object()

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return await self._answers.answer(key, lambda: handler(body), gone)

    async def _health(self, _request: Request) -> Response:
        return json_reply({"status": "ok", "weight_version": self._engine.weight_version})

    async def _models(self, _body: Mapping[str, Any]) -> dict[str, Any]:
        names = (self.model_name, f"{self.model_name}-eval")
        limit = self._engine.max_model_len
        data = [{"id": name, "object": "model", "owned_by": "lightning-gym", "max_model_len": limit} for name in names]
        return {"object": "list", "data": data}

    async def _tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if "messages" in body:
            said = _said(body)
            ids = self._splice(body, said, self._entry(body)).prompt_ids
        elif isinstance(body.get("prompt"), str):
            ids = self.chat.encode(body["prompt"])
        else:
            raise Refusal(400, "expected `messages` (a list) or `prompt` (a string)")
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine.max_model_len}

    async def _chat_completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.stats.requests += 1
        said = _said(body)
        entry = self._entry(body)
        profile = self._profile(body, entry)
        spliced = self._splice(body, said, entry)
        index = entry.calls_started if entry else 0
        if entry:
            entry.calls_started += 1
            if spliced.broke:
                entry.breaks.append(spliced.broke)
                kind = spliced.broke.kind
                self.stats.splice_breaks[kind] = self.stats.splice_breaks.get(kind, 0) + 1
        seed = call_seed(entry.seed, index) if entry else body.get("seed") or self._num_submitted
        sampling = self._sampling(body, profile, spliced.prompt_ids, seed=seed)
        generation = await self._generate(spliced.prompt_ids, sampling)
        message = self._message(generation, f"{index}-{self._num_submitted}")
        self._record(entry, index, said, spliced, generation, message)
        return self._completion(body, message, spliced.prompt_ids, generation)

    def _entry(self, body: Mapping[str, Any]) -> Entry | None:
        """The page of the request's rollout; ``None`` for a client that plays no rollout of ours."""
        rollout_id = body.get(wire.ROLLOUT_ID)
        if rollout_id is None:
            return None
        entry = self._ledger.get(rollout_id) if isinstance(rollout_id, str) else None
        if entry is None or entry.expired:
            raise Refusal(410, f"rollout {rollout_id} is over; nobody waits for this answer")
        return entry

    def _profile(self, body: Mapping[str, Any], entry: Entry | None) -> SamplingProfile:
        if entry:
            name = entry.profile
        else:
            name: Profile = "eval" if body.get("model") == f"{self.model_name}-eval" else "train"
        profile = self._profiles[name]
        for key in ("temperature", "top_p", "top_k"):
            pinned, asked = getattr(profile, key), body.get(key)
            if asked is not None and asked != pinned:
                message = (
                    f"`{key}` is {asked} but the {name} profile samples with {pinned}; leave it out or set {pinned}"
                )
                raise Refusal(422, message)
        return profile

    def _splice(self, body: Mapping[str, Any], said: Conversation, entry: Entry | None) -> Spliced:
        try:
            spliced = self._splicer.splice(body, said, entry.served if entry else ())
        except ConfigError as error:
            raise Refusal(400, str(error)) from error
        self.stats.prompt_tokens += len(spliced.prompt_ids)
        self.stats.encoded_tokens += spliced.num_encoded
        return spliced

    def _sampling(
        self, body: Mapping[str, Any], profile: SamplingProfile, prompt_ids: list[int], *, seed: int
    ) -> SamplingParams:
        limit = self._engine.max_model_len
        room = limit - len(prompt_ids)
        if room < 1:
            raise PromptTooLongError(
                f"This model's maximum context length is {limit} tokens, and the prompt has {len(prompt_ids)}."
            )
        asked = body.get("max_completion_tokens", body.get("max_tokens"))
        if asked is not None and (not isinstance(asked, int) or asked < 1):
            raise Refusal(422, f"the completion's token limit must be a positive integer, got {asked!r}")
        if not isinstance(seed, int):
            raise Refusal(422, f"`seed` must be an integer, got {seed!r}")
        limits = [room, *(n for n in (asked, profile.max_output_tokens) if n is not None)]
        return SamplingParams(
            temperature=profile.temperature,
            top_p=profile.top_p,
            top_k=profile.top_k,
            max_tokens=min(limits),
            seed=seed,
            stop_token_ids=self.chat.stop_ids,
        )

    async def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Generation:
        self._num_submitted += 1
        request_id = f"chat-{self._num_submitted}"
        future: asyncio.Future[Generation] = self._inbox.loop.create_future()
        self._engine.generate(request_id, prompt_ids, sampling, lambda result: self._inbox.put(future, result))
        try:
            return await future
        except asyncio.CancelledError:
            self._engine.abort(request_id)
            raise

    def _message(self, generation: Generation, call_id: str) -> dict[str, Any]:
        parsed = self.chat.parse(generation.token_ids)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning:
            message["reasoning_content"] = message["reasoning"] = parsed.reasoning
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call-{call_id}-{i}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for i, call in enumerate(parsed.tool_calls)
            ]
        return message

    def _record(
        self,
        entry: Entry | None,
        index: int,
        said: Conversation,
        spliced: Spliced,
        generation: Generation,
        message: Mapping[str, Any],
    ) -> None:
        self.stats.generated_tokens += len(generation.token_ids)
        if entry is None:
            return
        call = Call(
            index=index,
            prompt_ids=spliced.prompt_ids,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=generation.weight_version,
        )
        reply = canonical_message(message)
        entry.served.append(Served(call=call, messages=said.messages, reply=reply, context=said.context))

    def _completion(
        self, body: Mapping[str, Any], message: dict[str, Any], prompt_ids: list[int], generation: Generation
    ) -> dict[str, Any]:
        finish_reason = generation.finish_reason
        if finish_reason == "stop" and "tool_calls" in message:
            finish_reason = "tool_calls"
        num_prompt, num_sampled = len(prompt_ids), len(generation.token_ids)
        bundle = {
            wire.PROMPT_TOKEN_IDS: prompt_ids,
            wire.GENERATION_TOKEN_IDS: generation.token_ids,
            wire.GENERATION_LOG_PROBS: generation.logprobs,
        }
        return {
            "id": f"chatcmpl-{self._num_submitted}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model") or self.model_name,
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message | bundle}],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_sampled,
                "total_tokens": num_prompt + num_sampled,
            },
            "weight_version": generation.weight_version,
        }


def _said(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a chat request that this endpoint can answer."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise Refusal(400, "expected `messages`, a list of one or more objects with a `role`")
    if body.get("stream"):
        raise Refusal(400, "`stream` is not supported; leave it out")
    if body.get("n") not in (None, 1):
        raise Refusal(400, f"`n` is {body['n']}; one completion a request is supported")
    try:
        return conversation(body)
    except (AttributeError, KeyError, TypeError) as error:
        raise Refusal(400, f"a message does not have the shape of OpenAI's: {error!r}") from error


def call_seed(rollout_seed: int, index: int) -> int:
    """The seed of a rollout's call: equal for the same run, rollout and call, whatever else is being decoded."""
    return (rollout_seed * 1_000_003 + index * 7_919) % (1 << 63)


def _bind(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"the endpoint cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
