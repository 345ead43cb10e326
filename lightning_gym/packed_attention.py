"""Attention that is causal inside each packed sequence, for transformers' attention registry.

transformers finds packed sequences by itself only without a mask and without a cache, and then builds a
``[seq, seq]`` mask. Here the layout is handed to the attention layers, work grows with the squared length of a
sequence, not of the row, and no mask is built.
"""

import contextlib
import inspect
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gym.errors import ConfigError

PACKED_ATTENTION = "lightning_gym_packed"
"""Name under which the packed attention is registered with transformers."""

_FILL = 0.75  # fewer, larger kernel calls against at most 1 - 0.75² of the scores in the padding
_REFUSED = ("s_aux", "position_bias", "head_mask")
_is_packed: ContextVar[bool] = ContextVar("is_packed", default=False)

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Which tokens of a packed row make a sequence, arranged for attention kernels.

    Sequences of about equal length lie in one padded grid, so that each kernel call does several and wastes little.
    """

    grids: tuple[Tensor, ...]
    """Each ``[sequences, longest]`` int64: packed index of every cell; 0 in the padding, which nothing reads."""
    cells: Tensor
    """``[seq]`` int64: for each packed token a flat cell that holds it, counted through all the grids."""
    borders: Tensor | None
    """``[sequences + 1]`` int32, for kernels that take cumulative lengths; ``None`` where a prompt is shared."""
    longest: int

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        device: torch.device | str = "cpu",
        *,
        continues: tuple[int, ...] = (),
        fill: float = _FILL,
    ) -> "PackedLayout":
        """The layout of sequences of these lengths, laid end to end.

        Args:
            lengths: in packed order.
            device: of the tensors.
            continues: `TrajectoryBatch.continues`; a shared prompt is in the grid once for every continuation.
            fill: sequences share a grid while the shortest has at least this part of the longest; 0: one grid.

        Example:
            >>> layout = PackedLayout.of((2, 3))
            >>> [grid.tolist() for grid in layout.grids], layout.cells.tolist()
            ([[[2, 3, 4]], [[0, 1]]], [3, 4, 0, 1, 2])
            >>> PackedLayout.of((2, 1, 1), continues=(-1, 0, 0)).grids[0].tolist()
            [[0, 1, 2], [0, 1, 3]]
        """
        sequences = sorted(_sequences(lengths, continues), key=len, reverse=True)
        grids = [_grid(block) for block in _blocks(sequences, fill)]
        tokens = np.concatenate([grid.flatten() for grid, _ in grids])
        real = np.concatenate([mask.flatten() for _, mask in grids]).nonzero()[0]
        cells = np.empty(sum(lengths), dtype=np.int64)
        cells[tokens[real]] = real  # a shared prompt token keeps one of its cells: all hold the same
        borders = None if continues else torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return cls(
            grids=tuple(torch.from_numpy(grid).to(device) for grid, _ in grids),
            cells=torch.from_numpy(cells).to(device),
            borders=borders,
            longest=len(sequences[0]),
        )


def _sequences(lengths: tuple[int, ...], continues: tuple[int, ...]) -> list[_Indices]:
    """Packed indices of each sequence from its first token on; prompts that others continue are not repeated alone."""
    ends = np.cumsum(lengths)
    sequences: list[_Indices] = []
    for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        own = np.arange(end - length, end)
        parent = continues[index] if continues else -1
        sequences.append(own if parent < 0 else np.concatenate([sequences[parent], own]))
    return [sequence for index, sequence in enumerate(sequences) if index not in continues]


def _blocks(sequences: list[_Indices], fill: float) -> list[list[_Indices]]:
    """Runs of about equal length; `sequences` come longest first."""
    blocks: list[list[_Indices]] = []
    for sequence in sequences:
        if not blocks or len(sequence) < fill * len(blocks[-1][0]):
            blocks.append([])
        blocks[-1].append(sequence)
    return blocks


def _grid(block: list[_Indices]) -> tuple[_Indices, npt.NDArray[np.bool_]]:
    """Packed index of each cell, and which cells are real."""
    real = np.arange(len(block[0])) < np.array([len(sequence) for sequence in block])[:, None]
    grid = np.zeros(real.shape, dtype=np.int64)
    grid[real] = np.concatenate(block)
    return grid, real


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

    Half precision on CUDA takes PyTorch's variable-length flash kernel (`torch.nn.attention.varlen`); everything else
    unfolds the row into the padded grids of the layout and calls fused causal attention on each. Padding lies after
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
        kwargs: what transformers passes on. ``sliding_window`` (a token sees itself and the ``sliding_window - 1``
            before it) and ``softcap`` (scores become ``softcap * tanh(score / softcap)``) are computed.

    Returns:
        ``[1, seq, heads, head_dim]``, and no attention weights.

    Raises:
        ConfigError: the layer asks for something else than causal attention: a mask or a bias of the model's own, an
            attention sink, a window that it does not name.
    """
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _check_plain(module, attention_mask, kwargs, packed_layout.longest)
    if torch.is_autocast_enabled(query.device.type):  # SDPA does this by itself, the variable-length kernel does not
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = kwargs.get("sliding_window")
    window = None if window is None or window >= packed_layout.longest else int(window)
    softcap: float | None = kwargs.get("softcap")
    varlen = varlen_kernel(query)
    if varlen and packed_layout.borders is not None and window is None and softcap is None and not dropout:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return varlen(q, k, v, packed_layout.borders, packed_layout.longest, scaling)[None], None
    flat: list[Tensor] = []
    for grid in packed_layout.grids:
        unfolded = [tensor[0][:, grid].transpose(0, 1) for tensor in (query, key, value)]
        attended = _causal(*unfolded, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
        flat.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(flat)[packed_layout.cells][None], None


def _check_plain(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any], longest: int) -> None:
    name = type(module).__name__
    if attention_mask is not None:
        raise ConfigError(f"{name} brings an attention mask of its own, which packed attention would leave out")
    for option in _REFUSED:
        if kwargs.get(option) is not None:
            raise ConfigError(f"{name} asks for {option}, which packed attention does not compute")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ConfigError(f"{name} is not causal; a policy is trained on what follows from the tokens before")
    config = getattr(module, "config", None)
    layer_types = set[str](getattr(config, "layer_types", None) or ())
    if others := layer_types - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{name} belongs to a model with {', '.join(sorted(others))} layers, which cannot be packed")
    window = getattr(config, "sliding_window", None)
    if (
        "sliding_attention" in layer_types
        and "sliding_window" not in kwargs
        and window is not None
        and window < longest
    ):
        raise ConfigError(
            f"{name} does not say which layers have the sliding window of {window} tokens, and a sequence has "
            f"{longest}; packed attention cannot apply it"
        )


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]
"""Queries, keys and values ``[seq, heads, head_dim]``, borders, longest, scaling -> ``[seq, heads, head_dim]``."""


def varlen_kernel(query: Tensor) -> Varlen | None:
    """PyTorch's variable-length flash attention, causal, if it is there and takes `query`.

    ``torch.nn.attention.varlen.varlen_attn`` came in 2.10 and could be scaled and given fewer key than query heads
    later; what it takes is asked of its signature.
    """
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapted_varlen(varlen_attn)


def adapted_varlen(kernel: Callable[..., Any]) -> Varlen | None:
    """`kernel` as `packed_attention` calls it; ``None`` if it cannot be scaled."""
    takes = inspect.signature(kernel).parameters.keys()
    if not {"scale", "window_size"} <= takes:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float | None) -> Tensor:
        grouped: dict[str, bool] = {}
        if k.shape[1] != q.shape[1]:
            if "enable_gqa" in takes:
                grouped = {"enable_gqa": True}
            else:
                k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        border = (borders, borders, longest, longest)
        return kernel(q, k, v, *border, scale=scaling, window_size=(-1, 0), **grouped)

    return attend


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of whole sequences, ``[sequences, heads, length, head_dim]``."""
    length = query.shape[2]
    grouped = key.shape[1] != query.shape[1]
    banded = window is not None and window < length
    if softcap is None and not banded:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
        )
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if banded:
        visible = visible.triu(1 - window)  # type: ignore[operator]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def use_packed_attention(model: nn.Module) -> None:
    """Let a transformers model compute packed rows with `packed_attention`, where its own choice is SDPA or eager.

    A model set to a flash-attention kernel keeps it: that takes the sequence borders from the call. Batches without
    packing (generation, evaluation, with or without a padding mask) are computed as before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _mask)
    if getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager", None):
        model.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]  every PreTrainedModel has it


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of `packed_attention`: none with a layout, that of SDPA without."""
    from transformers.masking_utils import sdpa_mask

    return None if _is_packed.get() else sdpa_mask(*args, **kwargs)


@contextlib.contextmanager
def packed_forward() -> Generator[None]:
    """Around a model's forward that gets a layout: transformers has no other way to say that no mask is needed."""
    token = _is_packed.set(True)
    try:
        yield
    finally:
        _is_packed.reset(token)


def forward_arguments(model: nn.Module, layout: PackedLayout) -> dict[str, Any]:
    """What tells the attention layers of `model` where each packed sequence lies.

    Raises:
        ConfigError: the model's own kernel cannot share prompts.
    """
    implementation = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if not implementation.startswith("flash"):
        return {"packed_layout": layout}
    if layout.borders is None:
        raise ConfigError(f"{implementation} cannot share prompts; leave share_prefix out, or load the model with sdpa")
    border, longest = layout.borders, layout.longest
    return {"cu_seq_lens_q": border, "cu_seq_lens_k": border, "max_length_q": longest, "max_length_k": longest}
