"""Penalties: what is added to a policy-gradient loss to keep the policy near a reference, or varied.

Pure functions that return a term to add to a loss, scaled by the same `loss_weight`, so that they too do not depend on
how the window is split. They get the batch as it came from the loader, never a corrected one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.tokens import check_aligned, old_logprobs, ratio_of, sequence_sums, token_mean


def kl_penalty(logprobs: Tensor, batch: TrajectoryBatch, *, coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""``coefficient x KL(p || p_ref)`` of every trained token, given those before it.

    The gradient is that of ``k2 = (log p - log p_ref)^2 / 2``, whose expectation under p is the gradient of the KL.
    (That of k1 is 0 in expectation, and that of k3 is the gradient of KL(p_ref || p), the other direction.) The value
    that is logged is ``k3 = p_ref / p - 1 - log(p_ref / p)``, never negative and of small variance. With several
    updates a collection both are weighed by ``sg(p / p_old)``, since the tokens come from p_old.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives weights, mask, and the reference model's logprobs.
        coefficient: usually called beta.

    Returns:
        The scalar term, and ``ref_kl``: the mean of k3 in nats.

    Raises:
        AlignmentError: the batch has no `ref_logprobs`.
        ConfigError: the batch has been corrected.

    Source: Schulman 2020, "Approximating KL divergence" (k1, k2, k3); Tang and Munos 2025, arXiv:2506.09477 (which of
        their gradients is which).

    Example: the policy finds a token one nat more likely than the reference does.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True]], ref_logprobs=[[0.0, -2.0]])
        >>> term, metrics = kl_penalty(torch.tensor([[0.0, -1.0]]), batch, coefficient=0.1)
        >>> round(term.item(), 4), round(metrics["ref_kl"].item(), 4)
        (0.05, 0.3679)
    """
    _refuse_corrected(batch)
    log_ratio = _log_ratio_to_reference(logprobs, batch)
    off_policy = ratio_of(logprobs.detach() - old_logprobs(logprobs, batch))
    term = coefficient * (batch.loss_weight * off_policy * log_ratio**2 / 2).sum()
    return term, {"ref_kl": token_mean(off_policy * _k3(log_ratio), batch)}


def kl_in_reward(
    logprobs: Tensor, batch: TrajectoryBatch, *, coefficient: float
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    r"""Subtract ``coefficient x (log p_old - log p_ref)`` from the reward of every token: KL as part of the return.

    Each token's advantage loses what is still to come of its sequence, its own part included: unlike `kl_penalty`, this
    counts that a token changes which tokens follow. Applied after the advantages were made, so no baseline or scale
    touches it. What follows in a later segment of the rollout is not counted.

    Args:
        logprobs: ``[1, seq]``, nats, token-aligned; used where the batch has no `old_logprobs`.
        batch: one packed row, gives advantages, mask, and the reference model's logprobs.
        coefficient: usually called beta.

    Returns:
        The batch with other advantages, and ``ref_kl``: the mean of k3 in nats.

    Raises:
        AlignmentError: the batch has no `ref_logprobs`.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.

    Example: two tokens, half a nat and a quarter above the reference.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(
        ...     mask=[[False, True, True]], advantages=[[0, 1, 1]], ref_logprobs=[[0.0, -1.5, -1.25]]
        ... )
        >>> kl_in_reward(torch.tensor([[0.0, -1.0, -1.0]]), batch, coefficient=1.0)[0].advantages.tolist()
        [[0.0, 0.25, 0.75]]
    """
    log_ratio = _log_ratio_to_reference(old_logprobs(logprobs, batch).detach(), batch)
    before = _sums_up_to(log_ratio, batch) - log_ratio
    to_come = torch.where(batch.loss_mask, sequence_sums(log_ratio, batch) - before, 0)
    advantages = batch.advantages - coefficient * to_come
    return replace(batch, advantages=advantages), {"ref_kl": token_mean(_k3(log_ratio), batch)}


def entropy_bonus(entropies: Tensor, batch: TrajectoryBatch, *, coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""``-coefficient x H``, with H the weighted mean of the entropies of the trained tokens' distributions.

    Args:
        entropies: ``[batch, seq]``, nats, differentiable: of the distribution that token t was sampled from, see
            `lightning_gym.logprobs.token_logprobs_and_entropies`.
        batch: gives weights and mask.
        coefficient: 0.001 to 0.01 are usual.

    Returns:
        The scalar term, and ``entropy``: the mean in nats.

    Raises:
        ConfigError: the batch has been corrected.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4.

    Example: a fair coin has ln 2 nats.

        >>> from lightning_gym.testing import tiny_batch
        >>> term, metrics = entropy_bonus(torch.tensor([[0.0, 0.6931472]]), tiny_batch(), coefficient=0.1)
        >>> round(term.item(), 4), round(metrics["entropy"].item(), 4)
        (-0.0693, 0.6931)
    """
    check_aligned(entropies, batch)
    _refuse_corrected(batch)
    return -coefficient * (batch.loss_weight * entropies).sum(), {"entropy": token_mean(entropies, batch)}


def _log_ratio_to_reference(logprobs: Tensor, batch: TrajectoryBatch) -> Tensor:
    check_aligned(logprobs, batch)
    if batch.ref_logprobs is None:
        raise AlignmentError(
            "a KL term needs batch.ref_logprobs; PolicyModule(kl_coefficient=...) fills them, in a module of your own "
            "lightning_gym.reference.with_ref_logprobs"
        )
    return torch.where(batch.loss_mask, logprobs - batch.ref_logprobs, 0)


def _k3(log_ratio: Tensor) -> Tensor:
    return ratio_of(-log_ratio) - 1 + log_ratio


def _sums_up_to(values: Tensor, batch: TrajectoryBatch) -> Tensor:
    """``[1, seq]``: running sums that start anew with every sequence."""
    parts = values[0].split(batch.sequence_lengths)
    return torch.cat([part.cumsum(0) for part in parts])[None]


def _refuse_corrected(batch: TrajectoryBatch) -> None:
    if batch.corrected:
        raise ConfigError(
            "a penalty was given a corrected batch, whose weights are the loss's alone; give it the batch as it came "
            "from the loader"
        )
