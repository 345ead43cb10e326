"""Collector: plays the rollouts of a step, whole groups at a time.

A failed rollout is retried when its kind says that another try could end differently, and is otherwise recorded and
left out. Too many failures stop the run with the innermost cause: training on the few that got through would be
training on something else.
"""

import asyncio
import collections
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lightning_gym.errors import CollectionError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient
from lightning_gym.policy.ledger import Entry, Ledger, Profile
from lightning_gym.rollout import Call, Failure, FailureKind, Rollout, SamplingProfile
from lightning_gym.tasks import DealtTask

_log = logging.getLogger(__name__)
_WORTH_ANOTHER_TRY = frozenset((FailureKind.INFRA,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Every rollout of one collection, failed ones included."""

    rollouts: list[Rollout]
    """Group by group, attempts in order."""
    seconds: float

    @property
    def survivors(self) -> list[Rollout]:
        """Rollouts to train on: those of groups in which at least two attempts came through."""
        alive = [rollout for rollout in self.rollouts if rollout.failure is None]
        counts = collections.Counter(rollout.group_id for rollout in alive)
        return [rollout for rollout in alive if counts[rollout.group_id] > 1]

    @property
    def failures(self) -> collections.Counter[FailureKind]:
        """How many rollouts failed, by kind."""
        return collections.Counter(rollout.failure.kind for rollout in self.rollouts if rollout.failure)


@dataclass(slots=True)
class _Progress:
    total: int
    start: float = field(default_factory=time.perf_counter)
    rewards: list[float] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def line(self) -> str:
        done = len(self.rewards) + len(self.failures)
        mean = f"{sum(self.rewards) / len(self.rewards):.3f}" if self.rewards else "none yet"
        seconds = time.perf_counter() - self.start
        failed = len(self.failures)
        return f"collecting: {done}/{self.total} rollouts after {seconds:.0f} s, {failed} failed, reward {mean}"


class Collector:
    """Plays tasks through a `GymClient` and checks what comes back against the `Ledger`.

    Args:
        client: connected to a Gym.
        ledger: the endpoint's.
        run_id: prefix of rollout ids; with `rank` it says who owns a rollout.
        seed: of the run; sampling seeds are a function of it, the group, and the attempt.
        retries: further tries for a rollout that failed for reasons outside of it.
        max_failed_frac: above this fraction of failed rollouts the collection is given up.
        heartbeat_s: a line of progress is logged this often.
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
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._run_id = run_id
        self._rank = rank
        self._seed = seed
        self._retries = retries
        self._max_failed_frac = max_failed_frac
        self._heartbeat_s = heartbeat_s

    async def collect(
        self, dealt: Sequence[DealtTask], *, group_size: int, profile_name: Profile, profile: SamplingProfile
    ) -> Collection:
        """Play `group_size` attempts at every task.

        Raises:
            CollectionError: more than `max_failed_frac` of the rollouts failed.
        """
        progress = _Progress(total=len(dealt) * group_size)
        heartbeat = asyncio.create_task(self._heartbeat(progress))

        async def attempt(task: DealtTask, number: int) -> Rollout:
            rollout = await self._attempt(task, number, profile_name, profile)
            self._count(rollout, progress)
            return rollout

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(attempt(task, number)) for task in dealt for number in range(group_size)]
        except* CollectionError as group:
            raise group.exceptions[0] from None
        finally:
            heartbeat.cancel()
        rollouts = [task.result() for task in running]
        return Collection(rollouts=rollouts, seconds=time.perf_counter() - progress.start)

    def _count(self, rollout: Rollout, progress: _Progress) -> None:
        if rollout.failure is None:
            progress.rewards.append(rollout.reward or 0.0)
            return
        progress.failures.append(rollout.failure)
        if len(progress.failures) > self._max_failed_frac * progress.total:
            kinds = collections.Counter(failure.kind.value for failure in progress.failures)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            raise CollectionError(
                f"{len(progress.failures)} of {progress.total} rollouts failed ({counts}), more than "
                f"max_failed_frac={self._max_failed_frac:g} allows; the last one: {rollout.failure.message}"
            )

    async def _heartbeat(self, progress: _Progress) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            _log.info(progress.line())

    async def _attempt(self, dealt: DealtTask, number: int, profile_name: Profile, profile: SamplingProfile) -> Rollout:
        seed = rollout_seed(self._seed, dealt.group_id, number)
        again = 0
        while True:
            rollout_id = f"{self._run_id}.{self._rank}.{profile_name}.{dealt.group_id}.{number}.{again}"
            self._ledger.open(rollout_id, profile=profile_name, seed=seed)
            try:
                played, seconds = await self._client.run(dealt.task.agent, dealt.task.row, rollout_id, profile, seed)
            finally:
                entry = self._ledger.close(rollout_id)
            assert entry is not None
            rollout = _rollout(rollout_id, dealt, number, played, seconds, entry)
            failure = rollout.failure
            if failure is None or failure.kind not in _WORTH_ANOTHER_TRY or again == self._retries:
                return rollout
            again += 1
            _log.warning("rollout %s failed and is tried again: %s", rollout_id, failure.message)


def _rollout(
    rollout_id: str, dealt: DealtTask, number: int, played: wire.Played | Failure, seconds: float, entry: Entry
) -> Rollout:
    base = Rollout(
        rollout_id=rollout_id,
        task_index=dealt.task.index,
        group_id=dealt.group_id,
        attempt=number,
        agent=dealt.task.agent,
        seconds=seconds,
        breaks=tuple(entry.breaks),
    )
    if isinstance(played, Failure):
        return replace(base, failure=played)
    calls = reconcile(entry, played.bundles)
    if isinstance(calls, Failure):
        return replace(base, failure=calls, output=played.output, prompt=played.prompt)
    return replace(
        base,
        reward=played.reward,
        calls=calls,
        output=played.output,
        prompt=played.prompt,
        truncated=played.truncated or calls[-1].finish_reason == "length",
        metrics=played.metrics,
    )


def reconcile(entry: Entry, bundles: Sequence[wire.Bundle]) -> list[Call] | Failure:
    """The served calls that came back, in order; a `Failure` if something came back that was not served.

    Calls that were served but did not come back (an answer lost on the way and asked for again) are left out.
    """
    if not bundles:
        message = f"the rollout came back without token ids ({len(entry.served)} calls were served)"
        return Failure(kind=FailureKind.NO_TOKEN_IDS, message=message)
    calls: list[Call] = []
    waiting = iter(entry.served)
    for position, bundle in enumerate(bundles):
        for served in waiting:
            call = served.call
            if call.token_ids == bundle.token_ids and call.prompt_ids == bundle.prompt_ids:
                calls.append(call)
                break
        else:
            message = (
                f"call {position} came back with {len(bundle.prompt_ids)} prompt ids and {len(bundle.token_ids)} "
                f"sampled ids that were not served to this rollout, or not in this order; {len(entry.served)} served"
            )
            return Failure(kind=FailureKind.MISALIGNED, message=message)
    return calls


def rollout_seed(run_seed: int, group_id: int, attempt: int) -> int:
    """63 bits that depend on nothing but the run, the group and the attempt."""
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
