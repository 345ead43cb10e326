"""Policy-gradient losses: pure functions ``(logprobs, batch, ...) -> (loss, metrics)``.

Every loss is ``sum(batch.loss_weight * per-token loss)``: the weights carry the normalisation of the whole optimizer
step, so that summing the losses of a window's micro-batches gives the loss of the window, and no function here divides.
A special case calls the general one.

Three policies meet in a batch: ``mu``, the engine that sampled (`rollout_logprobs`); ``p_old``, the trainer before the
first update of the collection (`old_logprobs`); and ``p``, the trainer whose gradient is taken (`logprobs`). Losses
compare ``p`` with ``p_old``; the step from ``mu`` to ``p_old`` is `lightning_gym.corrections`' business, a reference
model is `lightning_gym.penalties`'. Without `old_logprobs` the batch is trained on once: the ratio is 1 in value and
only its gradient counts.

Metrics are detached scalars: means over the batch's sampled tokens, or maxima where the name ends in ``_max``.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.tokens import check_aligned, old_logprobs, ratio_of, sequence_means, token_mean, token_means

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def reinforce(logprobs: Tensor, batch: TrajectoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Policy gradient without a ratio: ``-A log p``.

    Right for one update a collection. With several, ``p`` drifts from the policy that sampled and nothing here says
    so: take a loss with a ratio.

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
    check_aligned(logprobs, batch)
    return (batch.loss_weight * -batch.advantages * logprobs).sum(), {}


def rloo(logprobs: Tensor, batch: TrajectoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """`reinforce` on advantages with a leave-one-out baseline, summed over a rollout's tokens: `METHODS` has both.

    The loss is that of `reinforce`; what makes it RLOO is in the batch.

    Source: Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019.

    Example: two attempts with rewards 1 and 0 have advantages 1 and -1, each the difference to the *other* attempt.

        >>> from lightning_gym.advantages import group_advantages
        >>> from lightning_gym.testing import packed_batch
        >>> good, bad = group_advantages([1, 0], [0, 0], baseline="leave_one_out")
        >>> batch = packed_batch(
        ...     mask=[[False, True], [False, True]], advantages=[[0, good], [0, bad]], weights=[[0, 0.5], [0, 0.5]]
        ... )
        >>> loss, _ = rloo(torch.tensor([[0.0, -1.0, 0.0, -3.0]]), batch)
        >>> loss.item()
        -1.0
    """
    return reinforce(logprobs, batch)


def clipped(
    logprobs: Tensor,
    batch: TrajectoryBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The clipped surrogate of PPO: ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = p / p_old``.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives advantages, mask, weights and, with several updates a collection, the old logprobs.
        clip_low: the ratio counts down to ``1 - clip_low``.
        clip_high: the ratio counts up to ``1 + clip_high``; larger than `clip_low` is DAPO's "clip-higher".
        dual_clip: c > 1: where A < 0 the loss is at most ``-c A``, so that a bad token that has become much more
            likely cannot dominate the step; ``None``: unbounded. About 3 is usual.

    Returns:
        The scalar loss, and ``clip_frac``, ``clip_low_frac``, ``clip_high_frac``, with `dual_clip` also
        ``dual_clip_frac``: the fractions of trained tokens whose gradient a bound removed.

    Raises:
        ConfigError: `dual_clip` is not above 1.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; Yu et al. 2025, arXiv:2503.14476, eq. 10 (clip-higher); Ye
        et al. 2019, arXiv:1912.09729 (dual clip).

    Example: a ratio of 1.5 counts as 1.2; of a bad token it counts in full, and a ratio of 5 counts as 3.

        >>> from math import log
        >>> from lightning_gym.testing import tiny_batch
        >>> ratio = lambda value: torch.tensor([[0.0, log(value) - 1.0]])
        >>> loss, metrics = clipped(ratio(1.5), tiny_batch(advantage=1.0, old_logprob=-1.0))
        >>> round(loss.item(), 4), metrics["clip_frac"].item()
        (-1.2, 1.0)
        >>> round(clipped(ratio(1.5), tiny_batch(advantage=-1.0, old_logprob=-1.0))[0].item(), 4)
        1.5
        >>> round(clipped(ratio(5.0), tiny_batch(advantage=-1.0, old_logprob=-1.0), dual_clip=3.0)[0].item(), 4)
        3.0
    """
    check_aligned(logprobs, batch)
    ratio = ratio_of(logprobs - old_logprobs(logprobs, batch))
    return _clip(ratio, batch, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def grpo(
    logprobs: Tensor, batch: TrajectoryBatch, *, clip: float = 0.2, dual_clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`clipped` with equal bounds.

    The rest of the method is in the batch (`METHODS`): advantages ``(R - mean) / std`` of the group, and the mean over
    rollouts of the mean over tokens.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3; its KL term is `lightning_gym.penalties.kl_penalty`.

    Example:
        >>> from lightning_gym.testing import tiny_batch
        >>> loss, _ = grpo(torch.tensor([[0.0, -1.0]]), tiny_batch(advantage=0.5, old_logprob=-1.0))
        >>> loss.item()
        -0.5
    """
    return clipped(logprobs, batch, clip_low=clip, clip_high=clip, dual_clip=dual_clip)


def dr_grpo(logprobs: Tensor, batch: TrajectoryBatch, *, clip: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo`; what makes it "done right" is in the batch: no std, and every token weighs 1 / (rollouts x a constant).

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.

    Example: two rollouts of one and two tokens at ratio 1, divided by 2 x 4 whatever their lengths.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(
        ...     mask=[[False, True], [False, True, True]],
        ...     advantages=[[0, 0.5], [0, -0.5, -0.5]],
        ...     weights=[[0, 1 / 8], [0, 1 / 8, 1 / 8]],
        ... )
        >>> dr_grpo(torch.zeros(1, 5), batch)[0].item()
        0.0625
    """
    return grpo(logprobs, batch, clip=clip)


def dapo(
    logprobs: Tensor, batch: TrajectoryBatch, *, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[Tensor, dict[str, Tensor]]:
    """`clipped` with the upper bound raised, so that unlikely good tokens have room to grow.

    The rest of the method is in the batch (`METHODS`): mean over all tokens of the step, groups without variance played
    again, and the soft penalty of `lightning_gym.advantages.overlong_penalty`.

    Source: Yu et al. 2025, arXiv:2503.14476, eq. 8.

    Example: a ratio of 1.5 counts as 1.28.

        >>> from lightning_gym.testing import tiny_batch
        >>> loss, _ = dapo(torch.tensor([[0.0, -0.5945349]]), tiny_batch(advantage=1.0, old_logprob=-1.0))
        >>> round(loss.item(), 4)
        -1.28
    """
    return clipped(logprobs, batch, clip_low=clip_low, clip_high=clip_high)


def gspo(
    logprobs: Tensor,
    batch: TrajectoryBatch,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    level: Literal["sequence", "token"] = "sequence",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""`clipped` with one ratio a sequence: ``s = exp(mean over its trained tokens of log(p / p_old))``.

    The segments of one rollout are separate sequences, each with a ratio of its own.

    Args:
        logprobs: ``[1, seq]``, nats, token-aligned, of the weights being trained.
        batch: one packed row, whose `sequence_lengths` say where sequences end.
        clip_low: s counts down to ``1 - clip_low``. Two to three orders below a token ratio's: s is a geometric mean.
        clip_high: s counts up to ``1 + clip_high``.
        level: ``sequence``: the gradient of s spreads evenly over the sequence. ``token``: the ratio is
            ``sg(s) p / sg(p)``, the same value, and the same gradient where a sequence has one advantage and one
            weight; each token keeps its own where they differ (a KL term in the reward).

    Returns:
        As `clipped`; the fractions count the tokens of the sequences that were clipped.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7 (sequence), eq. 13 and 14 (token).

    Example: log-ratios of 0.2 and 0 make s = e^0.1.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(
        ...     mask=[[False, True, True]], advantages=[[0, 1, 1]], old_logprobs=[[0, -1.0, -1.0]]
        ... )
        >>> logprobs = torch.tensor([[0.0, -0.8, -1.0]])
        >>> round(gspo(logprobs, batch, clip_high=0.2)[0].item(), 4)
        -1.1052
        >>> round(gspo(logprobs, batch)[0].item(), 4)
        -1.0004
    """
    check_aligned(logprobs, batch)
    of_sequence = sequence_means(logprobs - old_logprobs(logprobs, batch), batch)
    if level == "token":
        of_sequence = of_sequence.detach() + logprobs - logprobs.detach()
    return _clip(ratio_of(of_sequence), batch, clip_low=clip_low, clip_high=clip_high)


def cispo(
    logprobs: Tensor, batch: TrajectoryBatch, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p``: the weight is clipped, and every token keeps a gradient.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives advantages, mask, weights and, with several updates a collection, the old logprobs.
        clip_low: the weight is at least ``1 - clip_low``; 1 is no lower bound, as in the paper.
        clip_high: the weight is at most ``1 + clip_high``. TRL's ``epsilon_high`` is the bound itself, ours plus 1;
            ScaleRL (arXiv:2510.13786) finds bounds of 4 to 8 equally good.

    Returns:
        The scalar loss, and ``clip_frac``: the fraction of trained tokens whose weight was clipped.

    Source: MiniMax 2025, arXiv:2506.13585, eq. 4 and 5.

    Example: a ratio of 10 weighs 5.

        >>> from lightning_gym.testing import tiny_batch
        >>> loss, _ = cispo(torch.tensor([[0.0, -1.0]]), tiny_batch(advantage=1.0, old_logprob=-3.3025851))
        >>> round(loss.item(), 4)
        5.0
    """
    check_aligned(logprobs, batch)
    ratio = ratio_of(logprobs.detach() - old_logprobs(logprobs, batch))
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = (batch.loss_weight * -weight * batch.advantages * logprobs).sum()
    return loss, {"clip_frac": token_mean((weight != ratio).to(loss.dtype), batch)}


def sapo(
    logprobs: Tensor, batch: TrajectoryBatch, *, temperature_positive: float = 1.0, temperature_negative: float = 1.05
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""``-(4 / T) sigmoid(T (r - 1)) A``: a soft gate instead of a clip, steeper where A is negative.

    At r = 1 the gradient is that of `reinforce`; it fades as the token moves, in either direction.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives advantages, mask, weights and, with several updates a collection, the old logprobs.
        temperature_positive: T where A > 0.
        temperature_negative: T elsewhere.

    Returns:
        The scalar loss, and ``gate_mean``: the mean of ``4 sigmoid(x) (1 - sigmoid(x))``, the fraction of the gradient
        of an unclipped ratio that is left; 1 at ratio 1.

    Source: Gao et al. 2025, arXiv:2511.20347, section 3.

    Example: at ratio 1 the gate is 4 x 1/2.

        >>> from lightning_gym.testing import tiny_batch
        >>> loss, metrics = sapo(torch.tensor([[0.0, -1.0]]), tiny_batch(advantage=1.0, old_logprob=-1.0))
        >>> round(loss.item(), 4), round(metrics["gate_mean"].item(), 4)
        (-2.0, 1.0)
    """
    check_aligned(logprobs, batch)
    ratio = ratio_of(logprobs - old_logprobs(logprobs, batch))
    good, bad = torch.full_like(ratio, temperature_positive), torch.full_like(ratio, temperature_negative)
    temperature = torch.where(batch.advantages > 0, good, bad)
    gate = torch.sigmoid(temperature * (ratio - 1))
    loss = (batch.loss_weight * -4 / temperature * gate * batch.advantages).sum()
    return loss, {"gate_mean": token_mean(4 * gate * (1 - gate), batch)}


def distillation(logprobs: Tensor, batch: TrajectoryBatch, *, clip: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    r"""On-policy distillation: the student samples, and each token's advantage is ``log p_ref - log p_old``.

    Its expected gradient is that of the reverse KL(p || p_ref) of every token, given those before it. Rewards play no
    part: `batch.advantages` are not used.

    Args:
        logprobs: ``[batch, seq]``, nats, token-aligned, of the weights being trained.
        batch: gives mask, weights, and the reference model's logprobs.
        clip: see `grpo`.

    Returns:
        The scalar loss, which in value is the weighted mean of ``log p - log p_ref``; metrics as `clipped`.

    Raises:
        AlignmentError: the batch has no `ref_logprobs`.

    Source: Agarwal et al. 2023, arXiv:2306.13649 (generalised knowledge distillation, with the student's samples and
        the reverse KL); Gu et al. 2023, arXiv:2306.08543, eq. 2.

    Example: the teacher finds the token a nat more likely.

        >>> from lightning_gym.testing import packed_batch
        >>> batch = packed_batch(mask=[[False, True]], ref_logprobs=[[0.0, -1.0]])
        >>> distillation(torch.tensor([[0.0, -2.0]]), batch)[0].item()
        -1.0
    """
    check_aligned(logprobs, batch)
    if batch.ref_logprobs is None:
        raise AlignmentError(
            "distillation needs batch.ref_logprobs, the teacher's; PolicyModule(ref_model=...) fills them, in a module "
            "of your own lightning_gym.reference.with_ref_logprobs"
        )
    advantages = torch.where(batch.loss_mask, batch.ref_logprobs - old_logprobs(logprobs, batch), 0)
    return grpo(logprobs, replace(batch, advantages=advantages), clip=clip)


LOSSES: dict[str, Loss] = {
    "reinforce": reinforce,
    "rloo": rloo,
    "clipped": clipped,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "gspo_token": functools.partial(gspo, level="token"),
    "cispo": cispo,
    "sapo": sapo,
    "distillation": distillation,
}

METHODS: dict[str, dict[str, Any]] = {
    "reinforce": {"baseline": "group_mean", "advantage_scale": "none", "aggregation": "token_mean"},
    "rloo": {"baseline": "leave_one_out", "advantage_scale": "none", "aggregation": "rollout_sum"},
    "grpo": {"baseline": "group_mean", "advantage_scale": "group_std", "aggregation": "rollout_mean"},
    "dr_grpo": {"baseline": "group_mean", "advantage_scale": "none", "aggregation": "constant"},
    "dapo": {
        "baseline": "group_mean",
        "advantage_scale": "group_std",
        "aggregation": "token_mean",
        "zero_variance": "resample",
    },
    "gspo": {"baseline": "group_mean", "advantage_scale": "group_std", "aggregation": "rollout_mean"},
    "cispo": {"baseline": "group_mean", "advantage_scale": "group_std", "aggregation": "token_mean"},
    "sapo": {"baseline": "group_mean", "advantage_scale": "group_std", "aggregation": "rollout_mean"},
    "distillation": {"baseline": "group_mean", "advantage_scale": "none", "aggregation": "token_mean"},
}
"""What each published method says about the batch, as arguments of `GymDataModule`; the loss is only half of it.

``dr_grpo`` needs a ``constant_length`` too, which is yours to choose.
"""


def loss_named(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ConfigError: there is none; names those that exist.
    """
    if name not in LOSSES:
        raise ConfigError(f"there is no loss {name!r}; choose one of {', '.join(sorted(LOSSES))}, or pass a function")
    return LOSSES[name]


def _clip(
    ratio: Tensor, batch: TrajectoryBatch, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    free = -ratio * batch.advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * batch.advantages
    objective = torch.maximum(free, bounded)
    removed = bounded > free
    fractions = {
        "clip_frac": removed,
        "clip_low_frac": removed & (ratio < 1),
        "clip_high_frac": removed & (ratio > 1),
    }
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ConfigError(f"dual_clip is {dual_clip}; expected more than 1: it bounds the ratio of bad tokens")
        ceiling = -dual_clip * batch.advantages
        fractions["dual_clip_frac"] = (batch.advantages < 0) & (objective > ceiling)
        objective = torch.where(fractions["dual_clip_frac"], ceiling, objective)
    loss = (batch.loss_weight * objective).sum()
    return loss, token_means({name: values.to(loss.dtype) for name, values in fractions.items()}, batch)
