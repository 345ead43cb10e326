"""PolicyService: answers to OpenAI requests, as dictionaries; HTTP is the endpoint's business.

Its one job beyond OpenAI's is exactness: it puts the ids the engine was fed and the ids it sampled on the message
(`lightning_gym.gym.wire.TOKEN_BUNDLE`), writes every call into the ledger, and builds later prompts from emitted ids.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from lightning_gym.errors import ConfigError, PromptTooLongError
from lightning_gym.gym import wire
from lightning_gym.gym.number_arrays import NumberArray
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.completion import chat_completion, message_of, text_completion
from lightning_gym.policy.conversation import Conversation, conversation, last_claim, said_by
from lightning_gym.policy.engine import Engine, Generation, SamplingParams
from lightning_gym.policy.inbox import Inbox
from lightning_gym.policy.ledger import Entry, Ledger, Profile, Served, shared_ids
from lightning_gym.policy.parsers import BUILTIN
from lightning_gym.policy.replies import Refusal
from lightning_gym.policy.requests import (
    asked_ids,
    asked_seed,
    refuse_contradictions,
    refuse_hopeless,
    refuse_unsupported,
    token_limit,
    with_reasoning_effort,
)
from lightning_gym.policy.splice import Spliced, Splicer
from lightning_gym.rollout import Call, SamplingProfile


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


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer."""

    body: dict[str, Any]
    """For `lightning_gym.policy.replies.json_reply`: logprobs are a `NumberArray`, written already."""
    delivered: Callable[[], None] = lambda: None
    """Called once, when a client gets it: a call that nobody got is no part of the rollout."""


class PolicyService:
    """Answers requests with what `engine` samples. Belongs to the endpoint's event loop.

    Args:
        engine: what samples.
        model_path: directory with the tokenizer and its chat template.
        ledger: where every call of an opened rollout is written.
        profiles: sampling of train and eval rollouts; contradicting requests are refused.
        model_name: what is listed; ``<name>-eval`` is the eval profile, for clients without a rollout id.
        tool_parser: how an agent sees tool calls, see `lightning_gym.policy.chat.ChatFormat`.
        reasoning_parser: how it sees reasoning.

    Raises:
        ConfigError: the model has no usable chat template, or a parser is unknown or does not fit it.
    """

    def __init__(
        self,
        engine: Engine,
        model_path: Path,
        ledger: Ledger,
        profiles: Mapping[Profile, SamplingProfile],
        *,
        model_name: str = "policy",
        tool_parser: str | None = BUILTIN,
        reasoning_parser: str | None = BUILTIN,
    ) -> None:
        self.model_name = model_name
        self._inbox = Inbox()
        self.stats = ServiceStats()
        self.chat = ChatFormat(model_path, tool_parser=tool_parser, reasoning_parser=reasoning_parser)
        self._engine = engine
        self._ledger = ledger
        self._profiles = profiles
        self._splicer = Splicer(self.chat, ledger.owner_of)
        self._num_submitted = 0

    def health(self) -> dict[str, Any]:
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
            f"lightning_gym_unparsed_total {self.chat.parser.num_unparsed}",
            f"lightning_gym_waiting_requests {stats.waiting}",
            f"lightning_gym_open_rollouts {len(self._ledger)}",
            f"lightning_gym_sync_seconds_total {stats.sync_seconds}",
            *([] if version is None else [f"lightning_gym_weight_version {version}"]),
            *(f'lightning_gym_splice_breaks_total{{kind="{k}"}} {n}' for k, n in sorted(stats.splice_breaks.items())),
        ]
        return "\n".join(lines) + "\n"

    def models(self) -> dict[str, Any]:
        """``GET /v1/models``."""
        names = (self.model_name, f"{self.model_name}-eval")
        limit = self._engine.max_model_len
        data = [{"id": name, "object": "model", "owned_by": "lightning-gym", "max_model_len": limit} for name in names]
        return {"object": "list", "data": data}

    async def tokenize(self, body: dict[str, Any]) -> Answer:
        """``POST /tokenize``: of messages, exactly the ids that a chat completion would be given."""
        limit = self._engine.max_model_len
        if "messages" in body:
            body = with_reasoning_effort(body)
            said, served = self._read(body, self._entry(body))
            ids = self._splice(body, said, served).prompt_ids
        elif isinstance(body.get("prompt"), str):
            ids = self._encode(body["prompt"])
        else:
            raise Refusal(400, "expected `messages` (a list) or `prompt` (a string)")
        return Answer({"tokens": ids, "count": len(ids), "max_model_len": limit})

    async def detokenize(self, body: dict[str, Any]) -> Answer:
        """``POST /detokenize``: text of ids, special tokens included."""
        return Answer({"prompt": self.chat.decode(asked_ids(body, "tokens", self.chat.num_ids))})

    async def completions(self, body: dict[str, Any]) -> Answer:
        """``POST /v1/completions``: a text or a list of ids, continued; outside of any rollout."""
        self.stats.requests += 1
        refuse_unsupported(body)
        if body.get("logprobs") not in (None, 0):
            raise Refusal(400, f"`logprobs` is {short(body['logprobs'])}, and only 0 is supported: the sampled tokens'")
        prompt = body.get("prompt")
        prompt_ids = self._encode(prompt) if isinstance(prompt, str) else asked_ids(body, "prompt", self.chat.num_ids)
        self.stats.prompt_tokens += len(prompt_ids)
        number = self._number()
        sampling = self._sampling(body, self._profile(body, None), prompt_ids, seed=asked_seed(body, number))
        generation = await self._generate(number, prompt_ids, sampling)
        self.stats.generated_tokens += len(generation.token_ids)
        return Answer(text_completion(self.chat, number, body, prompt_ids, generation, model=self.model_name))

    async def chat_completions(self, body: dict[str, Any]) -> Answer:
        """``POST /v1/chat/completions``."""
        self.stats.requests += 1
        body = with_reasoning_effort(body)
        entry = self._entry(body)
        said, served = self._read(body, entry)
        profile = self._profile(body, entry)
        spliced = self._splice(body, said, served)
        index = entry.calls_started if entry else 0
        number = self._number()
        seed = call_seed(entry.seed, index) if entry else asked_seed(body, number)
        sampling = self._sampling(body, profile, spliced.prompt_ids, seed=seed)  # an overflow is no call
        if spliced.broke:
            kind = spliced.broke.kind
            self.stats.splice_breaks[kind] = self.stats.splice_breaks.get(kind, 0) + 1
        if entry:
            entry.calls_started += 1
            if spliced.broke:
                entry.breaks.append(replace(spliced.broke, call_index=index))
        generation = await self._generate(number, spliced.prompt_ids, sampling)
        self.stats.generated_tokens += len(generation.token_ids)
        message = message_of(self.chat, number, body, generation)
        return Answer(
            chat_completion(self.chat, number, body, message, spliced.prompt_ids, generation, model=self.model_name),
            delivered=lambda: self._record(entry, index, said, spliced, generation, message),
        )

    def _entry(self, body: Mapping[str, Any]) -> Entry | None:
        """The page of the request's rollout; ``None`` for a client that plays no rollout of ours."""
        rollout_id = body.get(wire.ROLLOUT_ID)
        if rollout_id is None:
            return None
        entry = self._ledger.get(rollout_id) if isinstance(rollout_id, str) else None
        if entry is None:
            name = rollout_id if isinstance(rollout_id, str) else short(rollout_id)
            raise Refusal(410, f"rollout {name} is over; nobody waits for this answer")
        return entry

    def _profile(self, body: Mapping[str, Any], entry: Entry | None) -> SamplingProfile:
        if entry:
            name = entry.profile
        else:
            name: Profile = "eval" if body.get("model") == f"{self.model_name}-eval" else "train"
        profile = self._profiles[name]
        refuse_contradictions(body, name, profile)
        return profile

    def _encode(self, text: str) -> list[int]:
        refuse_hopeless(len(text), self.chat.longest_token, self._engine.max_model_len)
        return self.chat.encode(text)

    def _read(self, body: Mapping[str, Any], entry: Entry | None) -> tuple[Conversation, Sequence[Served]]:
        """The conversation of a chat request, and the calls that it may go on from."""
        messages: Any = body.get("messages")
        shaped = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
        if not shaped:
            raise Refusal(400, "expected `messages`, a list of one or more objects with a `role`")
        refuse_unsupported(body)
        if entry:
            served = entry.served
        else:
            claim = last_claim(messages)
            found = self._ledger.stray.find(*claim[1]) if claim else None
            served = [found] if found else []
        try:
            return conversation(body, self.chat, served[-1].told if served else None), served
        except ConfigError as error:
            raise Refusal(400, str(error)) from error
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise Refusal(400, f"a message does not have the shape of OpenAI's: {error!r}") from error

    def _splice(self, body: Mapping[str, Any], said: Conversation, served: Sequence[Served]) -> Spliced:
        said_by_others = (m.get("content") for m in body["messages"] if m["role"] != "assistant")
        num_characters = sum(len(content) for content in said_by_others if isinstance(content, str))
        refuse_hopeless(num_characters, self.chat.longest_token, self._engine.max_model_len)
        try:
            spliced = self._splicer.splice(body, said, served)
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
        limits = [room, *(n for n in (token_limit(body), profile.max_output_tokens) if n is not None)]
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
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._engine.generate(request_id, prompt_ids, sampling, lambda result: self._inbox.put(future, result))
        self.stats.waiting += 1
        try:
            generation = await future
        except asyncio.CancelledError:
            self._engine.abort(request_id)
            raise
        finally:
            self.stats.waiting -= 1
        # Written once: for the reply, and for the comparison with what comes back of it.
        return replace(generation, logprobs=NumberArray.of(generation.logprobs))

    def _record(
        self,
        entry: Entry | None,
        index: int,
        said: Conversation,
        spliced: Spliced,
        generation: Generation,
        message: Mapping[str, Any],
    ) -> None:
        call = Call(
            index=index,
            prompt_ids=shared_ids(spliced.prompt_ids, spliced.continues),
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=generation.weight_version,
        )
        served = Served(call=call, told=said.answered(said_by(message, self.chat)))
        if entry:
            entry.served.append(served)
        else:
            self._ledger.stray.add(served)


def call_seed(rollout_seed: int, index: int) -> int:
    """The seed of a rollout's call: equal for the same run, rollout and call, whatever else is being decoded."""
    return (rollout_seed * 1_000_003 + index * 7_919) % (1 << 63)
