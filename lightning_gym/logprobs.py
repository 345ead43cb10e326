"""Token-aligned log-probabilities of a packed micro-batch; the packed forward, and the test that it is one.

The only place where anything shifts by one: the model's output at position t - 1 predicts token t, and the value
computed from it is stored at t.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError

PACKED_ATTENTION = "lightning_gym_packed"
"""Name under which the packed attention is registered with transformers."""

_SELF_TEST_LENGTHS = (5, 9, 3)
_SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


def token_logprobs(model: nn.Module, batch: TrajectoryBatch) -> Tensor:
    """log p(token t | its sequence before t) of every trained token, in nats.

    Logits are computed at the positions that predict a trained token only, and normalised in float32.

    Args:
        model: a causal language model of transformers, possibly wrapped; called as
            ``model(input_ids, position_ids=..., use_cache=False, logits_to_keep=...)``.
        batch: one packed row; logits are divided by its temperature.

    Returns:
        ``[batch, seq]`` float32, differentiable; 0 where `batch.loss_mask` is false.

    Raises:
        AlignmentError: the batch is not one packed row, or the model returned logits of another shape.
    """
    if batch.input_ids.shape[0] != 1:
        raise AlignmentError(f"expected one packed row, got input_ids of shape {tuple(batch.input_ids.shape)}")
    trained = batch.loss_mask[0].nonzero()[:, 0]
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,  # with a cache transformers does not look for packed sequences, and they attend to each other
        logits_to_keep=trained - 1,
        packed_layout=PackedLayout.of(batch.sequence_lengths, batch.input_ids.device),
    )
    logits: Tensor = output.logits[0]
    if logits.shape[0] != trained.shape[0]:
        raise AlignmentError(f"asked the model for logits at {trained.shape[0]} positions, got {logits.shape[0]}")
    chosen = batch.input_ids[0, trained]
    values = -F.cross_entropy(logits.float() / batch.temperature, chosen, reduction="none")
    return torch.zeros_like(batch.rollout_logprobs).index_put((torch.zeros_like(trained), trained), values)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How packed tokens lie in a padded ``[sequence, length]`` grid, for attention that is causal per sequence."""

    grid: Tensor
    """``[sequences, longest]`` int64: packed index of each cell; 0 in the padding, which nothing reads."""
    cells: Tensor
    """``[seq]`` int64: flat cell of each packed token; the inverse of `grid`."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "PackedLayout":
        """The layout of sequences of these lengths, laid end to end.

        Example:
            >>> layout = PackedLayout.of((2, 3), torch.device("cpu"))
            >>> layout.grid.tolist(), layout.cells.tolist()
            ([[0, 1, 0], [2, 3, 4]], [0, 1, 3, 4, 5])
        """
        sizes = torch.tensor(lengths)
        columns = torch.arange(int(sizes.max()))
        starts = sizes.cumsum(0) - sizes
        real = columns < sizes[:, None]
        grid = torch.where(real, starts[:, None] + columns, 0)
        return cls(grid.to(device), real.flatten().nonzero()[:, 0].to(device))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, for transformers' attention registry.

    Unfolds the row into a padded ``[sequence, length]`` grid and calls the fused causal kernel once: no
    ``[seq, seq]`` mask, and work proportional to the squared length of a sequence, not of the row. Padding lies after
    every real token of its sequence, so causality hides it. Without a layout (generation, evaluation) it is
    transformers' own SDPA attention.

    Args:
        module: the attention layer.
        query: ``[1, heads, seq, head_dim]``; `key` and `value` may have fewer heads.
        key: see `query`.
        value: see `query`.
        attention_mask: must be ``None`` with a layout.
        packed_layout: where each sequence lies.
        scaling: of the scores; ``None`` is head_dim ** -0.5.
        dropout: probability.
        kwargs: what transformers passes on; ``sliding_window`` is refused.

    Returns:
        ``[1, seq, heads, head_dim]``, and no attention weights.
    """
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    longest = packed_layout.grid.shape[1]
    if kwargs.get("sliding_window") is not None and kwargs["sliding_window"] < longest:
        raise ConfigError(
            f"packed attention has no sliding window, and a sequence of {longest} tokens is longer than the model's"
        )
    unfolded = [tensor[0][:, packed_layout.grid].transpose(0, 1) for tensor in (query, key, value)]
    attended = F.scaled_dot_product_attention(
        *unfolded, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
    )
    heads, head_dim = attended.shape[1], attended.shape[3]
    folded = attended.transpose(1, 2).reshape(-1, heads, head_dim)[packed_layout.cells]
    return folded[None], None


def use_packed_attention(model: nn.Module) -> None:
    """Let a transformers model compute packed rows with `packed_attention`, where its own choice is SDPA or eager.

    A model set to a flash-attention kernel keeps it: that reads the sequence borders from ``position_ids``.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    if getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager", None):
        model.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]  every PreTrainedModel has it


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse a model whose packed forward lets sequences see each other.

    Packs three short sequences, compares their logprobs with those of separate forwards.

    Raises:
        ConfigError: they differ; names by how much.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    vocab_size: int = model.config.vocab_size  # type: ignore[union-attr]  every PreTrainedModel has a config
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in _SELF_TEST_LENGTHS]
    was_training = model.training
    model.eval()
    try:
        packed = token_logprobs(model, _probe_batch(sequences).to(device))[0]
        alone = torch.cat([token_logprobs(model, _probe_batch([ids]).to(device))[0] for ids in sequences])
    finally:
        model.train(was_training)
    difference = (packed - alone).abs().max().item()
    tolerance = _SELF_TEST_TOLERANCE.get(dtype, 1e-3)
    if not difference <= tolerance:
        raise ConfigError(
            f"{type(model).__name__} mixes packed sequences: logprobs differ by {difference:.2g} nats from separate "
            f"forwards (at most {tolerance:g} in {dtype}); it cannot be trained on packed batches"
        )


def _probe_batch(sequences: list[Tensor]) -> TrajectoryBatch:
    lengths = tuple(len(ids) for ids in sequences)
    input_ids = torch.cat(sequences)[None]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    zeros = torch.zeros(input_ids.shape)
    return TrajectoryBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        loss_mask=position_ids > 0,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros,
        weight_versions=torch.zeros_like(input_ids),
        sequence_lengths=lengths,
    )
