"""Progress: how far a collection is, in words for the log and for the error that ends it."""

import collections
import time
from dataclasses import dataclass, field

from lightning_gym.rollout import Failure, FailureKind, Rollout


@dataclass(slots=True)
class Progress:
    """How many rollouts of a collection are over, and how they ended."""

    total: int
    """Rollouts of the collection."""
    num_cut: int = 0
    """Stragglers, which are no failures."""
    start: float = field(default_factory=time.perf_counter)
    rewards: list[float] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, rollout: Rollout) -> None:
        """Count a rollout that is over."""
        if rollout.failure is None:
            self.rewards.append(rollout.reward or 0.0)
        elif rollout.failure.kind is FailureKind.STRAGGLER:
            self.num_cut += 1
        else:
            self.failures.append(rollout.failure)

    def line(self) -> str:
        """One line for the log."""
        done = len(self.rewards) + len(self.failures) + self.num_cut
        mean = f"{sum(self.rewards) / len(self.rewards):.3f}" if self.rewards else "none yet"
        seconds = time.perf_counter() - self.start
        failed = len(self.failures)
        cut = f", {self.num_cut} cut" if self.num_cut else ""
        return f"collecting: {done}/{self.total} rollouts after {seconds:.0f} s, {failed} failed{cut}, reward {mean}"

    def kinds(self) -> str:
        """The failures in numbers: ``"3 timeout, 1 infra"``."""
        kinds = collections.Counter(failure.kind.value for failure in self.failures)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())

    def cause(self) -> str:
        """The failures in words: the most frequent one, if any came twice, and the last one."""
        words, often = collections.Counter(failure.message for failure in self.failures).most_common(1)[0]
        most = f"{often} of them: {words}; " if often > 1 else ""
        return f"{most}the last one: {self.failures[-1].message}"
