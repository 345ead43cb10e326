"""Policy-gradient losses: pure functions ``(logprobs, batch, ...) -> (loss, metrics)``.

Every loss is ``sum(batch.loss_weight * per-token loss)``: the weights carry the normalisation of the whole optimizer
step, so that summing the losses of a window's micro-batches gives the loss of the window, and no function here divides.
A special case calls the general one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def reinforce(logprobs: Tensor, batch: TrajectoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Policy gradient without a ratio: ``-A log p``.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives advantages, mask and weights.

    Returns:
        The scalar loss, and no metrics.

    Source: Williams 1992, doi:10.1007/BF00992696.

    Example: one trained token of advantage 0.5 and probability 1/2.

        >>> from lightning_gym.testing import tiny_batch
        >>> loss, _ = reinforce(torch.tensor([[0.0, -0.6931472]]), tiny_batch(advantage=0.5))
        >>> round(loss.item(), 4)
        0.3466
    """
    _check(logprobs, batch)
    return (batch.loss_weight * -batch.advantages * logprobs).sum(), {}


def clipped(
    logprobs: Tensor, batch: TrajectoryBatch, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The clipped surrogate of PPO: ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = p / p_old``.

    ``p_old`` is `batch.old_logprobs`; without them the batch is trained on once, the ratio is 1 in value, and the
    gradient is that of `reinforce`.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives advantages, mask, weights and, with several updates a collection, the old logprobs.
        clip_low: the ratio counts down to ``1 - clip_low``.
        clip_high: the ratio counts up to ``1 + clip_high``; larger than `clip_low` is DAPO's "clip-higher".

    Returns:
        The scalar loss, and ``clip_frac``: the weighted fraction of trained tokens whose gradient the clip removed.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; Yu et al. 2025, arXiv:2503.14476 (clip-higher).

    Example: a ratio of 1.5 counts as 1.2.

        >>> from lightning_gym.testing import tiny_batch
        >>> batch = tiny_batch(advantage=1.0, old_logprob=0.0)
        >>> loss, metrics = clipped(torch.tensor([[0.0, 1.5]]).log().nan_to_num(neginf=0.0), batch)
        >>> round(loss.item(), 4), metrics["clip_frac"].item()
        (-1.2, 1.0)
    """
    _check(logprobs, batch)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    ratio = torch.exp(logprobs - old)
    free = ratio * batch.advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * batch.advantages
    loss = (batch.loss_weight * -torch.minimum(free, bounded)).sum()
    removed = (bounded < free).float()
    return loss, {"clip_frac": _mean(removed, batch)}


def grpo(logprobs: Tensor, batch: TrajectoryBatch, *, clip: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """`clipped` with equal bounds. Group baselines and the mean over tokens or rollouts come with the batch.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3.
    """
    return clipped(logprobs, batch, clip_low=clip, clip_high=clip)


LOSSES: dict[str, Loss] = {"reinforce": reinforce, "grpo": grpo, "clipped": clipped}


def loss_named(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ConfigError: there is none; names those that exist.
    """
    if name not in LOSSES:
        raise ConfigError(f"there is no loss {name!r}; choose one of {', '.join(sorted(LOSSES))}, or pass a function")
    return LOSSES[name]


@torch.no_grad()
def mismatch_metrics(logprobs: Tensor, batch: TrajectoryBatch) -> dict[str, Tensor]:
    """How far the trainer's logprobs are from the engine's on the same tokens.

    Returns:
        ``logprob_diff_max`` and ``logprob_diff_mean``: of ``|trainer - engine|`` in nats; ``token_mult_prob_error``:
        the mean of ``exp |trainer - engine|``, 1 when they agree (NeMo RL's health metric); ``num_trained``.
    """
    _check(logprobs, batch)
    mask = _sampled(batch)
    difference = (logprobs - batch.rollout_logprobs)[mask].abs()
    if difference.numel() == 0:
        zero = logprobs.new_zeros(())
        return {
            "logprob_diff_max": zero,
            "logprob_diff_mean": zero,
            "token_mult_prob_error": zero + 1,
            "num_trained": zero,
        }
    return {
        "logprob_diff_max": difference.max(),
        "logprob_diff_mean": difference.mean(),
        "token_mult_prob_error": difference.exp().mean(),
        "num_trained": logprobs.new_tensor(float(difference.numel())),
    }


def _sampled(batch: TrajectoryBatch) -> Tensor:
    """Trained tokens that an engine sampled: all but the one of a filler."""
    return batch.loss_mask & (batch.weight_versions >= 0)


def _mean(values: Tensor, batch: TrajectoryBatch) -> Tensor:
    mask = _sampled(batch)
    return (values * mask).sum().detach() / mask.sum().clamp(min=1)


def _check(logprobs: Tensor, batch: TrajectoryBatch) -> None:
    if logprobs.shape != batch.input_ids.shape:
        raise AlignmentError(
            f"logprobs have shape {tuple(logprobs.shape)}, input_ids {tuple(batch.input_ids.shape)}; logprobs are "
            "token-aligned: the value at t belongs to token t, and position 0 is 0"
        )
