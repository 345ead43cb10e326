"""Token-aligned log-probabilities of a packed micro-batch, and the test that its sequences do not see each other.

The only place where anything shifts by one: the model's output at the token before t predicts token t, and the value
computed from it is stored at t.
"""

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.lm_head import (
    MAX_LOGITS,
    Score,
    after_head,
    caught_head,
    check_after_head,
    chunked_scores,
    embedding_rows,
    head_of,
    head_size,
    token_scores,
)
from lightning_gym.packed_attention import PACKED_ATTENTION, PackedLayout, forward_arguments, packed_forward

_PADDED = "_lightning_gym_padded_rows"  # an attribute of the model, so that copies of it have it too
_WAY_OUT = (
    "load it with attn_implementation='sdpa' and call use_packed_attention, or let it compute one padded sequence a "
    "row with use_padded_rows"
)
_SELF_TEST_LENGTHS = (5, 9, 3)
_SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


def token_logprobs(model: nn.Module, batch: TrajectoryBatch, *, max_logits: int | None = MAX_LOGITS) -> Tensor:
    """log p(token t | its sequence before t) of every trained token, in nats.

    Logits are computed at the positions that predict a trained token only, and normalised in float32 (in float64 if
    the model is). Where there are more than `max_logits` of them, they are computed in chunks, and again in the
    backward pass, so that no ``[tokens, vocab]`` tensor lives.

    Args:
        model: a causal language model of transformers, possibly wrapped; called as
            ``model(input_ids, position_ids=..., use_cache=False, logits_to_keep=..., packed_layout=...)``.
        batch: one packed row; logits are divided by its temperature.
        max_logits: alive at once; ``None``: the model's own logits, in one piece.

    Returns:
        ``[batch, seq]`` float32 (float64 if the model is), differentiable; 0 where `batch.loss_mask` is false.

    Raises:
        AlignmentError: the batch is not one packed row, a token is not in the model's vocabulary, a sequence's first
            token trains, or the model returned logits of another shape.
        ConfigError: logits have to be computed in chunks, and the model does something unknown to them.
    """
    return _aligned_scores(model, batch, max_logits, with_entropy=False)[0]


def token_logprobs_and_entropies(
    model: nn.Module, batch: TrajectoryBatch, *, max_logits: int | None = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of the distribution that each trained token was drawn from.

    Returns:
        Two tensors like that of `token_logprobs`, in nats.
    """
    logprobs, entropies = _aligned_scores(model, batch, max_logits, with_entropy=True)
    return logprobs, entropies


def use_padded_rows(model: nn.Module) -> None:
    """Let `model` compute packed batches one sequence a row, padded to the longest: for models that cannot pack.

    Those are state-space models, and models with attention of their own. Batches stay as they are, and so do the
    logprobs; what the padding costs, `padded_tokens` counts.
    """
    setattr(model, _PADDED, True)


def padded_tokens(batch: TrajectoryBatch) -> int:
    """Tokens that a model under `use_padded_rows` computes for `batch`: sequences times the longest.

    Example:
        >>> from lightning_gym.testing import tiny_batch
        >>> padded_tokens(tiny_batch())
        2
    """
    return PackedLayout.of(batch.sequence_lengths, continues=batch.continues, fill=0).grids[0].numel()


def _aligned_scores(
    model: nn.Module, batch: TrajectoryBatch, max_logits: int | None, *, with_entropy: bool
) -> tuple[Tensor, ...]:
    _check(model, batch)
    trained = batch.loss_mask[0].nonzero()[:, 0]
    score = partial(token_scores, temperature=batch.temperature, with_entropy=with_entropy)
    forward = _padded_forward if getattr(model, _PADDED, False) else _packed_forward
    values = forward(model, batch, _before(batch)[trained], batch.input_ids[0, trained], max_logits, score)
    empty = values.new_zeros(batch.input_ids.shape)
    return tuple(empty.index_put((torch.zeros_like(trained), trained), value) for value in values)


def _before(batch: TrajectoryBatch) -> Tensor:
    """``[seq]``: index of the token before each one; of a continuation's first, the last of the shared prompt."""
    before = torch.arange(-1, batch.num_tokens - 1)
    if batch.continues:
        ends = torch.tensor(batch.sequence_lengths).cumsum(0)
        for index, parent in enumerate(batch.continues):
            if parent >= 0:
                before[ends[index] - batch.sequence_lengths[index]] = ends[parent] - 1
    return before.to(batch.input_ids.device)


def _packed_forward(
    model: nn.Module, batch: TrajectoryBatch, before: Tensor, ids: Tensor, max_logits: int | None, score: Score
) -> Tensor:
    layout = PackedLayout.of(batch.sequence_lengths, batch.input_ids.device, continues=batch.continues)
    arguments = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,  # with a cache transformers does not look for packed sequences, and they see each other
        "logits_to_keep": before,
        **forward_arguments(model, layout),
    }
    with packed_forward():
        return _scored(model, arguments, slice(None), ids, len(ids), max_logits, score)


def _padded_forward(
    model: nn.Module, batch: TrajectoryBatch, before: Tensor, ids: Tensor, max_logits: int | None, score: Score
) -> Tensor:
    layout = PackedLayout.of(batch.sequence_lengths, batch.input_ids.device, continues=batch.continues, fill=0)
    (grid,) = layout.grids
    positions = torch.arange(grid.shape[1], device=grid.device).expand(grid.shape)
    # No mask: padding comes last, where nothing that a causal model computes for a real token depends on it.
    arguments = {"input_ids": batch.input_ids[0, grid], "position_ids": positions, "use_cache": False}
    return _scored(model, arguments, layout.cells[before], ids, grid.numel(), max_logits, score)


def _scored(
    model: nn.Module,
    arguments: dict[str, Any],
    rows: Tensor | slice,
    ids: Tensor,
    num_rows: int,
    max_logits: int | None,
    score: Score,
) -> Tensor:
    """``[1 or 2, tokens]``: scores of `ids` under the model's outputs at `rows` of its flattened batch.

    Args:
        model: called with `arguments`.
        arguments: of the model.
        rows: which outputs predict `ids`.
        ids: ``[tokens]``.
        num_rows: outputs for which the model would compute logits.
        max_logits: see `token_logprobs`.
        score: `token_scores` with its options.
    """
    head = head_of(model)
    if head is None or max_logits is None or num_rows * head_size(head) <= max_logits:
        logits: Tensor = model(**arguments).logits.flatten(0, 1)[rows]
        if logits.shape[0] != len(ids):
            raise AlignmentError(f"asked the model for logits at {len(ids)} positions, got {logits.shape[0]}")
        return score(logits, ids)
    finish = after_head(model.config)
    max_rows = max(1, max_logits // head_size(head))
    scores: list[Tensor] = []

    def catch(hidden: Tensor, own: Callable[[Tensor], Tensor]) -> None:
        hidden = hidden.flatten(0, 1)[rows]
        scores.append(chunked_scores(lambda part: finish(own(part)), hidden, ids, max_rows=max_rows, score=score))

    with caught_head(head, catch):
        output: Tensor = model(**arguments).logits
    check_after_head(output, head, finish)
    return scores[0]


def _check(model: nn.Module, batch: TrajectoryBatch) -> None:
    if batch.input_ids.shape[0] != 1:
        raise AlignmentError(f"expected one packed row, got input_ids of shape {tuple(batch.input_ids.shape)}")
    if (batch.loss_mask & (batch.position_ids == 0)).any():
        raise AlignmentError("the first token of a sequence trains, but nothing before it predicts it")
    rows = embedding_rows(model)
    if rows is not None:
        low, high = int(batch.input_ids.min()), int(batch.input_ids.max())
        if low < 0 or high >= rows:
            raise AlignmentError(
                f"a batch has token id {low if low < 0 else high}, but the model embeds ids 0 to {rows - 1}; "
                "tokenizer and model do not belong together, or tokens were added without resize_token_embeddings"
            )


# -- the self-test


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse a model whose packed forward is not that of one sequence at a time.

    Packs three short random sequences and compares their logprobs with those of plain forwards without any of our
    arguments, where transformers allows it under the model's own eager attention. What differs may be at most a
    quarter of what a changed first token does to the logprobs after it: in a model that hardly looks at its context,
    a contamination is small too.

    Raises:
        ConfigError: they differ; names by how much.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    vocab_size: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr]  of PreTrainedModel
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in _SELF_TEST_LENGTHS]
    changed = [torch.cat([(ids[:1] + 1) % vocab_size, ids[1:]]) for ids in sequences]
    was_training = model.training
    model.eval()
    try:
        packed = _packed_logprobs(model, _probe_batch(sequences).to(parameter.device))
        with _own_attention(model):
            alone, otherwise = (_plain_logprobs(model, rows, parameter.device) for rows in (sequences, changed))
    finally:
        model.train(was_training)
    seen = torch.cat([torch.arange(length) for length in _SELF_TEST_LENGTHS]) > 1  # token 0 is beside token 1 anyway
    context = (alone - otherwise)[seen].abs().max().item()
    tolerance = min(_SELF_TEST_TOLERANCE.get(parameter.dtype, 1e-3), max(context / 4, 1e-5))
    difference = (packed - alone).abs().max().item()
    if not difference <= tolerance:
        raise ConfigError(
            f"{type(model).__name__} mixes packed sequences: logprobs differ by {difference:.2g} nats from separate "
            f"forwards (at most {tolerance:.2g} in {parameter.dtype}); {_WAY_OUT}"
        )


def _packed_logprobs(model: nn.Module, batch: TrajectoryBatch) -> Tensor:
    try:
        return token_logprobs(model, batch)[0].cpu()
    except TypeError as error:
        raise ConfigError(f"{type(model).__name__} does not take a packed row ({error}); {_WAY_OUT}") from error


def _plain_logprobs(model: nn.Module, sequences: list[Tensor], device: torch.device) -> Tensor:
    """``[tokens]``: one sequence at a time, all logits, no argument that a plain user would not give."""
    parts: list[Tensor] = []
    for ids in sequences:
        row = ids.to(device)
        logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        parts += [torch.zeros(1, device=device), token_scores(logits, row[1:])[0]]
    return torch.cat(parts).cpu()


@contextlib.contextmanager
def _own_attention(model: nn.Module) -> Generator[None]:
    """The eager attention that came with a transformers model, if it has left it for ours."""
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if switch is None or getattr(model.config, "_attn_implementation", None) != PACKED_ATTENTION:
        yield
        return
    switch("eager")
    try:
        yield
    finally:
        switch(PACKED_ATTENTION)


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
