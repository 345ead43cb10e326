"""Scores: what the attempts at held-out tasks say of a policy, with standard errors. Arithmetic only.

Every task counts once, however many of its attempts came through: tasks are the sample that a standard error is about,
and attempts at one task are no independent draws of it. Failed attempts are counted and left out, never a reward of 0.
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_gym.outcome import Outcome

PREFIX = "val"
"""Of every name that an evaluation logs."""
REWARD = f"{PREFIX}/reward_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over tasks."""

    mean: float
    """NaN where no task has a value."""
    error: float | None
    """Standard error; ``None`` below two tasks."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The mean of one value a task.

        Example:
            >>> Estimate.of([0.0, 1.0, 1.0, 0.0])
            Estimate(mean=0.5, error=0.28867513459481287)
        """
        count = len(values)
        mean = sum(values) / count if count else math.nan
        if count < 2:
            return cls(mean=mean, error=None)
        return cls(mean=mean, error=math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One line of an evaluation's table."""

    name: str
    """Of a dataset or an environment; empty for all of them together."""
    num_tasks: int
    num_attempts: int
    """Failed ones included."""
    failures: Mapping[str, int]
    """Attempts that failed, by kind."""
    reward: Estimate
    """Of the mean over a task's attempts: avg@k, where k is their number."""
    pass_at: Mapping[int, Estimate]
    """By k: of `expected_best` of k attempts, over the tasks of which at least k came through."""
    sampled_tokens_mean: float
    sampled_tokens_max: int
    calls_mean: float
    truncated_frac: float

    @classmethod
    def of(cls, name: str, outcomes: Sequence[Outcome], *, num_samples: int) -> "Score":
        """What `outcomes` say.

        Args:
            name: of the line.
            outcomes: in any order; attempts at a task share a group id.
            num_samples: attempts that were made at each task.
        """
        rewards: dict[int, list[float]] = {outcome.group_id: [] for outcome in outcomes}
        through = [outcome for outcome in outcomes if outcome.reward is not None]
        for outcome in through:
            rewards[outcome.group_id].append(outcome.reward or 0.0)
        best = {
            k: [expected_best(of_task, k) for of_task in rewards.values() if len(of_task) >= k]
            for k in counts_up_to(num_samples)
        }
        lengths = [outcome.sampled_tokens for outcome in through]
        return cls(
            name=name,
            num_tasks=len(rewards),
            num_attempts=len(outcomes),
            failures=dict(sorted(collections.Counter(o.failure for o in outcomes if o.failure).items())),
            reward=Estimate.of([sum(of_task) / len(of_task) for of_task in rewards.values() if of_task]),
            pass_at={k: Estimate.of(values) for k, values in best.items() if values},
            sampled_tokens_mean=_mean(lengths),
            sampled_tokens_max=max(lengths, default=0),
            calls_mean=_mean([outcome.num_calls for outcome in through]),
            truncated_frac=_mean([float(outcome.truncated) for outcome in through]),
        )

    def metrics(self, *, num_samples: int) -> dict[str, float]:
        """What to log, under ``val/`` or ``val/<name>/``."""
        place = f"{PREFIX}/{self.name}" if self.name else PREFIX
        values = {
            "reward_mean": self.reward.mean,
            f"avg_at_{num_samples}": self.reward.mean,
            **{f"pass_at_{k}": estimate.mean for k, estimate in self.pass_at.items()},
            **({} if self.reward.error is None else {"reward_se": self.reward.error}),
            "sampled_tokens_mean": self.sampled_tokens_mean,
            "sampled_tokens_max": float(self.sampled_tokens_max),
            "calls_mean": self.calls_mean,
            "truncated_frac": self.truncated_frac,
            "tasks": float(self.num_tasks),
            "attempts": float(self.num_attempts),
            "failed": float(sum(self.failures.values())),
            **{f"failed_{kind}": float(count) for kind, count in self.failures.items()},
        }
        return {f"{place}/{name}": value for name, value in values.items()}


def scores(outcomes: Iterable[Outcome], dataset_of: Callable[[int], str], *, num_samples: int) -> list[Score]:
    """The lines of a table: all tasks together, then each dataset, and each environment where they are others.

    Args:
        outcomes: of all ranks.
        dataset_of: group id -> the dataset's name, empty where there is one without a name.
        num_samples: attempts at each task.
    """
    in_order = sorted(outcomes, key=lambda outcome: (outcome.group_id, outcome.rollout_id))
    lines = [Score.of("", in_order, num_samples=num_samples)]
    of_datasets = _split(in_order, lambda outcome: dataset_of(outcome.group_id))
    if set(of_datasets) != {""}:
        lines += [Score.of(name, some, num_samples=num_samples) for name, some in of_datasets.items()]
    of_agents = _split(in_order, lambda outcome: outcome.agent)
    parts = [{outcome.group_id for outcome in some} for some in of_datasets.values()]
    for name, some in of_agents.items():
        if len(of_agents) > 1 and name not in of_datasets and {outcome.group_id for outcome in some} not in parts:
            lines.append(Score.of(name, some, num_samples=num_samples))
    return lines


def expected_best(rewards: Sequence[float], k: int) -> float:
    """The mean, over all choices of k of the attempts, of the best reward among them.

    For rewards of 0 and 1 this is pass@k, 1 - C(n - c, k) / C(n, k) with c of n attempts right (Codex,
    arXiv:2107.03374, equation 1); for k = 1 it is the mean reward.

    Example: of four attempts one is right; a pair holds it half of the time.

        >>> expected_best([0.0, 0.0, 1.0, 0.0], 2)
        0.5
        >>> expected_best([0.0, 0.0, 1.0, 0.0], 1)
        0.25
    """
    ranked = sorted(rewards)
    ways = math.comb(len(ranked), k)
    return sum(reward * (math.comb(below, k - 1) / ways) for below, reward in enumerate(ranked))


def counts_up_to(num_samples: int) -> list[int]:
    """The k of pass@k that are reported.

    Example:
        >>> counts_up_to(1), counts_up_to(6)
        ([1], [1, 2, 4, 6])
    """
    powers = [1 << exponent for exponent in range(num_samples.bit_length()) if 1 << exponent < num_samples]
    return [*powers, num_samples]


def score_table(lines: Sequence[Score]) -> str:
    """Scores as text, one line each."""
    ks = list(dict.fromkeys(k for line in lines for k in line.pass_at))
    head = ["", "tasks", "attempts", "failed", "reward", *(f"pass@{k}" for k in ks), "tokens", "calls", "truncated"]
    rows = [
        [
            line.name or "all",
            str(line.num_tasks),
            str(line.num_attempts),
            _failed(line),
            _with_error(line.reward),
            *(_with_error(line.pass_at[k]) if k in line.pass_at else "-" for k in ks),
            f"{line.sampled_tokens_mean:.1f}",
            f"{line.calls_mean:.1f}",
            f"{line.truncated_frac:.0%}",
        ]
        for line in lines
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )


def _failed(line: Score) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in line.failures.items())
    return kinds or "0"


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f}" + ("" if estimate.error is None else f" ± {estimate.error:.3f}")


def _split(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    parts: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        parts.setdefault(key(outcome), []).append(outcome)
    return dict(sorted(parts.items()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
