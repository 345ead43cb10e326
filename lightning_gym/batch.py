"""TrajectoryBatch: what a training step gets; and the window that an optimizer step is made of.

The only module that decides what index t means: index t of every ``[batch, seq]`` tensor speaks about token t, and
position 0 of a sequence never trains. The shift by one (logits at t - 1 predict token t) happens in
`lightning_gym.logprobs` and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.trajectory import Trajectory

Aggregation = Literal["token_mean", "rollout_mean", "rollout_sum", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """One packed micro-batch: sequences laid end to end in a single row.

    Example: two sequences, ``[1, 7, 20, 2]`` (20 and 2 were sampled, advantage 0.5) and ``[1, 7, 21]`` (21 was
    sampled, advantage -0.5), in a window of these three trained tokens::

        input_ids        = [[1, 7, 20,  2,   1, 7, 21 ]]
        position_ids     = [[0, 1,  2,  3,   0, 1,  2 ]]
        loss_mask        = [[F, F,  T,  T,   F, F,  T ]]
        advantages       = [[0, 0, .5, .5,   0, 0, -.5]]
        loss_weight      = [[0, 0, ⅓,  ⅓,    0, 0,  ⅓ ]]
        sequence_lengths = (4, 3)

    The loss of a window is the plain sum of ``loss_weight * per-token loss`` over all its micro-batches: no function
    downstream divides by anything.
    """

    input_ids: Tensor
    """``[batch, seq]`` int64."""
    position_ids: Tensor
    """``[batch, seq]`` int64, restarting at 0 with every sequence."""
    loss_mask: Tensor
    """``[batch, seq]`` bool, true where the token was sampled and trains."""
    rollout_logprobs: Tensor
    """``[batch, seq]`` float32, nats, of the engine that sampled; 0 where the mask is false."""
    advantages: Tensor
    """``[batch, seq]`` float32; 0 where the mask is false."""
    loss_weight: Tensor
    """``[batch, seq]`` float32; 0 where the mask is false. Carries the normalisation of the whole optimizer step."""
    weight_versions: Tensor
    """``[batch, seq]`` int64, the optimizer step whose weights sampled the token; -1 where the mask is false."""
    sequence_lengths: tuple[int, ...]
    """Lengths of the packed sequences in order; they add up to ``seq``."""
    temperature: float = 1.0
    """The engine sampled from ``softmax(logits / temperature)``; the trainer scores under the same."""
    old_logprobs: Tensor | None = None
    """``[batch, seq]`` float32, nats, of the trainer before the first update of this collection; ``None`` when the
    collection is trained on once, where they equal the current ones."""
    ref_logprobs: Tensor | None = None
    """``[batch, seq]`` float32, nats, of the reference model; ``None`` without one."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise AlignmentError(f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(shape)}")
        if sum(self.sequence_lengths) != shape[-1]:
            raise AlignmentError(
                f"sequence_lengths add up to {sum(self.sequence_lengths)}, but there are {shape[-1]} tokens"
            )

    def __len__(self) -> int:
        """Packed sequences, for loggers that ask for a batch size."""
        return len(self.sequence_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens the forward computes."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TrajectoryBatch":
        """A copy on `device`; Lightning and Accelerate call this."""
        moved = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name in _TENSORS
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


_TENSORS = (
    "input_ids",
    "position_ids",
    "loss_mask",
    "rollout_logprobs",
    "advantages",
    "loss_weight",
    "weight_versions",
    "old_logprobs",
    "ref_logprobs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """What the normalisation of an optimizer step counts, over all ranks."""

    num_tokens: int
    """That train."""
    num_rollouts: int

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "StepTotals":
        """The totals of one rank."""
        rollouts = {trajectory.rollout_id for trajectory in trajectories}
        return cls(num_tokens=sum(t.num_trained for t in trajectories), num_rollouts=len(rollouts))


def loss_weights(
    trajectories: Sequence[Trajectory],
    *,
    aggregation: Aggregation,
    constant_length: int | None = None,
    totals: StepTotals | None = None,
) -> list[float]:
    """The weight of every trained token of each trajectory, so that a weighted sum is the wanted mean.

    Args:
        trajectories: this rank's of one optimizer step.
        aggregation: ``token_mean``: every trained token counts the same, 1 / N (DAPO). ``rollout_mean``: every
            rollout counts the same whatever its length, 1 / (R n_r), where n_r counts the trained tokens of all its
            segments (GRPO). ``rollout_sum``: 1 / R a token. ``constant``: 1 / (R L) with L = `constant_length`
            (Dr. GRPO).
        constant_length: for ``constant``.
        totals: over all ranks; ``None``: there is one.

    Example: rollouts of three and of one trained token.

        >>> from lightning_gym.testing import tiny_trajectory
        >>> pair = [tiny_trajectory(num_trained=3, rollout_id="a"), tiny_trajectory(num_trained=1, rollout_id="b")]
        >>> loss_weights(pair, aggregation="token_mean")
        [0.25, 0.25]
        >>> [round(w, 3) for w in loss_weights(pair, aggregation="rollout_mean")]
        [0.167, 0.5]
    """
    per_rollout: dict[str, int] = {}
    for trajectory in trajectories:
        per_rollout[trajectory.rollout_id] = per_rollout.get(trajectory.rollout_id, 0) + trajectory.num_trained
    totals = totals or StepTotals.of(trajectories)
    num_tokens, num_rollouts = totals.num_tokens, totals.num_rollouts
    match aggregation:
        case "token_mean":
            return [1 / num_tokens] * len(trajectories)
        case "rollout_mean":
            return [1 / (num_rollouts * per_rollout[t.rollout_id]) for t in trajectories]
        case "rollout_sum":
            return [1 / num_rollouts] * len(trajectories)
        case "constant":
            if not constant_length:
                raise ConfigError(
                    "aggregation='constant' needs constant_length, the fixed number of tokens a rollout is divided by"
                )
            return [1 / (num_rollouts * constant_length)] * len(trajectories)


def pack_window(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    weights: Sequence[float],
    *,
    num_micro_batches: int,
    max_tokens_per_micro_batch: int,
    weight_scale: float = 1.0,
    temperature: float = 1.0,
) -> list[TrajectoryBatch]:
    """Pack one optimizer step's trajectories into exactly `num_micro_batches` of about equal token counts.

    Args:
        trajectories: what to train on.
        advantages: one a trajectory.
        weights: from `loss_weights`, one a trajectory.
        num_micro_batches: the Trainer's ``accumulate_grad_batches``; empty ones are filled with a token of weight 0.
        max_tokens_per_micro_batch: a ceiling, not a target.
        weight_scale: undoes what the framework will divide by: ``accumulate_grad_batches`` times the data-parallel
            size.
        temperature: of the sampling profile.

    Raises:
        ConfigError: a micro-batch would be over the ceiling; names the number of micro-batches that would fit.
    """
    bins = _balance([len(trajectory) for trajectory in trajectories], num_micro_batches)
    loads = [sum(len(trajectories[i]) for i in members) for members in bins]
    if max(loads) > max_tokens_per_micro_batch:
        lengths = [len(trajectory) for trajectory in trajectories]
        raise ConfigError(_over_ceiling(lengths, num_micro_batches, max(loads), max_tokens_per_micro_batch))
    packed = [_pack([(trajectories[i], advantages[i], weights[i] * weight_scale) for i in members]) for members in bins]
    return [replace(batch, temperature=temperature) for batch in packed]


def _balance(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Longest first into the emptiest bin; members of a bin keep their order."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        target = loads.index(min(loads))
        bins[target].append(index)
        loads[target] += lengths[index]
    return [sorted(members) for members in bins]


def _over_ceiling(lengths: Sequence[int], num_micro_batches: int, load: int, ceiling: int) -> str:
    if max(lengths) > ceiling:
        return (
            f"a trajectory has {max(lengths)} tokens, over max_tokens_per_micro_batch={ceiling}; raise the ceiling to "
            "at least that, or lower max_model_len"
        )
    enough = num_micro_batches
    while max(sum(lengths[i] for i in members) for members in _balance(lengths, enough)) > ceiling:
        enough += 1
    return (
        f"{sum(lengths)} tokens in {num_micro_batches} micro-batches make one of {load}, over "
        f"max_tokens_per_micro_batch={ceiling}; set accumulate_grad_batches={enough} or raise the ceiling"
    )


def _pack(members: Sequence[tuple[Trajectory, float, float]]) -> TrajectoryBatch:
    if not members:
        return _filler()
    trajectories = [trajectory for trajectory, _, _ in members]
    masks = np.concatenate([t.loss_mask for t in trajectories])
    lengths = tuple(len(t) for t in trajectories)
    advantages = np.repeat([advantage for _, advantage, _ in members], lengths) * masks
    weights = np.repeat([weight for _, _, weight in members], lengths) * masks
    return TrajectoryBatch(
        input_ids=_row(np.concatenate([t.token_ids for t in trajectories])),
        position_ids=_row(np.concatenate([np.arange(length) for length in lengths])),
        loss_mask=_row(masks),
        rollout_logprobs=_row(np.concatenate([t.rollout_logprobs for t in trajectories])),
        advantages=_row(advantages.astype(np.float32)),
        loss_weight=_row(weights.astype(np.float32)),
        weight_versions=_row(np.concatenate([t.weight_versions for t in trajectories])),
        sequence_lengths=lengths,
    )


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[None]


def _filler() -> TrajectoryBatch:
    """Two tokens, the second "trained" with weight 0: every rank runs the same backward passes."""
    zeros = torch.zeros(1, 2)
    return TrajectoryBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        position_ids=torch.arange(2)[None],
        loss_mask=torch.tensor([[False, True]]),
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros,
        weight_versions=torch.full((1, 2), -1),
        sequence_lengths=(2,),
    )
