"""Collector: plays the rollouts of a step, whole groups at a time.

A failed rollout is retried when its kind says that another try could end differently, and is otherwise recorded and
left out. Too many failures stop the run with the innermost cause: training on the few that got through would be
training on something else. A group is handed on as soon as its last attempt is over.
"""

import asyncio
import collections
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lightning_gym.collection import Collection
from lightning_gym.errors import CollectionError, ConfigError, GymError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient
from lightning_gym.gym.recovery import Recovery
from lightning_gym.policy.ledger import Entry, Ledger, Profile
from lightning_gym.progress import Progress
from lightning_gym.reconcile import finished
from lightning_gym.rollout import Failure, FailureKind, Rollout, SamplingProfile
from lightning_gym.tasks import DealtTask

_log = logging.getLogger(__name__)
_WORTH_ANOTHER_TRY = frozenset((FailureKind.INFRA,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stragglers:
    """When not to wait for the last attempts of a group.

    Once all but `max_frac` of a group's attempts are over, each of the others may take `factor` times as long as the
    slowest of those; then it is cut, as a failure that does not count against ``max_failed_frac``. Long answers are
    cut more often than short ones, so what is learned leans towards short ones.

    Example: of 8 attempts 6 are over, the slowest after 30 s; the other two are cut when they have taken 60 s::

        Stragglers(max_frac=0.25, factor=2.0)
    """

    max_frac: float = 0.25
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.max_frac < 1 or self.factor < 1:
            raise ConfigError(
                f"expected a max_frac between 0 and 1 and a factor of at least 1, got {self.max_frac} and {self.factor}"
            )


@dataclass(slots=True)
class _Group:
    """The attempts at one task while they are played."""

    size: int
    limits: dict[int, asyncio.Timeout] = field(default_factory=dict[int, asyncio.Timeout])
    """Of the attempts that are not over."""
    ids: dict[int, str] = field(default_factory=dict[int, str])
    """The rollout id of each attempt's latest try."""
    over: dict[int, Rollout] = field(default_factory=dict[int, Rollout])

    @property
    def played(self) -> list[Rollout]:
        """Those that are over and did not fail."""
        return [rollout for rollout in self.over.values() if rollout.failure is None]

    @property
    def slowest_s(self) -> float:
        """Seconds that the slowest of those took."""
        return max(rollout.seconds for rollout in self.played)


class Collector:
    """Plays tasks through a `GymClient` and checks what comes back against the `Ledger`.

    Args:
        client: connected to a Gym.
        ledger: the endpoint's.
        run_id: prefix of rollout ids; with `rank` it says who owns a rollout.
        seed: of the run; sampling seeds are a function of it, the group, and the attempt.
        retries: further tries for a rollout that failed for reasons outside of it.
        max_failed_frac: above this fraction of failed rollouts the collection is given up.
        heartbeat_s: how far the collection is, and who waits for whom, is logged this often.
        stragglers: ``None`` waits for every attempt until it is over or timed out.
        recovery: asked before a rollout is tried again; ``None`` tries at once.
    """

    def __init__(
        self,
        client: GymClient,
        ledger: Ledger,
        *,
        run_id: str,
        rank: int = 0,
        seed: int = 0,
        retries: int = 2,
        max_failed_frac: float = 0.25,
        heartbeat_s: float = 10.0,
        stragglers: Stragglers | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._run_id = run_id
        self._rank = rank
        self._seed = seed
        self._retries = retries
        self._max_failed_frac = max_failed_frac
        self._heartbeat_s = heartbeat_s
        self._stragglers = stragglers
        self._recovery = recovery
        self._playing: dict[str, tuple[str, Entry]] = {}
        """Agent and ledger page of every rollout that has begun and is not over."""

    async def collect(
        self,
        dealt: Sequence[DealtTask],
        *,
        group_size: int,
        profile_name: Profile,
        profile: SamplingProfile,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> Collection:
        """Play `group_size` attempts at every task.

        Args:
            dealt: the tasks.
            group_size: attempts at each.
            profile_name: which profile the endpoint holds the rollouts to.
            profile: the same, for Gym.
            on_group: is given each group as soon as its last attempt is over, attempts in order; it has to be quick.

        Raises:
            CollectionError: more than `max_failed_frac` of the rollouts failed.
            GymError: the Gym is gone for good.
        """
        progress = Progress(total=len(dealt) * group_size)
        heartbeat = asyncio.create_task(self._heartbeat(progress))
        groups = [_Group(size=group_size) for _ in dealt]

        async def attempt(task: DealtTask, group: _Group, number: int) -> None:
            rollout = await self._attempt(task, group, number, profile_name, profile)
            self._count(rollout, progress)
            if on_group is not None and len(group.over) == group_size:
                on_group([group.over[number] for number in range(group_size)])

        try:
            async with asyncio.TaskGroup() as tasks:
                for task, group in zip(dealt, groups, strict=True):
                    for number in range(group_size):
                        tasks.create_task(attempt(task, group, number))
        except* GymError as errors:
            raise errors.exceptions[0] from None
        finally:
            heartbeat.cancel()
        rollouts = [group.over[number] for group in groups for number in range(group_size)]
        return Collection(rollouts=rollouts, seconds=time.perf_counter() - progress.start)

    def _count(self, rollout: Rollout, progress: Progress) -> None:
        progress.add(rollout)
        if len(progress.failures) > self._max_failed_frac * progress.total:
            raise CollectionError(
                f"{len(progress.failures)} of {progress.total} rollouts failed ({progress.kinds()}), more than "
                f"max_failed_frac={self._max_failed_frac:g} allows; {progress.cause()}"
            )

    async def _heartbeat(self, progress: Progress) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            _log.info(progress.line())
            if self._playing:
                _log.info(self._waiting_line())

    def _waiting_line(self) -> str:
        """Who waits for whom, and the rollout that has been on its way for longest."""
        for_whom = {rollout_id: self._waits_for(rollout_id) for rollout_id in self._playing}
        counts = ", ".join(f"{n} for {whom}" for whom, n in collections.Counter(for_whom.values()).most_common())
        line = f"{len(self._playing)} rollouts wait: {counts}"
        sent = self._client.in_flight
        if not sent:
            return line
        oldest = min(sent, key=sent.__getitem__)
        age, num_served = time.perf_counter() - sent[oldest], len(self._playing[oldest][1].served)
        return f"{line}; the oldest is {oldest}, {age:.0f} s, {num_served} calls served, waits for {for_whom[oldest]}"

    def _waits_for(self, rollout_id: str) -> str:
        agent, entry = self._playing[rollout_id]
        if rollout_id not in self._client.in_flight:
            return "a free slot"
        return "the policy" if entry.calls_started > len(entry.served) else f"agent {agent}"

    async def _attempt(
        self, dealt: DealtTask, group: _Group, number: int, profile_name: Profile, profile: SamplingProfile
    ) -> Rollout:
        """One attempt to its end, which may be that nobody waits for it any longer."""
        try:
            async with asyncio.timeout(None) as group.limits[number]:
                rollout = await self._play(dealt, group, number, profile_name, profile)
        except TimeoutError:
            if not group.limits[number].expired():
                raise
            message = f"cut: the others of its group took at most {group.slowest_s:.1f} s"
            failure = Failure(kind=FailureKind.STRAGGLER, message=message)
            rollout = _rollout(group.ids[number], dealt, number, failure, 0.0, None)
        del group.limits[number]
        group.over[number] = rollout
        if self._stragglers is not None and len(group.played) >= (1 - self._stragglers.max_frac) * group.size:
            self._limit(group, self._stragglers.factor * group.slowest_s)
        return rollout

    def _limit(self, group: _Group, seconds: float) -> None:
        """Cut what is left of a group when it has taken `seconds`."""
        loop, clock = asyncio.get_running_loop(), time.perf_counter()
        for number, limit in group.limits.items():
            if limit.when() is None:
                age = clock - self._client.in_flight.get(group.ids.get(number, ""), clock)
                limit.reschedule(loop.time() + max(0.0, seconds - age))

    async def _play(
        self, dealt: DealtTask, group: _Group, number: int, profile_name: Profile, profile: SamplingProfile
    ) -> Rollout:
        """One attempt, tried again where another try could end differently."""
        seed = rollout_seed(self._seed, dealt.group_id, number)
        again = 0
        while True:
            rollout_id = f"{self._run_id}.{self._rank}.{profile_name}.{dealt.group_id}.{number}.{again}"
            group.ids[number] = rollout_id
            entry = self._ledger.open(rollout_id, profile=profile_name, seed=seed)
            self._playing[rollout_id] = (dealt.task.agent, entry)
            try:
                played, seconds = await self._client.run(dealt.task.agent, dealt.task.row, rollout_id, profile, seed)
            finally:
                del self._playing[rollout_id]
                self._ledger.close(rollout_id)
            if isinstance(played, Failure) and played.kind is FailureKind.ENVIRONMENT:
                played = await self._blamed(played)
            rollout = _rollout(rollout_id, dealt, number, played, seconds, entry)
            failure = rollout.failure
            if failure is None or failure.kind not in _WORTH_ANOTHER_TRY or again == self._retries:
                return rollout
            again += 1
            _log.warning("rollout %s failed and is tried again: %s", rollout_id, failure.message)
            if self._recovery is not None and not await self._recovery.wait_for(dealt.task.agent):
                return rollout

    async def _blamed(self, failure: Failure) -> Failure:
        """An agent that lost a server of its own reports it like any crash of the environment."""
        silent = await self._client.silent()
        if not silent:
            return failure
        return Failure(kind=FailureKind.INFRA, message=f"{failure.message}; no answer from {', '.join(silent)}")


def _rollout(
    rollout_id: str, dealt: DealtTask, number: int, played: wire.Played | Failure, seconds: float, entry: Entry | None
) -> Rollout:
    base = Rollout(
        rollout_id=rollout_id,
        task_index=dealt.task.index,
        group_id=dealt.group_id,
        attempt=number,
        agent=dealt.task.agent,
        seconds=seconds,
        breaks=tuple(entry.breaks) if entry else (),
    )
    if isinstance(played, Failure) or entry is None:
        return replace(base, failure=played)
    return finished(base, played, entry)


def rollout_seed(run_seed: int, group_id: int, attempt: int) -> int:
    """63 bits that depend on nothing but the run, the group and the attempt."""
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
