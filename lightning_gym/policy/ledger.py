"""Ledger: what was served, to which rollout, exactly.

Gym carries token ids back as JSON on messages and output items. The ledger holds the same calls as the engine returned
them, so what comes back can be *checked*: ids that were never served, or were served to another rollout, are never
trained on.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, overload

from lightning_gym.policy.conversation import Conversation
from lightning_gym.rollout import Call, SpliceBreak

Profile = Literal["train", "eval"]

MAX_STRAY_TOKENS = 1 << 20
"""Tokens of calls outside any rollout that are remembered, about 40 MB; what was not used for longest goes first."""


class SharedIds(Sequence[int]):
    """The first `length` ids of a list that only grows.

    Every prompt of a segment begins with the one before it. Stored apart, the prompts of a rollout of n turns would
    take O(n^2) memory; in one list they take O(n).

    Example:
        >>> first = SharedIds([1, 10, 7])
        >>> second = first.grown_to([1, 10, 7, 20, 2, 30, 7])
        >>> list(first), list(second), second == [1, 10, 7, 20, 2, 30, 7]
        ([1, 10, 7], [1, 10, 7, 20, 2, 30, 7], True)
    """

    __slots__ = ("_ids", "_length")
    __hash__ = None  # type: ignore[assignment]  equal to a list, which has none

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._length = len(self._ids)

    def grown_to(self, ids: list[int]) -> "SharedIds":
        """`ids`, which begin with these, in the same list; in one of its own where a sibling has grown there first."""
        grown = SharedIds(ids[self._length :])
        if len(self._ids) == self._length:
            self._ids.extend(grown)
            grown._ids = self._ids
        else:
            grown._ids = [*self, *grown]
        grown._length = len(ids)
        return grown

    def begins_with(self, other: Sequence[int]) -> bool:
        """Whether these start with all of `other`; known without looking where both are in the same list."""
        if len(self) < len(other):
            return False
        if isinstance(other, SharedIds) and other._ids is self._ids:  # noqa: SLF001  of its own class
            return True
        return self[: len(other)] == other[:]

    def tolist(self) -> list[int]:
        """A list of its own; right whatever another thread adds meanwhile."""
        return self._ids[: self._length]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return islice(self._ids, self._length)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return self._ids[start:stop:step] if step > 0 else self.tolist()[index]
        return self._ids[range(self._length)[index]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SharedIds | list):
            return NotImplemented
        if len(self) != len(other):
            return False
        if isinstance(other, list):
            return self.tolist() == other
        return self._ids is other._ids or self.tolist() == other.tolist()

    def __repr__(self) -> str:
        return f"SharedIds({self.tolist()})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One call with the conversation it answered, for deciding whether a later request extends it."""

    call: Call
    told: Conversation
    """What the request said, and the assistant message that was returned: what a request that goes on begins with."""

    @property
    def num_tokens(self) -> int:
        """Prompt and sampled tokens."""
        return len(self.call.prompt_ids) + len(self.call.token_ids)


def shared_ids(prompt_ids: list[int], continues: Served | None) -> SharedIds:
    """A prompt to be kept, in the same memory as the call it continues."""
    before = continues.call.prompt_ids if continues else None
    return before.grown_to(prompt_ids) if isinstance(before, SharedIds) else SharedIds(prompt_ids)


@dataclass(slots=True)
class Entry:
    """One rollout's page."""

    profile: Profile
    seed: int
    served: list[Served] = field(default_factory=list)
    breaks: list[SpliceBreak] = field(default_factory=list)
    calls_started: int = 0


class StrayCalls:
    """Calls of clients that play no rollout of ours, found again by the ids they send back. Bounded.

    Args:
        max_tokens: prompt and sampled tokens of all calls that are held; the least recently used go first.
    """

    def __init__(self, max_tokens: int = MAX_STRAY_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._calls: OrderedDict[int, Served] = OrderedDict()
        self._tokens = 0

    def add(self, served: Served) -> None:
        """Remember a call."""
        key = _key(served.call.prompt_ids, served.call.token_ids)
        self._drop(key)
        self._calls[key] = served
        self._tokens += served.num_tokens
        while self._tokens > self._max_tokens:
            self._drop(next(iter(self._calls)))

    def find(self, prompt_ids: Any, token_ids: Any) -> Served | None:
        """The call that was given exactly these ids, ``None`` where none is remembered."""
        if not isinstance(prompt_ids, list) or not isinstance(token_ids, list):
            return None
        try:
            key = _key(prompt_ids, token_ids)
        except TypeError:  # a list of lists: nobody's ids
            return None
        served = self._calls.get(key)
        if served is None or served.call.prompt_ids != prompt_ids or served.call.token_ids != token_ids:
            return None
        self._calls.move_to_end(key)
        return served

    def _drop(self, key: int) -> None:
        served = self._calls.pop(key, None)
        if served is not None:
            self._tokens -= served.num_tokens

    def __len__(self) -> int:
        return len(self._calls)


def _key(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> int:
    return hash((tuple(prompt_ids), tuple(token_ids)))


class Ledger:
    """Pages by rollout id. Thread-safe: the endpoint writes on its thread, the collector reads on another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self.stray = StrayCalls()
        """Calls outside any rollout; belongs to the endpoint's thread."""

    def open(self, rollout_id: str, *, profile: Profile, seed: int) -> Entry:
        """Begin a rollout's page; calls of unopened rollouts are refused by the endpoint."""
        entry = Entry(profile=profile, seed=seed)
        with self._lock:
            self._entries[rollout_id] = entry
        return entry

    def get(self, rollout_id: str) -> Entry | None:
        """The page of a rollout, ``None`` when it was never opened or is closed."""
        with self._lock:
            return self._entries.get(rollout_id)

    def close(self, rollout_id: str) -> Entry | None:
        """Take a rollout's page out; later calls are refused as unknown."""
        with self._lock:
            return self._entries.pop(rollout_id, None)

    def owner_of(self, prompt_ids: Any, token_ids: Any) -> str | None:
        """The open rollout that was given exactly these ids; looked up only where something is wrong."""
        with self._lock:
            pages = [(rollout_id, list(entry.served)) for rollout_id, entry in self._entries.items()]
        for rollout_id, served in pages:
            if any(one.call.token_ids == token_ids and one.call.prompt_ids == prompt_ids for one in served):
                return rollout_id
        return None

    def __len__(self) -> int:
        return len(self._entries)
