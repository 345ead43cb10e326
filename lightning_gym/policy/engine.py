"""Engine: what a colocated generation engine must do, and the values that cross that border.

Nothing here imports an engine. `VLLMEngine` is the real one and `lightning_gym.testing.FakeEngine` the public fake;
both pass the same contract tests.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # the endpoint and its tests run without torch
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is sampled. Every field is explicit: no engine default ever decides."""

    temperature: float
    """Logits are divided by this; 0 is greedy."""
    top_p: float
    top_k: int
    """-1 keeps the whole vocabulary."""
    max_tokens: int
    """At most this many sampled tokens, the turn-end id included."""
    seed: int
    stop_token_ids: tuple[int, ...]
    """Sampling one of these ends the turn; it stays in the generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the engine sampled."""

    token_ids: list[int]
    """Ends with a stop id exactly when `finish_reason` is ``"stop"``."""
    logprobs: Sequence[float]
    """Of each sampled token, in nats, under the distribution it was sampled from."""
    finish_reason: str
    """``"stop"`` or ``"length"``."""
    weight_version: int
    """The optimizer step whose weights sampled this, whole: weights never change inside a generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """What an adapter adds to the output of one linear layer: ``scaling * b @ (a @ x)``."""

    a: "torch.Tensor"
    """``[rank, inputs]``."""
    b: "torch.Tensor"
    """``[outputs, rank]``."""
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """Which model the engine is to hold."""

    path: Path
    """A directory with ``config.json`` and the tokenizer; weights on disk are not read."""
    dtype: str
    """That it is to compute in: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    weights: Callable[[], Iterable[tuple[str, "torch.Tensor"]]]
    """A fresh pass over (Hugging Face name, full tensor) of the policy being trained."""
    device: str = "cpu"
    """The trainer's, as torch writes it: ``"cpu"`` or ``"cuda:1"``."""
    trainer_bytes: int = 0
    """What the trainer will still allocate on the device: gradients, optimizer state, activations."""


Part = Literal["kv_cache", "weights"]
"""Of an engine's memory, what it can do without while the trainer trains."""

Deliver = Callable[[Generation | BaseException], None]
"""Receives one result, on the engine's thread: it must return at once and never raise."""


class Engine(Protocol):
    """A generation engine in the trainer's own process.

    Threads: `start`, `update_weights`, `prompt_logprobs`, `pause`, `resume` and `close` are called from the trainer's
    main thread and block; `generate`, `abort` and `check_alive` may be called from any thread and do not.

    Generating seeded requests leaves the process's random generators as they are: a trainer may draw from them at the
    same time.

    Life: ``start``, paused and with `weight_version` ``None``; then any number of ``update_weights`` while
    paused; generations run only between ``resume`` and ``pause``; ``close``, from any state. Then it may start
    again, as it does where a Trainer validates what it has fitted.

    Where `can_sleep`, between a ``pause`` and the next ``resume``: ``sleep``; then ``wake_up("weights")`` if they
    slept, ``update_weights`` with all of them, ``wake_up("kv_cache")``.
    """

    @property
    def weight_version(self) -> int | None:
        """Version of the last `update_weights`; ``None`` before the first, when nothing may be generated."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of context, prompt and generation together."""
        ...

    def start(self, model: EngineModel) -> None:
        """Build the engine. Leaves the trainer's process as it was: RNGs, thread count, environment, process group.

        Raises:
            EngineStartError: it could not be built; the cause is chained.
        """
        ...

    def generate(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        """Queue one prompt; its result, or its error, reaches `deliver`. Waits while the engine is paused."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop working on a request; nothing is delivered for it any more. Unknown ids are ignored."""
        ...

    def resume(self) -> None:
        """Let queued and new requests run."""
        ...

    def pause(self) -> None:
        """Stop stepping. Requests that run or wait get a `RequestAbortedError`: none spans two weight versions."""
        ...

    def check_alive(self) -> None:
        """Look whether the engine can still work.

        Raises:
            EngineDeadError: its thread died; the cause is chained.
        """
        ...

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) for i >= 1, in nats at temperature 1; works while paused."""
        ...

    def weight_views(self) -> Mapping[str, "torch.Tensor"]:
        """Hugging Face name -> the tensor the engine computes with, or the slice of it that the name stands for.

        Writing into a view inside `update_weights` is the weight update. Tied weights appear once. Cheap after the
        first call, which is how a sync finds out that the engine computes with other tensors than it did before.

        Raises:
            WeightSyncError: the engine holds the weights in a form of its own (quantised, mixture of experts, sharded);
                says which, and leaves `load_weights`.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]]) -> None:
        """Load a whole checkpoint's tensors by Hugging Face name, tied ones under every name.

        Only inside the `write` of `update_weights`.

        Raises:
            WeightSyncError: a tensor is missing, has no place in the engine, or another shape; the engine is then
                unusable.
        """
        ...

    @property
    def max_lora_rank(self) -> int:
        """Highest rank of an adapter that `load_adapter` takes; 0: none, so that adapters have to be merged."""
        ...

    def load_adapter(self, adapter: Mapping[str, LoRA]) -> None:
        """Compute with the weights and this adapter from now on; it takes the place of the one before.

        Only inside the `write` of `update_weights`.

        Args:
            adapter: Hugging Face name of a linear layer, such as ``"model.layers.0.self_attn.q_proj"`` -> what is
                added to its output. The tensors are copied. Empty: the weights alone.

        Raises:
            WeightSyncError: a layer is not there or takes no adapter, or a rank is over `max_lora_rank`.
        """
        ...

    @property
    def can_sleep(self) -> bool:
        """Whether the trainer can have the engine's memory while it trains."""
        ...

    @property
    def asleep(self) -> frozenset[Part]:
        """Parts without memory. Nothing is generated before all are awake."""
        ...

    def sleep(self, *, weights: bool) -> None:
        """Give the memory of the KV cache back, and with `weights` theirs as well: their values are lost.

        Only while paused. Addresses stay what they are, so `weight_views` are good again after `wake_up`.

        Raises:
            EngineError: the engine runs, or cannot sleep.
        """
        ...

    def wake_up(self, part: Part) -> None:
        """Give a part its memory again; one that is awake stays so. Weights have to be written anew afterwards."""
        ...

    def update_weights(self, write: Callable[[], None], *, version: int) -> None:
        """Run `write` with nothing in flight, drop every cache computed with old weights, then take `version`.

        `write` may call `weight_views`, `load_weights` and `load_adapter`. If it raises, the engine keeps the version
        it had.

        Raises:
            WeightSyncError: requests are in flight, or a cache could not be dropped.
        """
        ...

    def close(self) -> None:
        """Stop the thread and free the engine. Idempotent, bounded, leaves the trainer's process group alone."""
        ...
