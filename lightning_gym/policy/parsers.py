"""Sampled text -> what an assistant message says: content, reasoning, tool calls.

Parsing is for the agent's eyes only. What is trained on is the sampled ids; nothing here can change them.
"""

import json
import re
from dataclasses import dataclass, field

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


def parse_hermes(text: str) -> ParsedMessage:
    """Parse Hermes-style calls, ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, and ``<think>``.

    A block that is not a JSON object with a ``name`` stays in the content, so that the agent (and the reader of a
    rollout) sees what was really said.

    Example:
        >>> parse_hermes('<tool_call>{"name": "add", "arguments": {"n": 2}}</tool_call>').tool_calls
        [ToolCall(name='add', arguments='{"n": 2}')]
        >>> parse_hermes("<think>two and two</think>4")
        ParsedMessage(content='4', reasoning='two and two', tool_calls=[])
    """
    reasoning = None
    if "</think>" in text and (think := _THINK.match(text)):
        reasoning, text = think.group(1).strip() or None, text[think.end() :]
    if "<tool_call>" not in text:
        return ParsedMessage(content=text or None, reasoning=reasoning)
    tool_calls: list[ToolCall] = []

    def take(block: re.Match[str]) -> str:
        call = _read_call(block.group(1))
        if call is None:
            return block.group(0)
        tool_calls.append(call)
        return ""

    content = _TOOL_CALL.sub(take, text)
    return ParsedMessage(content=content.strip() or None, reasoning=reasoning, tool_calls=tool_calls)


def _read_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return ToolCall(name=call["name"], arguments=arguments if isinstance(arguments, str) else json.dumps(arguments))
