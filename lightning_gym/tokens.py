"""Sums and means over the trained tokens of a batch, and over those of each of its sequences.

What losses, corrections and penalties share, so that "the mean over trained tokens" and "the mean of a sequence" are
each said once. A *sequence* is one packed segment: a rollout whose history was rewritten half-way has several, and each
has ratios and means of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError

MAX_LOG_RATIO = 20.0
"""Nats. Log-ratios are cut here before `exp`, so that one broken token cannot overflow a mean: e^20 is 4.9e8."""


def check_aligned(logprobs: Tensor, batch: TrajectoryBatch) -> None:
    """Refuse values that are not one a token.

    Raises:
        AlignmentError: says both shapes.
    """
    if logprobs.shape != batch.input_ids.shape:
        raise AlignmentError(
            f"logprobs have shape {tuple(logprobs.shape)}, input_ids {tuple(batch.input_ids.shape)}; logprobs are "
            "token-aligned: the value at t belongs to token t, and position 0 is 0"
        )


def sampled(batch: TrajectoryBatch) -> Tensor:
    """``[batch, seq]`` bool: trained tokens that an engine sampled, which is all but the one of a filler."""
    return batch.loss_mask & (batch.weight_versions >= 0)


def token_mean(values: Tensor, batch: TrajectoryBatch) -> Tensor:
    """Mean of ``[batch, seq]`` values over the sampled tokens, for metrics: a detached scalar, 0 without a token."""
    return token_means({"": values}, batch)[""]


def token_means(values: Mapping[str, Tensor], batch: TrajectoryBatch) -> dict[str, Tensor]:
    """Like `token_mean`, of several at once: small operations are what metrics cost."""
    mask = sampled(batch)
    stacked = torch.stack(torch.broadcast_tensors(*values.values())).detach()
    means = torch.where(mask, stacked, 0).flatten(1).sum(1) / mask.sum().clamp(min=1)
    return dict(zip(values, means.unbind(), strict=True))


def token_max(values: Tensor, batch: TrajectoryBatch) -> Tensor:
    """Largest of ``[batch, seq]`` values of at least 0 over the sampled tokens: a detached scalar, 0 without one."""
    return torch.where(sampled(batch), values.detach(), 0).amax()


def sequence_sums(values: Tensor, batch: TrajectoryBatch) -> Tensor:
    """Each token gets the sum over the trained tokens of its sequence.

    Args:
        values: ``[1, seq]``, differentiable.
        batch: one packed row.

    Returns:
        ``[1, seq]``.

    Example: two sequences of two tokens, of which the second trains.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True], [False, True, True]])
        >>> sequence_sums(torch.tensor([[9.0, 1.0, 9.0, 2.0, 3.0]]), batch).tolist()
        [[1.0, 1.0, 5.0, 5.0, 5.0]]
    """
    lengths = torch.tensor(batch.sequence_lengths, device=values.device)
    index = torch.repeat_interleave(lengths, output_size=values.shape[-1])
    trained = torch.where(batch.loss_mask, values, 0)[0]
    return trained.new_zeros(len(lengths)).index_add(0, index, trained)[index][None]


def sequence_means(values: Tensor, batch: TrajectoryBatch) -> Tensor:
    """Each token gets the mean over the trained tokens of its sequence; 0 where none trains.

    Example:
        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True], [False, True, True]])
        >>> sequence_means(torch.tensor([[9.0, 1.0, 9.0, 2.0, 3.0]]), batch).tolist()
        [[1.0, 1.0, 2.5, 2.5, 2.5]]
    """
    counts = sequence_sums(torch.ones_like(values), batch)
    return sequence_sums(values, batch) / counts.clamp(min=1)


def old_logprobs(logprobs: Tensor, batch: TrajectoryBatch) -> Tensor:
    """``[batch, seq]`` nats, of the trainer before the first update of the collection.

    Where the collection is trained on once, they equal the current ones in value.
    """
    return logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs


def ratio_of(log_ratio: Tensor) -> Tensor:
    """``exp`` of a log-ratio, cut at ±`MAX_LOG_RATIO`."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
