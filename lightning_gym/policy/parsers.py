"""Sampled text -> what an assistant message says: content, reasoning, tool calls.

Parsing is for the agent's eyes only. What is trained on is the sampled ids; nothing here can change them.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger(__name__)
BUILTIN = "builtin"
"""Names the parsers of this module: Hermes' tool calls and ``<think>``. They need no vLLM."""
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_THINK = re.compile(r"^\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One function call the policy asked for."""

    name: str
    arguments: str
    """JSON text, as OpenAI's schema has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedMessage:
    """An assistant turn taken apart. `content` is ``None`` where nothing but calls or reasoning was said."""

    content: str | None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


Request = Mapping[str, Any]
"""What was asked, in OpenAI's form."""

ReadReasoning = Callable[[str, Request], tuple[str | None, str]]
"""``(text, request) -> (reasoning, the rest)``."""

ReadCalls = Callable[[str, Request], tuple[str | None, list[ToolCall]]]
"""``(text, request) -> (content, calls)``."""


class TurnParser:
    """Reads reasoning first, then calls in what is left.

    Args:
        reasoning: ``None``: reasoning stays in the content.
        calls: ``None``: calls stay in the content.

    Example:
        >>> message = TurnParser(read_thought, read_calls).parse("<think>two and two</think>4", {})
        >>> message.reasoning, message.content
        ('two and two', '4')
    """

    def __init__(self, reasoning: ReadReasoning | None, calls: ReadCalls | None) -> None:
        self.num_unparsed = 0
        """Turns that a parser gave up on; the agent saw all of their text as content."""
        self._reasoning = reasoning
        self._calls = calls

    def parse(self, text: str, request: Request) -> ParsedMessage:
        """The turn taken apart; as a whole in the content where a parser raises, for the rollout must go on."""
        try:
            return self._parse(text, request)
        except Exception as error:  # noqa: BLE001  a stranger's parser; counted and told
            self.num_unparsed += 1
            level = logging.WARNING if self.num_unparsed == 1 else logging.DEBUG
            _log.log(level, "a parser failed on a sampled turn, which goes to the agent as it is: %r", error)
            return ParsedMessage(content=text or None)

    def _parse(self, text: str, request: Request) -> ParsedMessage:
        reasoning, rest = self._reasoning(text, request) if self._reasoning else (None, text)
        content, calls = self._calls(rest, request) if self._calls else (rest or None, [])
        return ParsedMessage(content=content, reasoning=reasoning, tool_calls=calls)


def read_thought(text: str, _request: Request) -> tuple[str | None, str]:
    """Take ``<think>...</think>`` off the beginning; the first tag may have been the generation prompt's."""
    if "</think>" in text and (think := _THINK.match(text)):
        return think.group(1).strip() or None, text[think.end() :]
    return None, text


def read_calls(text: str, _request: Request) -> tuple[str | None, list[ToolCall]]:
    """Take Hermes-style calls out, ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    A block that is not a JSON object with a ``name`` stays in the content, so that the agent (and the reader of a
    rollout) sees what was really said.
    """
    if "<tool_call>" not in text:
        return text or None, []
    calls: list[ToolCall] = []

    def take(block: re.Match[str]) -> str:
        call = _read_call(block.group(1))
        if call is None:
            return block.group(0)
        calls.append(call)
        return ""

    content = _TOOL_CALL.sub(take, text)
    return content.strip() or None, calls


def parse_hermes(text: str) -> ParsedMessage:
    """Parse ``<think>`` and Hermes-style calls.

    Example:
        >>> parse_hermes('<tool_call>{"name": "add", "arguments": {"n": 2}}</tool_call>').tool_calls
        [ToolCall(name='add', arguments='{"n": 2}')]
    """
    return TurnParser(read_thought, read_calls).parse(text, {})


def _read_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return ToolCall(name=call["name"], arguments=arguments if isinstance(arguments, str) else json.dumps(arguments))
