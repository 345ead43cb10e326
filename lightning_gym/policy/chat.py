"""ChatFormat: what a model's own chat template makes of messages, and where its turns end.

The template is the only authority. Turn-end ids are found by rendering a conversation and looking at what follows the
assistant's words, never assumed to be the tokenizer's ``eos_token_id``: Llama 3 ends turns with ``<|eot_id|>``, base
tokenizers carry an end-of-text id that no template ever writes.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.policy.parsers import ParsedMessage, parse_hermes

Message = Mapping[str, Any]
_MARK = "\u2063assistant-words\u2063"  # invisible separators: no message holds this by accident


class ChatFormat:
    """A tokenizer and its chat template, for one thread at a time.

    Hugging Face fast tokenizers break when two threads use one instance ("Already borrowed"), so this object loads its
    own and belongs to the endpoint's thread; `render` and `encode` take a lock for the rare caller outside it.

    Args:
        path: model directory with the tokenizer files.

    Raises:
        ConfigError: the directory has no chat template, or the template does not end assistant turns.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._lock = threading.RLock()
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{path} has no chat template, so messages cannot become a prompt; add `chat_template.jinja` to the "
                "directory or set `chat_template` in its tokenizer_config.json"
            )
        added = self._tokenizer.added_tokens_decoder.items()  # some turn ends are listed here and nowhere else
        self._special = frozenset(token_id for token_id, token in added if token.special)
        self.turn_end_text, self.turn_end_id = self._probe_turn_end(path)
        eos = self._tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple({self.turn_end_id, *([eos] if eos is not None else [])})
        """Sampling one of these ends a turn."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the template writes it.

        Raises:
            ConfigError: the template refuses these messages.
        """
        try:
            with self._lock:
                return self._tokenizer.apply_chat_template(
                    [_for_template(message) for message in messages],
                    tools=list(tools) if tools else None,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **(template_kwargs or {}),
                )
        except Exception as error:  # jinja raises what the template's author chose to raise
            raise ConfigError(f"the model's chat template refused the conversation: {error}") from error

    def render_after(
        self,
        messages: Sequence[Message],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str | None:
        """What the template writes after the words of assistant message `index`, generation prompt included.

        The words are replaced by a mark and the text after the mark is taken. Whatever the template does to earlier
        turns (dropping old reasoning, say) happens before the mark and cannot shift the cut.

        Returns:
            The text, or ``None`` where the template does not write the words exactly once.
        """
        marked = [*messages[:index], {"role": "assistant", "content": _MARK}, *messages[index + 1 :]]
        _, mark, after = self.render(marked, tools, template_kwargs).partition(_MARK)
        return after if mark and _MARK not in after else None

    def encode(self, text: str) -> list[int]:
        """Token ids of template text: special tokens are recognised, none are added."""
        with self._lock:
            return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        with self._lock:
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def parse(self, token_ids: Sequence[int]) -> ParsedMessage:
        """A sampled turn as the agent will see it: the turn-end id is dropped, other special tokens stay."""
        return parse_hermes(self.decode(self.words(token_ids)))

    def words(self, token_ids: Sequence[int]) -> Sequence[int]:
        """A sampled turn without the id that ended it."""
        return token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids

    def _probe_turn_end(self, path: Path) -> tuple[str, int]:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        _, mark, after = self.render(turn, add_generation_prompt=False).partition(_MARK)
        ids = self.encode(after)
        if not mark or not ids or ids[0] not in self._special:
            raise ConfigError(
                f"the chat template of {path} writes {after!r} after the assistant's words; expected a special token "
                "that ends the turn (such as <|im_end|>). Without one a sampled turn has no end to learn"
            )
        return self.decode(ids[:1]), ids[0]


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
