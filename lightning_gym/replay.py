"""Replay: the rollouts of a log in place of an engine and a Gym.

`lightning_gym.rollout_log` keeps what the trainer was handed: every call's ids and exact logprobs, rewards, failures,
and the order of groups. A run with the same data, seed and settings gets the same batches from it, bit for bit; one
with another loss, baseline or learning rate trains on the same rollouts, off-policy from its first different step on,
and is told so.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.collection import Collection
from lightning_gym.colocation import CollectSettings, Colocation
from lightning_gym.errors import ConfigError
from lightning_gym.logprobs import check_packing
from lightning_gym.memory_budget import Precision
from lightning_gym.open_collection import OpenCollection
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.policy.ledger import Profile
from lightning_gym.policy_checks import check_no_dropout
from lightning_gym.ranks import Ranks
from lightning_gym.reference import with_old_logprobs
from lightning_gym.rollout import Rollout, SamplingProfile
from lightning_gym.rollout_log import FILE_NAME, logged_rollout, read_header
from lightning_gym.tasks import DealtTask, Task

_log = logging.getLogger(__name__)
_OFF_POLICY = 0.02
"""Mean nats between trainer and recorded logprobs from which on a replay is called off-policy; bfloat16 does less."""


class _Place(msgspec.Struct):
    """What a line of the log says of where it belongs; the rest is read when it is needed."""

    group_id: int
    attempt: int


class Replay(Colocation):
    """A colocation without an engine and a Gym: what it would have them play, it reads from a log.

    Args:
        source: a ``rollouts.jsonl``, or the run directory that holds it; the logs of further ranks
            (``rank_N/rollouts.jsonl``) are found beside it. Any number of ranks may replay them.

    Raises:
        ConfigError: it is no rollout log, or one that was written before logs could be replayed.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        path = path / FILE_NAME if path.is_dir() else path
        header = read_header(path)
        if "sampling" not in header:
            raise ConfigError(f"{path} does not say how its rollouts were sampled, so it cannot be replayed")
        profile = SamplingProfile(**header["sampling"])
        nothing: Any = None  # neither is ever asked
        super().__init__(nothing, nothing, {"train": profile, "eval": profile}, CollectSettings())
        self.metrics: dict[str, float] = {}
        """Of the last window that `compare` saw."""
        self._path = path
        self._model = Path(header["model"])
        self._places: dict[int, dict[int, tuple[Path, int]]] = {}
        for log in [path, *sorted(path.parent.glob(f"rank_*/{path.name}"))]:
            for place, offset in _places(log):
                self._places.setdefault(place.group_id, {})[place.attempt] = (log, offset)
        self._num_ids = 0
        self._told = False

    def start(
        self,
        model: nn.Module,
        model_path: Path,
        tasks: Sequence[Task],
        *,
        run_dir: Path,
        run_id: str,
        ranks: Ranks,
        precision: Precision | None = None,
        max_tokens_per_micro_batch: int = 0,
        max_lag: int = 0,
    ) -> None:
        """Make the model ready to train on packed rows; nothing else is started.

        Raises:
            ConfigError: the model mixes packed sequences, or has dropout.
        """
        self.ranks = ranks
        use_packed_attention(model)
        check_packing(model)
        check_no_dropout(model)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  a transformers model
        self._num_ids = embeddings.num_embeddings
        _log.info("replaying %d groups of %s, sampled from %s", len(self._places), self._path, self._model)

    def ensure_synced(self, version: int) -> None:
        """There is no engine that weights could be handed to."""

    def take_sync_metrics(self) -> dict[str, float]:
        """What the window was like as seen from the weights that train on it."""
        return self.metrics

    def collect(self, dealt: Sequence[DealtTask], *, group_size: int, profile: Profile) -> Collection:
        """The logged attempts at these tasks.

        Raises:
            ConfigError: a group is not in the log, or is of another task or size than the run deals; an id is not in
                the model's vocabulary.
        """
        rollouts = [rollout for task in dealt for rollout in self._group(task, group_size)]
        return Collection(rollouts=rollouts, seconds=max((rollout.seconds for rollout in rollouts), default=0.0))

    def begin(
        self,
        dealt: Sequence[DealtTask],
        *,
        group_size: int,
        profile: Profile,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> OpenCollection:
        """The same, over at once; what is wrong with it is raised by its ``result``."""
        future: Future[Collection] = Future()
        try:
            future.set_result(self.collect(dealt, group_size=group_size, profile=profile))
        except ConfigError as error:
            future.set_exception(error)
        return OpenCollection(future, check=lambda: None, finish=lambda: None)

    def evaluate(self, dealt: Sequence[DealtTask], *, group_size: int) -> Collection:
        """A log holds no answers to new tasks.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a replay has no engine to validate with; pass val=None, or limit_val_batches=0")

    def compare(self, model: nn.Module, batches: Sequence[TrajectoryBatch], *, step: int) -> None:
        """See how far the policy is from the one that sampled the window, and say so once.

        Args:
            model: the policy, in the precision context that it trains in.
            batches: the window, of which the first micro-batch is computed.
            step: the optimizer step that trains on it.
        """
        (batch,) = with_old_logprobs(model, batches[:1])
        sampled = batch.loss_mask & (batch.weight_versions >= 0)
        if not bool(sampled.any()):
            return
        assert batch.old_logprobs is not None
        difference = (batch.old_logprobs - batch.rollout_logprobs)[sampled].abs()
        lag = step - int(batch.weight_versions[sampled].min())
        self.metrics = {"replay/logprob_diff_mean": difference.mean().item(), "replay/lag_max": float(lag)}
        self._tell(difference.mean().item(), difference.max().item(), step, lag)

    def _tell(self, mean: float, largest: float, step: int, lag: int) -> None:
        if mean > _OFF_POLICY and not self._told:
            self._told = True
            _log.warning(
                "this replay is off-policy from step %d on: trainer and recorded logprobs differ by %.3g nats in the "
                "mean, %.3g at most, and tokens are up to %d steps old. The rollouts were sampled from %s; use a "
                "correction (policy.correction=token_tis) or a clipped loss",
                step,
                mean,
                largest,
                lag,
                self._model,
            )
        elif step == 0 and not self._told:
            _log.info("the replay begins on-policy: trainer and recorded logprobs agree within %.1e nats", largest)

    def close(self) -> None:
        """Nothing was started."""

    def _group(self, dealt: DealtTask, group_size: int) -> list[Rollout]:
        attempts = self._places.get(dealt.group_id)
        if attempts is None:
            raise ConfigError(
                f"{self._path} holds {len(self._places)} groups, and no group {dealt.group_id}: the log ends before "
                "the run does (lower trainer.max_steps), or the run plays more tasks a step than were logged"
            )
        if sorted(attempts) != list(range(group_size)):
            raise ConfigError(
                f"group {dealt.group_id} of {self._path} has attempts {sorted(attempts)}, and group_size is "
                f"{group_size}; replay with the group_size of the run that was logged"
            )
        rollouts = [logged_rollout(_line_at(*attempts[number])) for number in range(group_size)]
        for rollout in rollouts:
            if (rollout.task_index, rollout.agent) != (dealt.task.index, dealt.task.agent):
                raise ConfigError(
                    f"group {dealt.group_id} of {self._path} played task {rollout.task_index} ({rollout.agent}), this "
                    f"run deals task {dealt.task.index} ({dealt.task.agent}); replay with the data, seed, shuffle and "
                    "agent_weights of the run that was logged"
                )
            highest = max((max(*call.prompt_ids, *call.token_ids) for call in rollout.calls), default=0)
            if highest >= self._num_ids:
                raise ConfigError(
                    f"rollout {rollout.rollout_id} of {self._path} holds token id {highest}, and the model has "
                    f"{self._num_ids}; the log is of {self._model}, whose tokenizer must be the model's"
                )
        return rollouts


def _places(path: Path) -> Iterator[tuple[_Place, int]]:
    """Where each rollout's line begins; of a rollout that was played again after a resume, the later one counts."""
    decoder = msgspec.json.Decoder(_Place)
    with path.open("rb") as file:
        file.readline()
        number, offset = 1, file.tell()
        for line in file:
            number += 1
            try:
                yield decoder.decode(line), offset
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{path}:{number} is no rollout ({error}); a run that was killed may leave half a line at the "
                    "end: delete it"
                ) from error
            offset += len(line)


def _line_at(path: Path, offset: int) -> Mapping[str, Any]:
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())
