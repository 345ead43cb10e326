"""Arrays of numbers in a JSON document that stay text until somebody asks for them.

A ``/run`` result carries the whole prompt of every call, so its ids grow with the square of the turns, and nearly all
the time of decoding it would go into number objects that are compared once and thrown away. Here the token arrays are
cut out before the document is decoded; ids are then compared as text with what was served.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import msgspec

Number = int | float
_encode = msgspec.json.Encoder().encode


class NumberArray(Sequence[Number]):
    """A JSON array of numbers, as text. Equal to any sequence of the same numbers.

    Example:
        >>> array = NumberArray(b"[1, 20, 3]")
        >>> len(array), array == [1, 20, 3], array == [1, 20, 4]
        (3, True, False)
    """

    __slots__ = ("_text", "_values")

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._values: list[Number] | None = None

    @classmethod
    def of(cls, values: Sequence[Number]) -> "NumberArray":
        """Numbers that are written now, and once.

        Example:
            >>> NumberArray.of([1, 20])
            NumberArray(b'[1,20]')
        """
        array = cls(_encode(values))
        array._values = list(values)
        return array

    @property
    def values(self) -> list[Number]:
        """What is between the brackets, one by one; NaNs where the text is no JSON."""
        if self._values is None:
            try:
                self._values = msgspec.json.decode(self._text)
            except msgspec.DecodeError:
                self._values = [math.nan] * (self._text.count(b",") + 1)
        assert self._values is not None
        return self._values

    def __eq__(self, other: object) -> bool:
        if isinstance(other, NumberArray):
            return (
                self._text == other._text
                or _compact(self._text) == _compact(other._text)
                or self.values == other.values  # such as 1e-05 and 0.00001
            )
        if isinstance(other, list):  # first, and not copied: nearly every comparison is with one
            numbers = cast("list[Number]", other)
        elif isinstance(other, Sequence) and not isinstance(other, str | bytes):
            numbers = list(cast("Sequence[Number]", other))
        else:
            return NotImplemented
        text = _encode(numbers)
        return self._text == text or _compact(self._text) == text or self.values == numbers

    __hash__ = None  # pyright: ignore[reportAssignmentType]  equal to lists, which have none

    def after(self, beginning: "NumberArray") -> "NumberArray | None":
        """What stands here after the numbers of `beginning`; ``None`` where that is not seen in the text.

        Example:
            >>> first = NumberArray(b"[1,20]")
            >>> NumberArray(b"[1,20,3]").after(first), NumberArray(b"[1,203]").after(first)
            (NumberArray(b'[3]'), None)
        """
        opened = beginning._text[:-1] + b","  # noqa: SLF001  of its own class
        return NumberArray(b"[" + self._text[len(opened) :]) if self._text.startswith(opened) else None

    def __len__(self) -> int:
        return len(self.values)

    def __bool__(self) -> bool:
        return bool(self._text.strip(b"[] \t\r\n"))

    @overload
    def __getitem__(self, index: int) -> Number: ...
    @overload
    def __getitem__(self, index: slice) -> list[Number]: ...
    def __getitem__(self, index: int | slice) -> Number | list[Number]:
        return self.values[index]

    def __iter__(self) -> Iterator[Number]:
        return iter(self.values)

    def __repr__(self) -> str:
        return f"NumberArray({self._text!r})"


def _compact(text: bytes) -> bytes:
    return text.translate(None, b" \t\r\n")


def as_written(value: Any) -> Any:
    """Encodes a `NumberArray` as the text that it is; ``enc_hook`` of `msgspec.json.encode`.

    Example:
        >>> msgspec.json.encode({"ids": NumberArray(b"[1,20]")}, enc_hook=as_written)
        b'{"ids":[1,20]}'
    """
    if isinstance(value, NumberArray):
        return msgspec.Raw(value._text)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  of this module
    raise NotImplementedError(f"{type(value).__name__} is not JSON")


def cut_arrays(content: bytes, opening: re.Pattern[bytes]) -> tuple[bytes, list[NumberArray]]:
    """Replace arrays of numbers in a JSON document by their index.

    The document that is left decodes exactly when nothing but arrays of numbers (or of what is no JSON at all) was
    cut: an array with a nested array, or with a string that holds a bracket, leaves its end behind.

    Args:
        content: the document.
        opening: matches a key and its array up to the opening bracket. In a string a key's quotes are escaped, so a
            pattern that begins with a quote and ends with a quote, a colon and the bracket finds keys only.

    Returns:
        The document with ``{"":i}`` in place of the i-th array, and the arrays.

    Example:
        >>> cut_arrays(b'{"a":[1],"ids":[2,3]}', opening_of(["ids"]))
        (b'{"a":[1],"ids":{"":0}}', [NumberArray(b'[2,3]')])
    """
    arrays: list[NumberArray] = []
    pieces: list[bytes] = []
    position = 0
    while found := opening.search(content, position):
        start = found.end() - 1
        end = content.find(b"]", start) + 1
        if not end:
            break
        pieces += content[position:start], b'{"":%d}' % len(arrays)
        arrays.append(NumberArray(content[start:end]))
        position = end
    return b"".join((*pieces, content[position:])), arrays


def opening_of(keys: Sequence[str]) -> re.Pattern[bytes]:
    """The pattern of `keys` for `cut_arrays`."""
    names = b"|".join(re.escape(key).encode() for key in keys)
    return re.compile(rb'"(?:' + names + rb')"\s*:\s*\[')


def array_at(value: Any, arrays: Sequence[NumberArray]) -> Any:
    """The array that was cut where `value` is, or `value` itself where none was."""
    index = cast("dict[str, Any]", value).get("") if isinstance(value, dict) else None
    return arrays[index] if isinstance(index, int) and 0 <= index < len(arrays) else value
