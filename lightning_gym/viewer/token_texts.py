"""TokenTexts: what single token ids stand for, as a reader can be shown it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError

Piece = str | list[int]
"""A token's text, or its bytes where they are no whole characters: ``[226, 130]`` begins a euro sign."""


class TokenTexts:
    """The texts of token ids one by one; together they are the text of the sequence.

    Args:
        path: a model's directory, or whatever else transformers can load a fast tokenizer from.

    Raises:
        ConfigError: there is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = _tokenizer(path)
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_of = _byte_of_char()
        anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor: list[int] = anchor[-1:]
        self._anchor_text = self._decode(self._anchor)

    def of(self, ids: Sequence[int]) -> list[Piece]:
        """The text of each of `ids`, or its bytes; ``"?"`` for an id that the tokenizer does not have."""
        # Behind another token, because some tokenizers drop the space that a first one begins with.
        behind: list[str] = self._tokenizer.decode_batch([[*self._anchor, i] for i in ids], skip_special_tokens=False)
        return [self._piece(i, text) for i, text in zip(ids, behind, strict=True)]

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token."""
        return token_id in self._special

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _piece(self, token_id: int, behind: str) -> Piece:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return "?"
        if token_id in self._special:
            return token
        text = behind.removeprefix(self._anchor_text) if behind.startswith(self._anchor_text) else ""
        if text and "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        return self._bytes(token) or text or self._decode([token_id])

    def _bytes(self, token: str) -> list[int] | None:
        if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's
            return [int(token[3:5], 16)]
        if all(char in self._byte_of for char in token):
            return [self._byte_of[char] for char in token]
        return None


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    if (path / "tokenizer.json").is_file():  # without transformers, whose import takes seconds
        return Tokenizer.from_file(str(path / "tokenizer.json"))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"no tokenizer at {path}") from error


def _byte_of_char() -> dict[str, int]:
    """The characters by which byte-level vocabularies (GPT-2's and most since) write bytes.

    Printable Latin-1 stands for itself; the other 68 bytes are shifted, in order, to U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
