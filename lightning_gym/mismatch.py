"""Mismatch: how far the trainer is from the engine that sampled, measured on the sampled tokens."""

import bisect
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.tokens import MAX_LOG_RATIO, check_aligned, ratio_of, sampled, token_max, token_mean, token_means


@torch.no_grad()
def mismatch_metrics(logprobs: Tensor, batch: TrajectoryBatch) -> dict[str, Tensor]:
    """How far the trainer's logprobs are from the engine's on the same tokens.

    Returns:
        ``logprob_diff_max`` and ``logprob_diff_mean``: of ``|trainer - engine|`` in nats; ``token_mult_prob_error``:
        the mean of ``exp |trainer - engine|``, 1 when they agree (NeMo RL's health metric); ``generator_kl``: the mean
        of ``q - 1 - log q`` with ``q`` = trainer / engine, an estimate of KL(engine || trainer) in nats (NeMo RL's
        ``gen_kl_error``); ``num_trained``.

    Example: the trainer finds a token half as likely as the engine did.

        >>> from lightning_gym.testing import tiny_batch
        >>> found = mismatch_metrics(torch.tensor([[0.0, -1.6931472]]), tiny_batch())
        >>> round(found["token_mult_prob_error"].item(), 4), round(found["generator_kl"].item(), 4)
        (2.0, 0.1931)
    """
    check_aligned(logprobs, batch)
    log_ratio = logprobs - batch.rollout_logprobs
    difference = log_ratio.abs()
    num_trained = sampled(batch).sum()
    means = token_means(
        {
            "logprob_diff_mean": difference,
            "token_mult_prob_error": ratio_of(difference),
            "generator_kl": ratio_of(log_ratio) - 1 - log_ratio,
        },
        batch,
    )
    return {
        **means,
        "logprob_diff_max": token_max(difference, batch),
        "token_mult_prob_error": torch.where(num_trained > 0, means["token_mult_prob_error"], 1),
        "num_trained": num_trained.to(logprobs.dtype),
    }


_PER_DECADE = 20
_SMALLEST = 1e-6
_MAGNITUDES = tuple(
    _SMALLEST * 10 ** (step / _PER_DECADE)
    for step in range(round(math.log10(MAX_LOG_RATIO / _SMALLEST) * _PER_DECADE) + 1)
)
_EDGES = (*(-magnitude for magnitude in reversed(_MAGNITUDES)), *_MAGNITUDES)


@torch.no_grad()
def ratio_histogram(logprobs: Tensor, batch: TrajectoryBatch) -> Tensor:
    """How often the log-ratio of trainer to engine fell into each of a fixed set of bins.

    Counts add up over micro-batches and ranks, so that `ratio_quantiles` of the sum are those of the whole step; a bin
    is 12 % of the log-ratio wide, from 1e-6 to 20 nats to either side.

    Returns:
        ``[bin]`` float32, over the sampled tokens.

    Example:
        >>> from lightning_gym.testing import tiny_batch
        >>> counts = ratio_histogram(torch.tensor([[0.0, -0.9]]), tiny_batch())
        >>> [round(ratio, 2) for ratio in ratio_quantiles(counts.tolist(), [0.5])]
        [1.11]
    """
    check_aligned(logprobs, batch)
    edges = torch.tensor(_EDGES, device=logprobs.device, dtype=torch.float32)
    bins = torch.bucketize((logprobs - batch.rollout_logprobs).float(), edges).flatten()
    counts = torch.zeros(len(_EDGES) + 1, device=logprobs.device, dtype=torch.float32)
    return counts.scatter_add(0, bins, sampled(batch).flatten().to(counts.dtype))


def ratio_quantiles(counts: Sequence[float], levels: Sequence[float]) -> list[float]:
    """Ratios below which these fractions of the tokens of `ratio_histogram` lie; 1 without a token.

    Args:
        counts: ``[bin]``.
        levels: between 0 and 1.
    """
    total = sum(counts)
    if not total:
        return [1.0 for _ in levels]
    running = list(itertools.accumulate(counts))
    middles = (_EDGES[0], *(_middle(low, high) for low, high in itertools.pairwise(_EDGES)), _EDGES[-1])
    return [math.exp(middles[bisect.bisect_left(running, level * total)]) for level in levels]


def _middle(low: float, high: float) -> float:
    return 0.0 if low < 0 < high else math.copysign(math.sqrt(low * high), low)


@torch.no_grad()
def entropy_estimate(logprobs: Tensor, batch: TrajectoryBatch) -> Tensor:
    """Mean of ``-(trainer / engine) log trainer`` over the sampled tokens: the policy's entropy in nats, estimated.

    Costs nothing, where `lightning_gym.logprobs.token_logprobs_and_entropies` costs a softmax; NeMo RL's
    ``approx_entropy``.

    Example:
        >>> from lightning_gym.testing import tiny_batch
        >>> entropy_estimate(torch.tensor([[0.0, -1.0]]), tiny_batch()).item()
        1.0
    """
    check_aligned(logprobs, batch)
    return token_mean(-ratio_of(logprobs - batch.rollout_logprobs) * logprobs, batch)
