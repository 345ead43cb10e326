"""ControlTokens: a special token that somebody typed is text; one that the chat template wrote is a control token.

A tool that prints ``<|im_end|>`` must not end the turn that carries its output. So special tokens in what people,
tools and tool definitions say are marked before the template sees them, and the marked text is told apart again when
it is encoded: marked ones are spelled out in ordinary tokens, the others are the template's own.
"""

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from lightning_gym.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

_MAX_STARTS = 4
"""So many substring searches are cheaper than one search for a pattern."""


class ControlTokens:
    """The special tokens of a tokenizer, typed or written.

    Marks are brackets around a random number drawn for this object, so nothing that is typed can pass for one. Texts
    in which no special token was typed, which is nearly all of them, cost a few substring searches. Added tokens that
    are not special (``<tool_call>`` in Qwen's tokenizers) are the tokenizer's business: it recognises them wherever
    they stand.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder  # transformers has an AddedToken of its own, alike
        self._special: dict[int, AddedToken] = {token_id: token for token_id, token in added.items() if token.special}
        self.ids = frozenset(self._special)
        """Ids of special tokens; some turn ends are listed here and nowhere else."""
        self._nonce = nonce = secrets.token_hex(8)
        self._open, self._close = f"[{nonce}:", f":{nonce}]"
        self._alias = {token.content: f"<{nonce}:{token_id}>" for token_id, token in self._special.items()}
        longest_first = sorted(self._special.values(), key=lambda token: -len(token.content))
        special = "|".join(map(_pattern, longest_first)) or r"(?!)"
        self._typed = re.compile(special)
        self._marked = re.compile(
            f"{re.escape(self._open)}(?P<typed>{special}){re.escape(self._close)}"
            f"|{re.escape(self._open)}|{re.escape(self._close)}|(?P<written>{special})"
        )
        pairs, firsts = ({token.content[:n] for token in longest_first} for n in (2, 1))
        self._starts = tuple(pairs if len(pairs) <= _MAX_STARTS else firsts)
        self._firsts = tuple(msgspec.json.encode(first)[1:-1] for first in firsts)

    def mark(self, value: Any) -> Any:
        """A JSON value whose strings have their special tokens marked as typed.

        Templates may trim, split and serialise such strings; a mark that a template separated from its token is void.
        """
        return self._marked_in(value) if self._may_spell(value) else value

    def _may_spell(self, value: Any) -> bool:
        """Whether there is a character anywhere in `value` that a special token begins with: one look at its JSON."""
        try:
            text = msgspec.json.encode(value)
        except UnicodeEncodeError:  # a lone surrogate, which the tokenizer refuses
            return True
        return any(first in text for first in self._firsts)

    def _marked_in(self, value: Any) -> Any:
        if isinstance(value, str):
            if any(start in value for start in self._starts):
                return self._typed.sub(lambda found: f"{self._open}{found[0]}{self._close}", value)
            return value
        if isinstance(value, list):
            return self._parted([self._marked_in(item) for item in value])
        if isinstance(value, dict):
            return {self._marked_in(key): self._marked_in(item) for key, item in value.items()}
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of a template's text: marked special tokens in ordinary tokens, the others as themselves.

        Raises:
            ConfigError: a special token was typed, and the tokenizer has no ``tokenizer.json`` to tell it apart with.
        """
        if self._nonce not in text and not self._lookalikes:
            return self._tokenizer.encode(text, add_special_tokens=False)
        ids = self._twin.encode(self._marked.sub(self._told_apart, text), add_special_tokens=False).ids
        return [self._of_alias.get(token_id, token_id) for token_id in ids]

    def _parted(self, items: list[Any]) -> list[Any]:
        """Content in parts, kept from spelling a special token where the template joins the parts."""
        texts = [item.get("text") if isinstance(item, dict) else None for item in items]
        if not self._typed.search("".join(text for text in texts if isinstance(text, str))):
            return items
        spelled = zip(items, texts, strict=True)
        return [item | {"text": text + self._close} if isinstance(text, str) else item for item, text in spelled]

    def _told_apart(self, found: re.Match[str]) -> str:
        if found["typed"] is not None:
            return found["typed"]
        return self._alias[found["written"]] if found["written"] is not None else ""

    @cached_property
    def _lookalikes(self) -> bool:
        """Whether text that spells no special token can become one when it is normalised (``＜s＞`` under NFKC)."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        normalizes = backend is not None and backend.normalizer is not None
        return normalizes and any(token.normalized for token in self._special.values())

    @cached_property
    def _twin(self) -> "Tokenizer":
        """The same tokenizer, to which special tokens are ordinary text and only their aliases are special.

        Splitting the text at special tokens and encoding the pieces would not do: pre-tokenizers treat the beginning
        of a text in a way of their own, and added tokens may swallow the white space beside them.
        """
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                "a message holds the text of a special token, and this tokenizer cannot spell it out in ordinary "
                "tokens; save the model with a fast tokenizer (`tokenizer.json`)"
            )
        twin = Tokenizer.from_str(backend.to_str())
        twin.no_padding()
        twin.no_truncation()
        twin.encode_special_tokens = True
        aliases = [
            AddedToken(
                self._alias[token.content],
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=False,
            )
            for token in self._special.values()
        ]
        twin.add_tokens(aliases)
        return twin

    @cached_property
    def _of_alias(self) -> Mapping[int | None, int]:
        ids = (self._twin.token_to_id(self._alias[token.content]) for token in self._special.values())
        return dict(zip(ids, self._special, strict=True))


def _pattern(token: "AddedToken") -> str:
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text
