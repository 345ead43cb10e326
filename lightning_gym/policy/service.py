"""PolicyService: answers to OpenAI requests, as plain dictionaries; HTTP is the endpoint's business.

Its one job beyond OpenAI's is exactness: it puts the ids the engine was fed and the ids it sampled on the message
(`lightning_gym.gym.wire.TOKEN_BUNDLE`), writes every call into the ledger, and builds later prompts from emitted ids.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError, PromptTooLongError
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.engine import Engine, Generation, SamplingParams
from lightning_gym.policy.inbox import Inbox
from lightning_gym.policy.ledger import Entry, Ledger, Profile, Served
from lightning_gym.policy.replies import Refusal
from lightning_gym.policy.splice import Conversation, Spliced, Splicer, canonical_message, conversation
from lightning_gym.rollout import Call, SamplingProfile

_CONSTRAINTS = ("response_format", "guided_json", "guided_regex", "guided_choice", "structured_outputs", "logit_bias")


@dataclass(slots=True)
class ServiceStats:
    """Counts since the start; read by anyone, written by the endpoint's thread."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    encoded_tokens: int = 0
    """Prompt tokens that had to be tokenized; the rest was known from earlier calls."""
    generated_tokens: int = 0
    waiting: int = 0
    """Requests that the engine has not answered yet."""
    sync_seconds: float = 0.0
    """Spent on weight syncs; written by the trainer's thread."""
    splice_breaks: dict[str, int] = field(default_factory=dict)


class PolicyService:
    """Answers requests with what `engine` samples. Belongs to the endpoint's event loop.

    Args:
        engine: what samples.
        model_path: directory with the tokenizer and its chat template.
        ledger: where every call of an opened rollout is written.
        profiles: sampling of train and eval rollouts; contradicting requests are refused.
        model_name: what is listed; ``<name>-eval`` is the eval profile, for clients without a rollout id.
        inbox: brings the engine's results to the event loop.

    Raises:
        ConfigError: the model has no usable chat template.
    """

    def __init__(
        self,
        engine: Engine,
        model_path: Path,
        ledger: Ledger,
        profiles: Mapping[Profile, SamplingProfile],
        *,
        model_name: str,
        inbox: Inbox,
    ) -> None:
        self.model_name = model_name
        self.stats = ServiceStats()
        self.chat = ChatFormat(model_path)
        self._engine = engine
        self._ledger = ledger
        self._profiles = profiles
        self._splicer = Splicer(self.chat)
        self._num_submitted = 0
        self._inbox = inbox

    async def health(self, _body: Mapping[str, Any]) -> dict[str, Any]:
        """``GET /health``."""
        return {"status": "ok", "weight_version": self._engine.weight_version}

    def metrics(self) -> str:
        """``GET /metrics``, in Prometheus' text format."""
        stats = self.stats
        version = self._engine.weight_version
        lines = [
            f"lightning_gym_requests_total {stats.requests}",
            f"lightning_gym_refused_total {stats.refused}",
            f"lightning_gym_prompt_tokens_total {stats.prompt_tokens}",
            f"lightning_gym_encoded_tokens_total {stats.encoded_tokens}",
            f"lightning_gym_generated_tokens_total {stats.generated_tokens}",
            f"lightning_gym_waiting_requests {stats.waiting}",
            f"lightning_gym_open_rollouts {len(self._ledger)}",
            f"lightning_gym_sync_seconds_total {stats.sync_seconds}",
            *([] if version is None else [f"lightning_gym_weight_version {version}"]),
            *(f'lightning_gym_splice_breaks_total{{kind="{k}"}} {n}' for k, n in sorted(stats.splice_breaks.items())),
        ]
        return "\n".join(lines) + "\n"

    async def models(self, _body: Mapping[str, Any]) -> dict[str, Any]:
        """``GET /v1/models``."""
        names = (self.model_name, f"{self.model_name}-eval")
        limit = self._engine.max_model_len
        data = [{"id": name, "object": "model", "owned_by": "lightning-gym", "max_model_len": limit} for name in names]
        return {"object": "list", "data": data}

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /tokenize``: of messages, exactly the ids that a chat completion would be given."""
        if "messages" in body:
            said = _said(body)
            ids = self._splice(body, said, self._entry(body)).prompt_ids
        elif isinstance(body.get("prompt"), str):
            ids = self.chat.encode(body["prompt"])
        else:
            raise Refusal(400, "expected `messages` (a list) or `prompt` (a string)")
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine.max_model_len}

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /detokenize``: text of ids, special tokens included."""
        return {"prompt": self.chat.decode(_token_ids(body, "tokens"))}

    async def completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /v1/completions``: a text or a list of ids, continued; outside of any rollout."""
        self.stats.requests += 1
        _refuse_unsupported(body)
        prompt = body.get("prompt")
        prompt_ids = self.chat.encode(prompt) if isinstance(prompt, str) else _token_ids(body, "prompt")
        self.stats.prompt_tokens += len(prompt_ids)
        number = self._number()
        sampling = self._sampling(
            body, self._profile(body, None), prompt_ids, seed=_asked(body, "seed", default=number)
        )
        generation = await self._generate(number, prompt_ids, sampling)
        self.stats.generated_tokens += len(generation.token_ids)
        choice = {
            "index": 0,
            "text": self.chat.decode(self.chat.words(generation.token_ids)),
            "finish_reason": generation.finish_reason,
            "token_ids": generation.token_ids,
            "logprobs": {"token_logprobs": generation.logprobs},
        }
        completion = self._envelope(number, body, "text_completion", choice, prompt_ids, generation)
        return completion | {wire.PROMPT_TOKEN_IDS: prompt_ids}

    async def chat_completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /v1/chat/completions``."""
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
        number = self._number()
        seed = call_seed(entry.seed, index) if entry else _asked(body, "seed", default=number)
        sampling = self._sampling(body, profile, spliced.prompt_ids, seed=seed)
        generation = await self._generate(number, spliced.prompt_ids, sampling)
        message = self._message(number, generation)
        self._record(entry, index, said, spliced, generation, message)
        return self._completion(number, body, message, spliced.prompt_ids, generation)

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
        asked = _asked(body, "max_completion_tokens", "max_tokens")
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

    def _number(self) -> int:
        """A number of its own for every call: ids of requests and tool calls are made from it."""
        self._num_submitted += 1
        return self._num_submitted

    async def _generate(self, number: int, prompt_ids: list[int], sampling: SamplingParams) -> Generation:
        request_id = f"call-{number}"
        future: asyncio.Future[Generation] = self._inbox.loop.create_future()
        self._engine.generate(request_id, prompt_ids, sampling, lambda result: self._inbox.put(future, result))
        self.stats.waiting += 1
        try:
            return await future
        except asyncio.CancelledError:
            self._engine.abort(request_id)
            raise
        finally:
            self.stats.waiting -= 1

    def _message(self, number: int, generation: Generation) -> dict[str, Any]:
        parsed = self.chat.parse(generation.token_ids)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning:
            message["reasoning_content"] = message["reasoning"] = parsed.reasoning
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call-{number}-{i}",
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
        self,
        number: int,
        body: Mapping[str, Any],
        message: dict[str, Any],
        prompt_ids: list[int],
        generation: Generation,
    ) -> dict[str, Any]:
        finish_reason = generation.finish_reason
        if finish_reason == "stop" and "tool_calls" in message:
            finish_reason = "tool_calls"
        bundle = {
            wire.PROMPT_TOKEN_IDS: prompt_ids,
            wire.GENERATION_TOKEN_IDS: generation.token_ids,
            wire.GENERATION_LOG_PROBS: generation.logprobs,
        }
        choice = {"index": 0, "finish_reason": finish_reason, "message": message | bundle}
        return self._envelope(number, body, "chat.completion", choice, prompt_ids, generation)

    def _envelope(
        self,
        number: int,
        body: Mapping[str, Any],
        kind: str,
        choice: dict[str, Any],
        prompt_ids: list[int],
        generation: Generation,
    ) -> dict[str, Any]:
        num_prompt, num_sampled = len(prompt_ids), len(generation.token_ids)
        return {
            "id": f"cmpl-{number}",
            "object": kind,
            "created": int(time.time()),
            "model": body.get("model") or self.model_name,
            "choices": [choice],
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
    _refuse_unsupported(body)
    try:
        return conversation(body)
    except (AttributeError, KeyError, TypeError) as error:
        raise Refusal(400, f"a message does not have the shape of OpenAI's: {error!r}") from error


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    if body.get("stream"):
        raise Refusal(400, "`stream` is not supported; leave it out")
    if body.get("n") not in (None, 1):
        raise Refusal(400, f"`n` is {body['n']}; one completion a request is supported")
    for key in _CONSTRAINTS:
        if body.get(key):
            raise Refusal(400, f"`{key}` is not supported: a masked distribution is not the policy that is trained")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise Refusal(400, "a forced `tool_choice` is not supported; use `auto` and let the policy decide")


def _asked(body: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """The first of `keys` that the request sets; an explicit null sets nothing."""
    return next((body[key] for key in keys if body.get(key) is not None), default)


def _token_ids(body: Mapping[str, Any], key: str) -> list[int]:
    ids = body.get(key)
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise Refusal(400, f"expected `{key}`, a list of one or more token ids")
    return ids


def call_seed(rollout_seed: int, index: int) -> int:
    """The seed of a rollout's call: equal for the same run, rollout and call, whatever else is being decoded."""
    return (rollout_seed * 1_000_003 + index * 7_919) % (1 << 63)
