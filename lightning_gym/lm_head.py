"""Scores of tokens under a language-model head, without a ``[tokens, vocab]`` tensor.

The hidden states that a model gives its head are caught, and the head is applied to a few positions at a time; the
backward pass computes their logits again instead of keeping them (`torch.utils.checkpoint`).
"""

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gym.errors import ConfigError

MAX_LOGITS = 2**26
"""Logits that may be alive at once: 0.27 GB in float32, and three to four times that while a gradient is computed."""

_PROBE = 40.0  # nats; a soft cap of 30 makes 26 of it


def token_scores(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, with_entropy: bool = False) -> Tensor:
    """Log-probability of one token for each row of logits, and the entropy of the row if wanted.

    Args:
        logits: ``[tokens, vocab]``; computed on in float32, or in float64 if they are.
        ids: ``[tokens]`` int64.
        temperature: divides the logits.
        with_entropy: costs a softmax.

    Returns:
        ``[1 or 2, tokens]``, nats, differentiable: logprobs, then entropies.

    Example: a fair coin, at any temperature.

        >>> scores = token_scores(torch.zeros(1, 2), torch.tensor([1]), temperature=0.5, with_entropy=True)
        >>> [round(score, 4) for score in scores[:, 0].tolist()]
        [-0.6931, 0.6931]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, ids[:, None])[:, 0] - normaliser
    if not with_entropy:
        return logprobs[None]
    return torch.stack([logprobs, normaliser - (logits.softmax(-1) * logits).sum(-1)])


Score = Callable[[Tensor, Tensor], Tensor]
"""`token_scores` with its options filled in."""


def chunked_scores(
    head: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, *, max_rows: int, score: Score
) -> Tensor:
    """``score(head(hidden), ids)``, a few positions at a time, computed again in the backward pass.

    Args:
        head: from ``[tokens, hidden]`` to ``[tokens, vocab]``: a linear layer, tied or not, wrapped or not.
        hidden: ``[tokens, hidden]``.
        ids: ``[tokens]`` int64.
        max_rows: positions at a time.
        score: `token_scores` with its options.

    Returns:
        ``[1 or 2, tokens]``, as `token_scores`.
    """

    def of_chunk(hidden: Tensor, ids: Tensor) -> Tensor:
        return score(head(hidden), ids)

    rows = max(1, math.ceil(len(ids) / max(1, math.ceil(len(ids) / max_rows))))  # equal chunks
    chunks = zip(hidden.split(rows), ids.split(rows), strict=True)
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts, dim=1)


def after_head(config: Any) -> Callable[[Tensor], Tensor]:
    """What models of this configuration do to the logits that come out of their head, as far as we know.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite), ``lm_head_multiplier`` multiplies
    (Falcon-H1), ``final_logit_softcapping`` makes ``cap * tanh(logits / cap)`` (Gemma).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(text, "logit_scale", None) or 1.0
    scale *= getattr(text, "lm_head_multiplier", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    cap: float | None = getattr(text, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return finish


@contextlib.contextmanager
def caught_head(head: nn.Module, score: Callable[[Tensor, Callable[[Tensor], Tensor]], None]) -> Generator[None]:
    """Inside, `head` gives its input to ``score(hidden, head's own forward)`` and returns a row of known numbers.

    The scoring happens inside the model's forward, where sharded weights are gathered.
    """
    own, instance = head.forward, vars(head)
    patched_before = "forward" in instance

    def forward(hidden: Tensor) -> Tensor:
        score(hidden, own)
        return probe_logits(head, hidden)

    head.forward = forward
    try:
        yield
    finally:
        if patched_before:
            head.forward = own
        else:
            del instance["forward"]


def probe_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """``[batch, 1, vocab]``: what `caught_head` returns, rising from -40 to 40."""
    return torch.linspace(-_PROBE, _PROBE, head_size(head), device=hidden.device).expand(hidden.shape[0], 1, -1)


def check_after_head(output: Tensor, head: nn.Module, finish: Callable[[Tensor], Tensor]) -> None:
    """Refuse a model that does to its logits something else than `finish`.

    Args:
        output: logits that the model made of `probe_logits`.
        head: of the model.
        finish: from `after_head`.
    """
    expected = finish(probe_logits(head, output))
    if output.shape != expected.shape or (output.float() - expected).abs().max().item() > 1e-2 * _PROBE:
        raise ConfigError(
            "the model changes the logits of its head in a way that is not known here (known: logit_scale, "
            "logits_scaling, lm_head_multiplier, final_logit_softcapping), so that they cannot be computed in chunks; "
            "pass max_logits=None to take the model's own logits in one piece"
        )


class _Float32Head(nn.Linear):
    """A linear layer that computes in float32 whatever its weight and its input are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's name
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def use_float32_head(model: nn.Module) -> None:
    """Let `model` compute its logits in float32 from hidden states and weights of lower precision.

    The weight stays as it is, tied or not, and is cast at every use; products of bfloat16 numbers are exact in float32.
    The engine's counterpart is ``VLLMEngine(head_dtype="float32")``.

    Raises:
        ConfigError: the head is no plain linear layer.
    """
    head = head_of(model)
    if head is None or type(head) not in (nn.Linear, _Float32Head):
        raise ConfigError(
            f"head_dtype='float32' needs an LM head that is an nn.Linear, got {type(head).__name__}; leave it out"
        )
    head.__class__ = _Float32Head  # a class and no closure: copies of the model have it too


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if `model` tells."""
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return find() if find else None


def head_size(head: nn.Module) -> int:
    """Logits a position."""
    size = getattr(head, "out_features", None)
    return int(size if size is not None else head.weight.shape[0])  # type: ignore[union-attr,index]


def embedding_rows(model: nn.Module) -> int | None:
    """Ids that `model` embeds, if it tells; a LoRA layer around the embedding does not by the usual name."""
    find: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    if find is None:
        return None
    embedding = find()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else embedding.weight.shape[0])
