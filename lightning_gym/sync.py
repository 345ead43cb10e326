"""sync_weights: hand the trainer's weights to the engine, and prove that it has them.

``copy`` writes every trainer tensor into the engine's own (`Engine.weight_views`) with one fused call, from a plan made
once. Before the first copy a manifest is compared: a missing, extra or mis-shaped tensor stops the run before a
rollout. After every copy a canary is: trainer and engine must give a fixed sequence the same logprobs, which no stale
tensor, packed copy or forgotten cache survives.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gym.errors import WeightSyncError
from lightning_gym.policy.engine import Engine
from lightning_gym.weights import named_weights

_CANARY_TOKENS = 24
_CANARY_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
"""Nats; the largest seen between correct engines and trainers, tenfold. A stale tensor is off by a nat or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync did."""

    mode: str
    version: int
    seconds: float
    """All of it, canary included."""
    copy_seconds: float
    num_bytes: int
    """Written into the engine."""
    num_tensors: int
    canary_diff: float
    """Largest difference between trainer and engine on the canary's tokens, nats."""


class WeightSync:
    """Keeps one engine equal to one model.

    Args:
        engine: started, paused.
        model: the causal language model being trained.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self._engine = engine
        self._model = model
        self._views = engine.weight_views()
        check_manifest(self._views, {name: tensor.shape for name, tensor in named_weights(model)})
        generator = torch.Generator().manual_seed(0)
        vocab_size: int = model.config.vocab_size  # type: ignore[union-attr]  every PreTrainedModel has a config
        length = min(_CANARY_TOKENS, engine.max_model_len - 1)
        self._canary = torch.randint(vocab_size, (length,), generator=generator)

    def sync(self, version: int) -> SyncReport:
        """Give the engine the model's weights as `version`.

        Raises:
            WeightSyncError: the engine refused, or disagrees with the trainer afterwards.
        """
        start = time.perf_counter()
        pairs = list(self._pairs())

        def write() -> None:
            with torch.no_grad():
                # One call for all tensors; torch.optim's own foreach steps rest on it. torch 2.13, `_foreach_copy_`.
                torch._foreach_copy_([view for view, _ in pairs], [source for _, source in pairs])  # pyright: ignore[reportPrivateUsage]
                if torch.cuda.is_available():
                    torch.cuda.synchronize()

        self._engine.update_weights(write, version=version)
        copied = time.perf_counter()
        difference = self._canary_diff()
        dtype = pairs[0][0].dtype
        tolerance = _CANARY_TOLERANCE[dtype]
        if not difference <= tolerance:
            raise WeightSyncError(
                f"after syncing version {version} trainer and engine disagree by {difference:.3g} nats on the canary "
                f"tokens (at most {tolerance:g} in {dtype}): some of the engine's weights are not the trainer's"
            )
        return SyncReport(
            mode="copy",
            version=version,
            seconds=time.perf_counter() - start,
            copy_seconds=copied - start,
            num_bytes=sum(view.numel() * view.element_size() for view, _ in pairs),
            num_tensors=len(pairs),
            canary_diff=difference,
        )

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, tensor in named_weights(self._model):
            yield self._views[name], tensor

    @torch.no_grad()
    def _canary_diff(self) -> float:
        device = next(self._model.parameters()).device
        was_training = self._model.training
        self._model.eval()
        try:
            logits = self._model(input_ids=self._canary[None].to(device), use_cache=False).logits[0, :-1]
        finally:
            self._model.train(was_training)
        targets = self._canary[1:].to(device)
        trainer = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()
        engine = torch.tensor(self._engine.prompt_logprobs(self._canary.tolist()))
        return (trainer - engine).abs().max().item()


def check_manifest(engine: Mapping[str, Tensor], trainer: Mapping[str, torch.Size]) -> None:
    """Refuse engine tensors that the trainer does not fill, trainer tensors without a place, and other shapes.

    Raises:
        WeightSyncError: names every tensor concerned.
    """
    problems = [f"{name}: the trainer has it, the engine does not" for name in trainer.keys() - engine.keys()]
    problems += [f"{name}: the engine has it, the trainer does not" for name in engine.keys() - trainer.keys()]
    problems += [
        f"{name}: {tuple(shape)} in the trainer, {tuple(engine[name].shape)} in the engine"
        for name, shape in trainer.items()
        if name in engine and engine[name].shape != shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightSyncError(
            f"trainer and engine hold different weights: {listed}. Is `policy` the attribute of the whole causal LM?"
        )
