"""What every arm of `benchmarks.vs_trl` plays: prompts, forced lengths, a reward; and the model's directory.

Imported by TRL's own process as well, whose environment holds nothing of this package: standard library only.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: ``len(lengths)`` prompts, `group_size` completions of each."""

    name: str
    lengths: tuple[int, ...]
    """Sampled tokens of each completion of a step's prompts, in order; the same for all of a group."""
    group_size: int
    steps: int
    """The first is a warm-up."""
    lr: float = 1e-6

    def prompts(self) -> list[str]:
        """One a task: as many as all steps need, all of the same length."""
        return [f"add {10 + number % 80} then {10 + 7 * number % 80}" for number in range(len(self.lengths) * 64)]

    def save(self, folder: Path) -> None:
        """For the arms' processes."""
        (folder / "workload.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Workload":
        """What `save` wrote."""
        written = json.loads((folder / "workload.json").read_text())
        return cls(**(written | {"lengths": tuple(written["lengths"])}))


def reward_of(ids: Sequence[int]) -> float:
    """A reward that differs inside a group: the share of even ids."""
    return sum(token % 2 == 0 for token in ids) / max(1, len(ids))
