"""Conversation: what shapes a prompt, in a form in which two requests can be compared.

Clients rewrite what they send back: Gym joins and re-splits assistant text, agents parse tool calls and write them
anew. What such a rewriting may change is left out of the comparison; everything else counts. A message that was
compared before is recognised by its own words and not taken apart again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec

from lightning_gym.errors import ConfigError
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat

Claim = tuple[Any, Any]
"""Prompt ids and sampled ids as a client sent them: whatever JSON allows."""
_json = msgspec.json.Encoder().encode
_DIGEST_BYTES = 32


class Canonical(NamedTuple):
    """What a message says, whoever wrote it down."""

    role: Any
    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """Name and arguments of each tool call."""
    tool_call_id: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A message of a request; equal to another where both say the same."""

    canonical: Canonical
    words: tuple[Any, ...] = field(compare=False)
    """As the client wrote it, without ids: equal words need no second look."""
    prepared: dict[str, Any] = field(compare=False)
    """As the chat template gets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What shapes a prompt, in comparable form."""

    messages: tuple[Said, ...]
    tools: bytes
    """What stands for the tools: their JSON, or its digest. Order and number types reach the prompt, so they count."""
    template_kwargs: bytes
    """The same for template arguments."""
    prepared_tools: list[dict[str, Any]] | None = field(compare=False, default=None)
    """As the chat template gets them."""

    def answered(self, reply: Said) -> "Conversation":
        """This conversation with the assistant's message after it."""
        return replace(self, messages=(*self.messages, reply))


def conversation(request: Mapping[str, Any], chat: ChatFormat, known: Conversation | None = None) -> Conversation:
    """The conversation of a chat request.

    Args:
        request: OpenAI's chat request.
        chat: whose template will get the messages and tools.
        known: an earlier one that this may go on from; what they share is taken from it.

    Raises:
        ConfigError: a message has a part that is not text.
    """
    before = known.messages if known else ()
    messages: list[Said] = []
    for index, message in enumerate(request["messages"]):
        words = _words(message)
        if index < len(before) and before[index].words == words:
            messages.append(before[index])
        else:
            messages.append(Said(canonical=canonical_message(message), words=words, prepared=chat.prepare(message)))
    tools = stand_for(request.get("tools"))
    return Conversation(
        messages=tuple(messages),
        tools=tools,
        prepared_tools=known.prepared_tools
        if known and known.tools == tools
        else chat.prepare_tools(request.get("tools")),
        template_kwargs=stand_for(request.get("chat_template_kwargs")),
    )


def said_by(message: Mapping[str, Any], chat: ChatFormat) -> Said:
    """One message, comparable."""
    return Said(canonical=canonical_message(message), words=_words(message), prepared=chat.prepare(message))


def stand_for(value: Any) -> bytes:
    """`value` as JSON, or the digest of it where that is shorter: every call of a rollout holds its own."""
    if not value:
        return b""
    text = _json(value)
    return text if len(text) <= _DIGEST_BYTES else hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()


def _words(message: Mapping[str, Any]) -> tuple[Any, ...]:
    get = message.get
    content, calls = get("content"), get("tool_calls")
    return (
        get("role"),
        content if content.__class__ is str else _json(content),
        get("reasoning_content"),
        get("reasoning"),
        _json(calls) if calls else None,
        get("tool_call_id"),
    )


def canonical_message(message: Mapping[str, Any]) -> Canonical:
    """A message reduced to what it says; ids, nulls and empty lists do not count.

    Raises:
        ConfigError: a part of its content is not text.

    Example:
        >>> canonical_message({"role": "assistant", "content": None, "tool_calls": []})
        Canonical(role='assistant', content='', reasoning='', calls=(), tool_call_id=None)
    """
    role = message.get("role")
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(_text_of(part) for part in content)
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    calls = tuple(
        (call["function"]["name"], _canonical_arguments(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    )
    if role == "assistant":  # Gym joins and re-splits assistant text, which may trim its ends
        content, reasoning = content.strip(), reasoning.strip()
    return Canonical(role, content, reasoning, calls, message.get("tool_call_id"))


def _text_of(part: Mapping[str, Any]) -> str:
    if part.get("type") != "text":
        raise ConfigError(f"a message has a part of type {part.get('type')!r:.40}; this policy reads text parts only")
    return part["text"]


def _canonical_arguments(arguments: Any) -> str:
    """A call's arguments however a client spaces, orders or escapes their JSON: the ids say how they were sampled."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments
    return json.dumps(arguments, sort_keys=True)


def claimed_ids(message: Mapping[str, Any]) -> Claim | None:
    """The ids that a client put on a message, ``None`` where it put none."""
    claim = (message.get(wire.PROMPT_TOKEN_IDS), message.get(wire.GENERATION_TOKEN_IDS))
    return claim if any(claim) else None


def last_claim(messages: Sequence[Mapping[str, Any]]) -> tuple[int, Claim] | None:
    """The last message that carries ids, and those.

    Example:
        >>> last_claim([{"role": "assistant", "prompt_token_ids": [1], "generation_token_ids": [2]}, {"role": "user"}])
        (0, ([1], [2]))
    """
    for index in range(len(messages) - 1, -1, -1):
        claim = claimed_ids(messages[index])
        if claim:
            return index, claim
    return None
