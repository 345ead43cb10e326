"""Canary: a fixed sequence that trainer and engine must give the same logprobs.

It sees what no comparison of tensors can: a weight that a layer computes with in another form or place, a part written
into the slot of another part, a cache of old weights. A forward pass each is all it costs, and that is bound by reading
the weights once: a longer sequence would cost more and find nothing else.
"""

import torch
from torch import nn

from lightning_gym.errors import WeightSyncError
from lightning_gym.policy.engine import Engine
from lightning_gym.sharding import reshard

_NUM_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
"""Nats; the largest seen between correct engines and trainers, tenfold. A stale tensor is off by a nat or more."""


class Canary:
    """Compares one engine with one model.

    Args:
        engine: started, paused.
        model: the causal language model being trained.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self._engine = engine
        self._model = model
        vocab_size: int = model.config.vocab_size  # type: ignore[union-attr]  every PreTrainedModel has a config
        length = min(_NUM_TOKENS, engine.max_model_len - 1)
        self._tokens = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))

    def check(self, dtype: torch.dtype, *, version: int) -> float:
        """Largest difference between trainer and engine, nats.

        Args:
            dtype: that the engine computes in; says how much rounding may differ.
            version: for the message.

        Raises:
            WeightSyncError: they disagree by more than rounding.
        """
        difference = self.difference()
        tolerance = _TOLERANCE[dtype]
        if not difference <= tolerance:
            raise WeightSyncError(
                f"after syncing version {version} trainer and engine disagree by {difference:.3g} nats on the canary "
                f"tokens (at most {tolerance:g} in {dtype}): some of the engine's weights are not the trainer's"
            )
        return difference

    @torch.no_grad()
    def difference(self) -> float:
        """Largest difference between trainer and engine, nats."""
        device = next(self._model.parameters()).device
        was_training = self._model.training
        self._model.eval()
        try:
            logits = self._model(input_ids=self._tokens[None].to(device), use_cache=False).logits[0, :-1]
        finally:
            self._model.train(was_training)
            reshard(self._model)
        targets = self._tokens[1:].to(device)
        trainer = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()
        # vLLM's sampler draws from torch's global generators even where nothing is sampled.
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=cuda):
            engine = torch.tensor(self._engine.prompt_logprobs(self._tokens.tolist()))
        return (trainer - engine).abs().max().item()
