"""ChatFormat: what a model's own chat template makes of messages, and where its turns end.

The template is the only authority. Turn-end ids are found by rendering a conversation and looking at what follows the
assistant's words, never assumed to be the tokenizer's ``eos_token_id``: Llama 3 ends turns with ``<|eot_id|>``, base
tokenizers carry an end-of-text id that no template ever writes.

Which of a text's special tokens are control tokens is the template's decision too: see
`lightning_gym.policy.control_tokens`.
"""

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.policy.control_tokens import ControlTokens
from lightning_gym.policy.parsers import BUILTIN, ParsedMessage, TurnParser, read_calls, read_thought
from lightning_gym.policy.tail import tail_template

Message = Mapping[str, Any]
_MARK = "\u2063assistant-words\u2063"  # invisible separators: no message holds this by accident


class ChatFormat:
    """A tokenizer and its chat template, for one thread at a time.

    Hugging Face fast tokenizers break when two threads use one instance ("Already borrowed"), so this object loads its
    own and belongs to the endpoint's thread; `render` and `encode` take a lock for the rare caller outside it.

    Args:
        path: model directory with the tokenizer files.
        tool_parser: how tool calls are read: ``"builtin"`` (Hermes' form), a name in vLLM's registry, or ``None`` to
            leave them in the content.
        reasoning_parser: how reasoning is read: ``"builtin"`` (``<think>``), a name in vLLM's registry, or ``None``.

    Raises:
        ConfigError: the directory has no chat template, the template does not end assistant turns, or a parser is
            unknown or does not fit the tokenizer.
    """

    def __init__(
        self, path: Path, *, tool_parser: str | None = BUILTIN, reasoning_parser: str | None = BUILTIN
    ) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._lock = threading.RLock()
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{path} has no chat template, so messages cannot become a prompt; add `chat_template.jinja` to the "
                "directory or set `chat_template` in its tokenizer_config.json"
            )
        self._control = ControlTokens(self._tokenizer)
        self.parser = _turn_parser(self._tokenizer, tool_parser, reasoning_parser)
        """Reads sampled turns."""
        self.turn_end_text, self.turn_end_id = self._probe_turn_end(path)
        eos = self._tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple({self.turn_end_id, *([eos] if eos is not None else [])})
        """Sampling one of these ends a turn."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.num_ids = max(vocabulary.values()) + 1
        """Token ids are below this."""
        self.longest_token = max(map(len, vocabulary))
        """No token stands for more characters of a text."""
        self._calls_end_as_words_do = self._probe_calls()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the template writes it, for `encode`.

        Special tokens that the messages and tools spell out stand between marks, unless no such token was typed;
        `template_kwargs` are the template's own arguments and pass as they are.

        Raises:
            ConfigError: the template refuses these messages.
        """
        try:
            with self._lock:
                return self._tokenizer.apply_chat_template(
                    [self.prepare(message) for message in messages],
                    tools=self.prepare_tools(tools),
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **(template_kwargs or {}),
                )
        except Exception as error:  # jinja raises what the template's author chose to raise
            raise ConfigError(f"the model's chat template refused the conversation: {error}") from error

    def prepare(self, message: Message) -> dict[str, Any]:
        """A message as the template gets it: only the keys templates read, typed special tokens marked."""
        return self._control.mark(_for_template(message))

    def prepare_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Tools as the template gets them: typed special tokens marked; ``None`` where there are none."""
        return self._control.mark(list(tools)) if tools else None

    def render_after(
        self,
        prepared: Sequence[dict[str, Any]],
        index: int,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str | None:
        """What the template writes after the words and calls of assistant message `index`, generation prompt included.

        The words are replaced by a mark and the text after the mark is taken. Whatever the template does to earlier
        turns (dropping old reasoning, say) happens before the mark and cannot shift the cut. Calls keep their names,
        which templates look up for the results, and lose their arguments; the turn's end is the first after the mark.

        Args:
            prepared: the messages, from `prepare`.
            index: of the assistant message.
            tools: of the request, from `prepare_tools`.
            template_kwargs: the template's own arguments.

        Returns:
            The text, or ``None`` where the template does not write the words exactly once.

        Raises:
            ConfigError: the template refuses these messages.
        """
        calls = prepared[index].get("tool_calls") if self._calls_end_as_words_do else None
        named = [_without_arguments(call) for call in calls or ()]
        if named and self.turn_end_text not in repr(named):
            stand_in = {"role": "assistant", "content": _MARK, "tool_calls": named}
            with contextlib.suppress(ConfigError):  # such as: one call at a time, please
                after = self._after_mark(prepared, index, stand_in, tools, template_kwargs)
                _, end, rest = (after or "").partition(self.turn_end_text)
                return end + rest if end else None
        return self._after_mark(prepared, index, {"role": "assistant", "content": _MARK}, tools, template_kwargs)

    def _after_mark(
        self,
        prepared: Sequence[dict[str, Any]],
        index: int,
        stand_in: dict[str, Any],
        tools: list[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> str | None:
        marked = [*prepared[:index], stand_in, *prepared[index + 1 :]]
        variables = dict(template_kwargs or {})
        try:
            with self._lock:
                template = tail_template(self._tokenizer.get_chat_template(variables.pop("chat_template", None), tools))
                return template.after(
                    _MARK,
                    marked,
                    index,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=True,
                    **(self._tokenizer.special_tokens_map | variables),
                )
        except Exception as error:  # as in `render`
            raise ConfigError(f"the model's chat template refused the conversation: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text: special tokens are recognised, except those that `render` marked; none are added.

        Raises:
            ConfigError: the text holds a lone surrogate.
        """
        try:
            with self._lock:
                return self._control.encode(text)
        except TypeError:  # what tokenizers raises for text that has no UTF-8 form
            _check_unicode(text)
            raise

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        with self._lock:
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def parse(self, token_ids: Sequence[int], request: Mapping[str, Any] | None = None) -> ParsedMessage:
        """A sampled turn as the agent will see it: the turn-end id is dropped, other special tokens stay.

        Args:
            request: what was asked, in OpenAI's form; parsers of vLLM read its ``tools``, ``tool_choice`` and
                ``chat_template_kwargs``.
        """
        with self._lock:
            return self.parser.parse(self.decode(self.words(token_ids)), request or {})

    def words(self, token_ids: Sequence[int]) -> Sequence[int]:
        """A sampled turn without the id that ended it."""
        return token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids

    def _probe_turn_end(self, path: Path) -> tuple[str, int]:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        _, mark, after = self.render(turn, add_generation_prompt=False).partition(_MARK)
        ids = self.encode(after)
        if not mark or not ids or ids[0] not in self._control.ids:
            raise ConfigError(
                f"the chat template of {path} writes {after!r} after the assistant's words; expected a special token "
                "that ends the turn (such as <|im_end|>). Without one a sampled turn has no end to learn"
            )
        return self.decode(ids[:1]), ids[0]

    def _probe_calls(self) -> bool:
        """Whether a turn of words and calls ends, after its calls, as a turn of words does."""
        call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {}}}
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK, "tool_calls": [call]}]
        try:
            _, mark, after = self.render(turn, add_generation_prompt=False).partition(_MARK)
        except ConfigError:
            return False
        return bool(mark) and after.count(self.turn_end_text) == 1


def _without_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "arguments": {}}}


def _turn_parser(tokenizer: Any, tool_parser: str | None, reasoning_parser: str | None) -> TurnParser:
    """The named parsers; vLLM is imported only where one of them is vLLM's."""
    reasoning = read_thought if reasoning_parser == BUILTIN else None
    calls = read_calls if tool_parser == BUILTIN else None
    if {tool_parser, reasoning_parser} - {BUILTIN, None}:
        from lightning_gym.policy import vllm_parsers

        if reasoning_parser is not None and reasoning is None:
            reasoning = vllm_parsers.reasoning_reader(reasoning_parser, tokenizer)
        if tool_parser is not None and calls is None:
            calls = vllm_parsers.call_reader(tool_parser, tokenizer, reasoning_is_content=reasoning is None)
    return TurnParser(reasoning, calls)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text holds a lone surrogate, {text[error.start]!r} at character {error.start}, which no tokenizer "
            "takes; send Unicode text (a pair of surrogates, or U+FFFD in its place)"
        ) from error


def _for_template(message: Message) -> dict[str, Any]:
    """The keys templates read, tool-call arguments as objects: templates write ``arguments | tojson``."""
    kept = {key: value for key, value in message.items() if key in _TEMPLATE_KEYS and value is not None}
    if message.get("role") == "assistant":
        kept.setdefault("content", "")
    calls = kept.get("tool_calls")
    if calls:
        kept["tool_calls"] = [_call_for_template(call) for call in calls]
    elif calls is not None:
        del kept["tool_calls"]
    return kept


_TEMPLATE_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning"))


def _call_for_template(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            function["arguments"] = {}
    return {**call, "function": function}
