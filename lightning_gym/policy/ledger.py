"""Ledger: what was served, to which rollout, exactly.

Gym carries token ids back as JSON on messages and output items. The ledger holds the same calls as the engine returned
them, so what comes back can be *checked*: ids that were never served, or were served to another rollout, are never
trained on.
"""

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_gym.rollout import Call, SpliceBreak

Profile = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One call with the conversation it answered, for deciding whether a later request extends it."""

    call: Call
    messages: tuple[Any, ...]
    """The request's messages, canonical (see `lightning_gym.policy.splice.canonical_message`)."""
    reply: tuple[Any, ...]
    """The assistant message that was returned, canonical."""
    context: tuple[Any, ...]
    """Tools and template arguments of the request; they shape the prompt too."""


@dataclass(slots=True)
class Entry:
    """One rollout's page."""

    profile: Profile
    seed: int
    served: list[Served] = field(default_factory=list)
    breaks: list[SpliceBreak] = field(default_factory=list)
    expired: bool = False
    calls_started: int = 0


class Ledger:
    """Pages by rollout id. Thread-safe: the endpoint writes on its thread, the collector reads on another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}

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

    def expire(self, rollout_id: str) -> None:
        """Refuse further calls of a rollout that nobody waits for: Gym never stops one by itself."""
        entry = self.get(rollout_id)
        if entry is not None:
            entry.expired = True

    def close(self, rollout_id: str) -> Entry | None:
        """Take a rollout's page out; later calls are refused as unknown."""
        with self._lock:
            return self._entries.pop(rollout_id, None)

    def __len__(self) -> int:
        return len(self._entries)
