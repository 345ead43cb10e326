"""TrajectoryBatch: what a training step gets; and the window that an optimizer step is made of.

The only module that decides what index t means: index t of every ``[batch, seq]`` tensor speaks about token t, and
position 0 of a sequence never trains. The shift by one (logits at t - 1 predict token t) happens in
`lightning_gym.logprobs` and nowhere else.
"""

import collections
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.packing import ATTENTION_PARITY, Piece, rows_of_pieces
from lightning_gym.trajectory import Trajectory

Aggregation = Literal[
    "token_mean", "rollout_mean", "rollout_sum", "prompt_mean", "sequence_mean", "sequence_sum", "constant"
]


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
    sources: tuple[tuple[str, int], ...] = ()
    """For each packed sequence the id of the rollout whose tokens it holds, and which of its segments: what a token of
    the batch is looked up by. Empty where nobody says, as in a filler."""
    continues: tuple[int, ...] = ()
    """With shared prompts, for each packed sequence the index of the one before it that it continues, or -1: of
    ``(-1, 0, 0)`` the second and the third both follow the first, and count positions on from its end. Empty: none
    is shared."""
    temperature: float = 1.0
    """The engine sampled from ``softmax(logits / temperature)``; the trainer scores under the same."""
    old_logprobs: Tensor | None = None
    """``[batch, seq]`` float32, nats, of the trainer before the first update of this collection; ``None`` when the
    collection is trained on once, where they equal the current ones."""
    ref_logprobs: Tensor | None = None
    """``[batch, seq]`` float32, nats, of the reference model; ``None`` without one."""
    corrected: bool = False
    """Whether the mismatch of sampler and trainer has been weighed in already, see `lightning_gym.corrections`."""
    correction_scale: float = 1.0
    """What the weights of a correction are multiplied by, see `lightning_gym.corrections.with_correction_scale`."""

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
        if self.continues and len(self.continues) != len(self.sequence_lengths):
            raise AlignmentError(
                f"continues speaks about {len(self.continues)} sequences, there are {len(self.sequence_lengths)}"
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
    num_sequences: int
    """Segments of rollouts."""
    num_prompts: int
    """Groups; each is whole on one rank."""

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "StepTotals":
        """The totals of one rank."""
        return cls(
            num_tokens=sum(trajectory.num_trained for trajectory in trajectories),
            num_rollouts=len({trajectory.rollout_id for trajectory in trajectories}),
            num_sequences=len(trajectories),
            num_prompts=len({trajectory.group_id for trajectory in trajectories}),
        )


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
            segments (GRPO). ``rollout_sum``: 1 / R a token. ``prompt_mean``: every group counts the same, 1 / (P n_p)
            (ScaleRL), for which a group has to be whole on its rank. ``sequence_mean`` and ``sequence_sum``:
            1 / (S n_s) and 1 / S, by segments: as ``rollout_mean`` and ``rollout_sum``, but a rollout that was cut into
            three has three votes. ``constant``: 1 / (R L) with L = `constant_length` (Dr. GRPO).
        constant_length: for ``constant``.
        totals: over all ranks; ``None``: there is one.

    Raises:
        AlignmentError: there are trajectories, and no token trains.
        ConfigError: ``constant`` without `constant_length`.

    Example: rollouts of three and of one trained token.

        >>> from lightning_gym.testing import tiny_trajectory
        >>> pair = [tiny_trajectory(num_trained=3, rollout_id="a"), tiny_trajectory(num_trained=1, rollout_id="b")]
        >>> loss_weights(pair, aggregation="token_mean")
        [0.25, 0.25]
        >>> [round(w, 3) for w in loss_weights(pair, aggregation="rollout_mean")]
        [0.167, 0.5]
    """
    totals = totals or StepTotals.of(trajectories)
    if trajectories and not totals.num_tokens:
        raise AlignmentError(f"none of the {len(trajectories)} trajectories of this step has a token that trains")
    match aggregation:
        case "rollout_mean":
            return _of_means(trajectories, [t.rollout_id for t in trajectories], totals.num_rollouts)
        case "prompt_mean":
            return _of_means(trajectories, [t.group_id for t in trajectories], totals.num_prompts)
        case "sequence_mean":
            return _of_means(trajectories, range(len(trajectories)), totals.num_sequences)
        case "token_mean":
            divisor = totals.num_tokens
        case "rollout_sum":
            divisor = totals.num_rollouts
        case "sequence_sum":
            divisor = totals.num_sequences
        case "constant":
            if not constant_length:
                raise ConfigError(
                    "aggregation='constant' needs constant_length, the fixed number of tokens a rollout is divided by"
                )
            divisor = totals.num_rollouts * constant_length
    return [1 / divisor for _ in trajectories]


def _of_means(trajectories: Sequence[Trajectory], voters: Sequence[Hashable], num_voters: int) -> list[float]:
    """1 / (`num_voters` x the trained tokens of the trajectory's voter)."""
    counts: collections.Counter[Hashable] = collections.Counter()
    for trajectory, voter in zip(trajectories, voters, strict=True):
        counts[voter] += trajectory.num_trained
    return [1 / (num_voters * max(1, counts[voter])) for voter in voters]


def pack_window(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    weights: Sequence[float],
    *,
    num_micro_batches: int,
    max_tokens_per_micro_batch: int,
    weight_scale: float = 1.0,
    temperature: float = 1.0,
    attention_parity: float = ATTENTION_PARITY,
    share_prefix: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[TrajectoryBatch]:
    """Pack one optimizer step's trajectories into exactly `num_micro_batches` of about equal cost, the dearest first.

    Args:
        trajectories: what to train on. Without any, as on a rank whose groups all failed, every micro-batch is a
            filler.
        advantages: one a trajectory.
        weights: from `loss_weights`, one a trajectory.
        num_micro_batches: the Trainer's ``accumulate_grad_batches``, the same on every rank; empty ones are filled
            with a token of weight 0.
        max_tokens_per_micro_batch: a ceiling, not a target.
        weight_scale: undoes what the framework will divide by: ``accumulate_grad_batches`` times the data-parallel
            size.
        temperature: of the sampling profile.
        attention_parity: the sequence length at which attention costs as much as the rest of the model; see
            `lightning_gym.packing`.
        share_prefix: store a prompt that attempts of one group have in common once a micro-batch. The same gradient
            for less compute where prompts are long; needs the attention of `use_packed_attention`.
        dtype: of the float tensors; float64 for a model in float64.

    Raises:
        ConfigError: a micro-batch would be over the ceiling; names the number of micro-batches that would fit.
    """
    rows = rows_of_pieces(
        trajectories,
        num_rows=num_micro_batches,
        ceiling=max_tokens_per_micro_batch,
        parity=attention_parity,
        share_prefix=share_prefix,
    )
    values = list(zip(trajectories, advantages, [weight * weight_scale for weight in weights], strict=True))
    return [_pack(row, values, temperature, dtype) if row else _filler(temperature, dtype) for row in rows]


def _pack(
    pieces: Sequence[Piece],
    values: Sequence[tuple[Trajectory, float, float]],
    temperature: float,
    dtype: torch.dtype,
) -> TrajectoryBatch:
    spans = [(*values[piece.trajectory], slice(piece.start, piece.stop)) for piece in pieces]
    lengths = tuple(piece.stop - piece.start for piece in pieces)
    masks = np.concatenate([t.loss_mask[span] for t, _, _, span in spans])
    logprobs = np.concatenate([t.rollout_logprobs[span] for t, _, _, span in spans])
    shared = any(piece.continues >= 0 for piece in pieces)
    return TrajectoryBatch(
        input_ids=_row(np.concatenate([t.token_ids[span] for t, _, _, span in spans])),
        position_ids=_row(np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])),
        loss_mask=_row(masks),
        rollout_logprobs=_row(logprobs).to(dtype),
        advantages=_row(np.repeat([advantage for _, advantage, _, _ in spans], lengths) * masks).to(dtype),
        loss_weight=_row(np.repeat([weight for _, _, weight, _ in spans], lengths) * masks).to(dtype),
        weight_versions=_row(np.concatenate([t.weight_versions[span] for t, _, _, span in spans])),
        sequence_lengths=lengths,
        sources=tuple((t.rollout_id, t.segment) for t, _, _, _ in spans),
        continues=tuple(piece.continues for piece in pieces) if shared else (),
        temperature=temperature,
    )


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[None]


def _filler(temperature: float, dtype: torch.dtype) -> TrajectoryBatch:
    """Two tokens, the second "trained" with weight 0: every rank runs the same backward passes."""
    zeros = torch.zeros(1, 2, dtype=dtype)
    return TrajectoryBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        position_ids=torch.arange(2)[None],
        loss_mask=torch.tensor([[False, True]]),
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros,
        weight_versions=torch.full((1, 2), -1),
        sequence_lengths=(2,),
        temperature=temperature,
    )
