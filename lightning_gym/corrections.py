"""Corrections: the engine that sampled and the trainer are not quite the same policy, and losses assume they are.

Kernels, precision and weights that have moved on make the trainer's probability of a sampled token differ from the
engine's. With ``q = p_old / mu`` (trainer before the update / engine), each function here weighs the tokens of a batch
by a function of q, and returns a batch to hand to a loss::

    batch, metrics = token_tis(logprobs, batch)
    loss, more = grpo(logprobs, batch)

Losses are linear in `loss_weight`, so weighing the tokens is weighing their losses. The weights carry no gradient, and
denominators stay those of the whole window: a token that is masked out counts as one that taught nothing.

A batch is corrected once: every function refuses one that has been. A penalty (`lightning_gym.penalties`) gets the
batch as it was.

Metrics, `none`'s too: ``ratio_mean`` and ``ratio_sq_mean`` of q over the sampled tokens and ``weight_mean`` and
``weight_sq_mean`` of the weights, from which `lightning_gym.metrics` makes the effective sample size
``mean^2 / mean of squares``; and ``out_of_band_frac``, the fraction of tokens that the bounds changed.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.ranks import Ranks
from lightning_gym.tokens import (
    check_aligned,
    old_logprobs,
    ratio_of,
    sequence_means,
    sequence_sums,
    token_means,
)

Correction = Callable[..., tuple[TrajectoryBatch, dict[str, Tensor]]]


def none(
    logprobs: Tensor, batch: TrajectoryBatch, *, low: float = 0.5, high: float = 2.0
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Weigh nothing, and report how large the mismatch is.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives the engine's logprobs.
        low: ``out_of_band_frac`` counts the tokens with q below this,
        high: or above this.

    Returns:
        The batch itself, and the metrics.

    Example: the trainer finds the token four times as likely as the engine did.

        >>> from lightning_gym.testing import tiny_batch
        >>> batch, metrics = none(torch.tensor([[0.0, -1 + 1.3862944]]), tiny_batch())
        >>> round(metrics["ratio_mean"].item(), 3), metrics["weight_mean"].item(), metrics["out_of_band_frac"].item()
        (4.0, 1.0, 1.0)
    """
    ratio = ratio_of(_log_ratio(logprobs, batch))
    return batch, _metrics(batch, ratio, torch.ones_like(ratio), (ratio < low) | (ratio > high))


def token_tis(
    logprobs: Tensor, batch: TrajectoryBatch, *, cap: float = 2.0
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Truncated importance sampling: each token weighs ``min(q, cap)``.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives the engine's logprobs.
        cap: 2 to 3 are usual.

    Returns:
        The weighed batch, and the metrics.

    Raises:
        ConfigError: the batch has been corrected before.

    Source: Ionides 2008, doi:10.1198/106186008X320456; for this mismatch Yao et al. 2025, "Your efficient RL framework
        secretly brings you off-policy RL training".

    Example: q = 4 weighs 2.

        >>> from lightning_gym.testing import tiny_batch
        >>> batch, metrics = token_tis(torch.tensor([[0.0, -1 + 1.3862944]]), tiny_batch(weight=0.5))
        >>> batch.loss_weight.tolist(), metrics["out_of_band_frac"].item()
        ([[0.0, 1.0]], 1.0)
    """
    ratio = ratio_of(_log_ratio(logprobs, batch))
    return _weigh(batch, ratio, ratio.clamp(max=cap), ratio > cap)


def token_mask(
    logprobs: Tensor, batch: TrajectoryBatch, *, low: float = 0.5, high: float = 5.0
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """IcePop: each token weighs q if ``low <= q <= high``, else 0.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives the engine's logprobs.
        low: lower end of the band.
        high: upper end of the band.

    Returns:
        The weighed batch, and the metrics.

    Raises:
        ConfigError: the batch has been corrected before.

    Source: Ling team 2025, arXiv:2510.18855 (IcePop).

    Example: q = 4 weighs 4, q = 1/4 nothing.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True, True]], rollout_logprobs=[[0, -2.0, -2.0]])
        >>> logprobs = torch.tensor([[0.0, -2 + 1.3862944, -2 - 1.3862944]])
        >>> [round(weight, 3) for weight in token_mask(logprobs, batch)[0].loss_weight[0].tolist()]
        [0.0, 2.0, 0.0]
    """
    ratio = ratio_of(_log_ratio(logprobs, batch))
    outside = (ratio < low) | (ratio > high)
    return _weigh(batch, ratio, torch.where(outside, 0, ratio), outside)


def sequence_tis(
    logprobs: Tensor, batch: TrajectoryBatch, *, cap: float = 2.0
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Each token weighs ``min(Q, cap)``, with Q the product of q over the trained tokens of its sequence.

    Unbiased up to the cap, and hard on long sequences: 100 tokens that are each 5 % off make Q = 131.

    Args:
        logprobs: ``[1, seq]``, nats, token-aligned, of the weights being trained.
        batch: one packed row, gives the engine's logprobs.
        cap: of Q.

    Returns:
        The weighed batch, and the metrics.

    Raises:
        ConfigError: the batch has been corrected before.

    Source: Ionides 2008, doi:10.1198/106186008X320456; Liu et al. 2025, "When speed kills stability".

    Example: two tokens with q = 1.2 weigh 1.44 each.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True, True]], rollout_logprobs=[[0, -2.0, -2.0]], weights=[[0, 1, 1]])
        >>> logprobs = torch.tensor([[0.0, -1.8176784, -1.8176784]])
        >>> [round(weight, 3) for weight in sequence_tis(logprobs, batch)[0].loss_weight[0].tolist()]
        [0.0, 1.44, 1.44]
    """
    log_ratio = _log_ratio(logprobs, batch)
    product = ratio_of(sequence_sums(log_ratio, batch))
    return _weigh(batch, ratio_of(log_ratio), product.clamp(max=cap), product > cap)


def sequence_mask(
    logprobs: Tensor, batch: TrajectoryBatch, *, low: float = 0.0, high: float = 3.0
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Each token weighs Q if ``low <= Q <= high``, else 0, with Q as in `sequence_tis`. TRL's default.

    Args:
        logprobs: ``[1, seq]``, nats, token-aligned, of the weights being trained.
        batch: one packed row, gives the engine's logprobs.
        low: lower end of the band.
        high: upper end of the band.

    Returns:
        The weighed batch, and the metrics.

    Raises:
        ConfigError: the batch has been corrected before.

    Source: Liu et al. 2025, "When speed kills stability" (sequence-level masked importance sampling).

    Example: two tokens with q = 2 make Q = 4, and the sequence is left out.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True, True]], rollout_logprobs=[[0, -2.0, -2.0]])
        >>> corrected, metrics = sequence_mask(torch.tensor([[0.0, -1.3068528, -1.3068528]]), batch)
        >>> corrected.loss_weight.tolist(), metrics["out_of_band_frac"].item()
        ([[0.0, 0.0, 0.0]], 1.0)
    """
    log_ratio = _log_ratio(logprobs, batch)
    product = ratio_of(sequence_sums(log_ratio, batch))
    outside = (product < low) | (product > high)
    return _weigh(batch, ratio_of(log_ratio), torch.where(outside, 0, product), outside)


def geometric_mask(
    logprobs: Tensor, batch: TrajectoryBatch, *, low: float = 0.999, high: float = 1.001, weigh_tokens: bool = True
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Leave out sequences whose geometric mean of q is outside ``[low, high]``, however long they are.

    Args:
        logprobs: ``[1, seq]``, nats, token-aligned, of the weights being trained.
        batch: one packed row, gives the engine's logprobs.
        low: lower end of the band.
        high: upper end of the band.
        weigh_tokens: tokens that stay weigh q, as in NeMo RL's ``seq-mask-tis``; ``False``: they weigh 1.

    Returns:
        The weighed batch, and the metrics.

    Raises:
        ConfigError: the batch has been corrected before.

    Source: Liu et al. 2025, "When speed kills stability" (geometric sequence masking).

    Example: log-ratios of 0.1 and -0.1 cancel in the mean.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True, True]], rollout_logprobs=[[0, -2.0, -2.0]], weights=[[0, 1, 1]])
        >>> corrected, _ = geometric_mask(torch.tensor([[0.0, -1.9, -2.1]]), batch)
        >>> [round(weight, 3) for weight in corrected.loss_weight[0].tolist()]
        [0.0, 1.105, 0.905]
    """
    log_ratio = _log_ratio(logprobs, batch)
    mean = ratio_of(sequence_means(log_ratio, batch))
    outside = (mean < low) | (mean > high)
    ratio = ratio_of(log_ratio)
    return _weigh(batch, ratio, torch.where(outside, 0, ratio if weigh_tokens else torch.ones_like(ratio)), outside)


def in_ratio(logprobs: Tensor, batch: TrajectoryBatch) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Take the engine's logprobs for the old ones: the ratio that a loss clips is then ``p / mu``, mismatch included.

    Saves the forward that computes `old_logprobs`, and lets the clip cut the mismatch as well as the update. A loss
    without a ratio does not notice.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives the engine's logprobs.

    Returns:
        The batch with other `old_logprobs`, and the metrics.

    Raises:
        ConfigError: the batch has been corrected before.

    Source: verl's "bypass mode".

    Example:
        >>> from lightning_gym.testing import tiny_batch
        >>> batch, _ = in_ratio(torch.tensor([[0.0, -1.5]]), tiny_batch())
        >>> batch.old_logprobs.tolist(), batch.corrected
        ([[0.0, -1.0]], True)
    """
    _refuse_twice(batch)
    _, metrics = none(logprobs, batch)
    return replace(batch, old_logprobs=batch.rollout_logprobs, corrected=True), metrics


CORRECTIONS: dict[str, Correction] = {
    "none": none,
    "token_tis": token_tis,
    "token_mask": token_mask,
    "icepop": token_mask,
    "sequence_tis": sequence_tis,
    "sequence_mask": sequence_mask,
    "geometric_mask": geometric_mask,
    "in_ratio": in_ratio,
}

_WITHOUT_RATIO = {"reinforce", "rloo"}


def correction_named(name: str) -> Correction:
    """The correction of that name.

    Raises:
        ConfigError: there is none; names those that exist.
    """
    if name not in CORRECTIONS:
        raise ConfigError(
            f"there is no correction {name!r}; choose one of {', '.join(sorted(CORRECTIONS))}, or pass a function"
        )
    return CORRECTIONS[name]


def check_composition(loss: Callable[..., object], correction: Correction) -> None:
    """Refuse a correction that the loss would not notice.

    Raises:
        ConfigError: `in_ratio` with a loss that has no ratio.
    """
    name = _plain_name(loss)
    if _plain_name(correction) == "in_ratio" and name in _WITHOUT_RATIO:
        raise ConfigError(
            f"correction 'in_ratio' puts the engine's logprobs into the ratio, and {name} has none: it would change "
            "nothing. Choose 'token_tis' or another, or a loss with a ratio"
        )


def _plain_name(function: Callable[..., object]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def with_correction_scale(
    batches: Sequence[TrajectoryBatch], correction: Correction, ranks: Ranks
) -> list[TrajectoryBatch]:
    """Have a correction's weights divided by their mean over the whole window, all ranks included, when it is applied.

    The weights then change which tokens teach, and not how large the step is. The mean is weighted by `loss_weight`,
    so that the weights of the window add up to what they were. It has to be known before the first backward pass:
    every batch needs its `old_logprobs`.

    Args:
        batches: the micro-batches of this rank's window.
        correction: the one that will be applied to each of them.
        ranks: who else trains; every rank calls this.

    Returns:
        The batches, with `correction_scale`.

    Raises:
        AlignmentError: a batch has no `old_logprobs`.
        ConfigError: the batches have been corrected already.

    Source: self-normalised importance sampling, Owen 2013, "Monte Carlo theory, methods and examples", section 9.2.

    Example: weights of 2 and 1/2 have a mean of 5/4.

        >>> from lightning_gym.testing import tiny_batch
        >>> window = [tiny_batch(old_logprob=-1 + 0.6931472), tiny_batch(old_logprob=-1 - 0.6931472)]
        >>> scaled = with_correction_scale(window, token_tis, Ranks())
        >>> [round(token_tis(batch.old_logprobs, batch)[0].loss_weight.sum().item(), 3) for batch in scaled]
        [1.6, 0.4]
    """
    before = after = 0.0
    for batch in batches:
        if batch.old_logprobs is None:
            raise AlignmentError(
                "a normalised correction needs batch.old_logprobs of the whole window before its first backward pass; "
                "fill them with lightning_gym.reference.with_old_logprobs"
            )
        corrected, _ = correction(batch.old_logprobs, batch)
        before += batch.loss_weight.sum(dtype=torch.float64).item()
        after += corrected.loss_weight.sum(dtype=torch.float64).item()
    before, after = ranks.sums([before, after])
    return [replace(batch, correction_scale=before / after if after > 0 else 0.0) for batch in batches]


def _log_ratio(logprobs: Tensor, batch: TrajectoryBatch) -> Tensor:
    """Of trainer before the update to engine; without gradient, and 0 where nothing trains."""
    check_aligned(logprobs, batch)
    difference = old_logprobs(logprobs, batch).detach() - batch.rollout_logprobs
    return torch.where(batch.loss_mask, difference, 0)


def _weigh(
    batch: TrajectoryBatch, ratio: Tensor, weight: Tensor, outside: Tensor
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    _refuse_twice(batch)
    corrected = replace(batch, loss_weight=batch.loss_weight * weight * batch.correction_scale, corrected=True)
    return corrected, _metrics(batch, ratio, weight, outside)


def _refuse_twice(batch: TrajectoryBatch) -> None:
    if batch.corrected:
        raise ConfigError(
            "this batch has been corrected already, and a second correction would count the mismatch of sampler and "
            "trainer twice; apply one, and give penalties the batch as it came from the loader"
        )


def _metrics(batch: TrajectoryBatch, ratio: Tensor, weight: Tensor, outside: Tensor) -> dict[str, Tensor]:
    values = {
        "ratio_mean": ratio,
        "ratio_sq_mean": ratio**2,
        "weight_mean": weight,
        "weight_sq_mean": weight**2,
        "out_of_band_frac": outside.to(ratio.dtype),
    }
    return token_means(values, batch)
