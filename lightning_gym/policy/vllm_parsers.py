"""Tool and reasoning parsers by the names of vLLM's registries, called as vLLM's own server calls them.

Checked against vLLM 0.32.0. Touched here: ``vllm.tool_parsers.ToolParserManager`` and
``vllm.reasoning.ReasoningParserManager`` (the registries), ``extract_tool_calls`` and ``extract_reasoning`` (the
non-streaming calls), ``ChatCompletionRequest`` (what they take, because some read its tools' schemas to give arguments
their types), and ``skip_reasoning_parsing`` where a parser has it: without a reasoning parser, vLLM's server has
reasoning pass through as content.
"""

import copy
import json
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.policy.parsers import ReadCalls, ReadReasoning, Request, ToolCall
from lightning_gym.policy.vllm_private import set_environment, trainer_world_intact


def reasoning_reader(name: str, tokenizer: Any) -> ReadReasoning:
    """The reasoning parser that vLLM has registered as `name`.

    Raises:
        ConfigError: there is none, it cannot be imported, or it needs tokens that the tokenizer does not have.
    """
    manager = _registries()[1]
    parser_class = _registered(manager, manager.get_reasoning_parser, "reasoning_parser", name)
    tokenizer = _with_vocabulary_at_hand(tokenizer)

    def read(text: str, request: Request) -> tuple[str | None, str]:
        parser = parser_class(tokenizer, chat_template_kwargs=request.get("chat_template_kwargs"))
        reasoning, content = parser.extract_reasoning(text, _chat_request("null"))
        return reasoning or None, content or ""

    _fits(lambda: parser_class(tokenizer, chat_template_kwargs=None), "reasoning_parser", name)
    return read


def call_reader(name: str, tokenizer: Any, *, reasoning_is_content: bool) -> ReadCalls:
    """The tool parser that vLLM has registered as `name`.

    Calls are looked for only where the request offers tools and ``tool_choice`` is not ``"none"``.

    Raises:
        ConfigError: as `reasoning_reader`.
    """
    manager = _registries()[0]
    parser_class = _registered(manager, manager.get_tool_parser, "tool_parser", name)
    tokenizer = _with_vocabulary_at_hand(tokenizer)

    def read(text: str, request: Request) -> tuple[str | None, list[ToolCall]]:
        if not request.get("tools") or request.get("tool_choice") == "none":
            return text or None, []
        chat_request = _chat_request(json.dumps(request["tools"]))
        parser = parser_class(tokenizer, chat_request.tools)
        if reasoning_is_content and hasattr(parser, "skip_reasoning_parsing"):
            parser.skip_reasoning_parsing = True
        found = parser.extract_tool_calls(text, chat_request)
        if not found.tools_called:
            return text or None, []
        content = found.content if found.content and found.content.strip() else None
        calls = [ToolCall(name=call.function.name, arguments=call.function.arguments) for call in found.tool_calls]
        return content, calls

    _fits(lambda: parser_class(tokenizer, None), "tool_parser", name)
    return read


def _registries() -> tuple[Any, Any]:
    """``(tool parsers, reasoning parsers)``."""
    with trainer_world_intact():
        import torch

        set_environment("cuda" if torch.cuda.is_available() else "cpu")
        try:
            from vllm.reasoning import ReasoningParserManager
            from vllm.tool_parsers import ToolParserManager
        except ImportError as error:
            raise ConfigError(
                f"parsers other than `builtin` are vLLM's, which cannot be imported: {error}; install "
                "lightning-gym[vllm] (or [cpu]), or use `builtin`"
            ) from error
    # They log a traceback for every turn they cannot read. A policy that learns says such things all day.
    for package in ("vllm.tool_parsers", "vllm.reasoning", "vllm.parser"):
        logging.getLogger(package).setLevel(logging.CRITICAL)
    return ToolParserManager, ReasoningParserManager


def _registered(manager: Any, get: Callable[[str], Any], setting: str, name: str) -> Any:
    names = sorted({*getattr(manager, setting + "s"), *manager.lazy_parsers})
    if name not in names:
        raise ConfigError(
            f"{setting} is {name!r}, expected `builtin`, none, or a name that vLLM has registered: {', '.join(names)}"
        )
    try:
        return get(name)
    except Exception as error:
        raise ConfigError(f"vLLM could not import its {setting} {name!r}: {error}") from error


def _fits(construct: Callable[[], Any], setting: str, name: str) -> None:
    try:
        construct()
    except Exception as error:
        raise ConfigError(
            f"vLLM's {setting} {name!r} does not fit this model's tokenizer: {error}; choose the parser of the model's "
            "family, or `builtin`"
        ) from error


def _with_vocabulary_at_hand(tokenizer: Any) -> Any:
    """A copy whose vocabulary is read once: parsers are made anew for every turn, and each asks for it."""
    vocabulary = tokenizer.get_vocab()
    tokenizer = copy.copy(tokenizer)
    tokenizer.get_vocab = lambda: vocabulary
    return tokenizer


@lru_cache(maxsize=64)
def _chat_request(tools: str) -> Any:
    """A request that offers `tools` (JSON)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    offered = json.loads(tools)
    choice: dict[str, Any] = {"tools": offered, "tool_choice": "auto"} if offered else {}
    return ChatCompletionRequest(messages=[{"role": "user", "content": ""}], model="policy", **choice)
