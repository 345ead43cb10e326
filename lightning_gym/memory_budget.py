"""How the memory of one device is divided between the trainer and the engine beside it, before either is built.

Sizes that follow from shapes are exact (weights, gradients, optimizer state, KV cache); activations are the tensors
that transformers' dense decoders keep for the backward pass, counted on CPU; allowances are set aside and say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_gym.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

Precision = Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]
"""As Lightning's ``precision`` writes it: the dtype of weights, and whether a forward casts them."""

GIB = 1 << 30
MAX_LOGITS_BYTES = 4 * 4 * 2**26
"""Alive while a gradient is computed: `lightning_gym.lm_head.MAX_LOGITS` in float32, four times."""
DEVICE_ALLOWANCE_BYTES = GIB
"""For the CUDA context, cuBLAS workspaces and what the allocator cannot use; an allowance, not a measurement."""
GRAPHS_ALLOWANCE_BYTES = GIB
"""For vLLM's CUDA graphs; an allowance, not a measurement."""

SMALLER = (
    "Smaller: kv_cache_memory_bytes, or max_num_seqs x max_model_len (KV cache); max_tokens_per_micro_batch with a "
    "larger accumulate_grad_batches, or gradient_checkpointing=True (activations); precision='bf16-true' (weights, "
    "gradients, optimizer state)"
)
"""What makes a plan smaller."""

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What memory depends on, of a dense decoder."""

    num_parameters: int
    """Tied ones once."""
    num_trained: int
    num_layers: int
    hidden_size: int
    query_size: int
    """Elements of the queries of one token and layer: heads x head_dim."""
    kv_size: int
    """Elements of its keys, and as many of its values."""
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of_config(cls, config: Any) -> "ModelSize":
        """Of a transformers configuration; the model is built without memory for its weights.

        Example:
            >>> from transformers import Qwen3Config
            >>> shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
            >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
            >>> config = Qwen3Config(vocab_size=10, tie_word_embeddings=True, **shape, **heads)
            >>> ModelSize.of_config(config).num_parameters
            688
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return cls.of_model(AutoModelForCausalLM.from_config(config))

    @classmethod
    def of_model(cls, model: "nn.Module") -> "ModelSize":
        """Of a transformers causal language model, on whatever device."""
        config: Any = model.config
        text = config.get_text_config()
        parameters = list(model.parameters())
        head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(
            num_parameters=sum(parameter.numel() for parameter in parameters),
            num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            query_size=text.num_attention_heads * head_dim,
            kv_size=kv_heads * head_dim,
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocab_size=text.vocab_size,
        )

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in every layer."""
        return 2 * self.num_layers * self.kv_size * _ELEMENT_BYTES[dtype]

    def activation_bytes_per_token(self, precision: Precision, *, gradient_checkpointing: bool = False) -> int:
        """What the layers keep of one packed token for the backward pass.

        Counted with saved-tensor hooks on Qwen3, whose q/k norms keep the most (transformers 5.19, packed attention).
        With gradient checkpointing: the input of every layer, and all of one layer.
        """
        h, q, kv, f = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        if precision == "32-true":
            layer, kept = 4 * (6 * h + 5 * q + 4 * kv + 4 * f), 4 * h
        else:
            layer, kept = 2 * (8 * h + 6 * q + 5 * kv + 4 * f), 2 * h
            if precision.endswith("mixed"):  # the residual stream and its norms stay in float32
                layer, kept = layer + 10 * h, 4 * h
        return self.num_layers * kept + layer if gradient_checkpointing else self.num_layers * layer


@dataclass(frozen=True, slots=True)
class Part:
    """One use of memory."""

    owner: Literal["trainer", "engine", "device"]
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What trainer and engine will take of one device."""

    parts: Sequence[Part]
    device_bytes: int | None = None
    """All that the device has; ``None`` where nobody knows."""

    @property
    def total_bytes(self) -> int:
        """Of all parts together."""
        return sum(part.num_bytes for part in self.parts)

    def of(self, *owners: str) -> int:
        """Bytes of the parts of these owners."""
        return sum(part.num_bytes for part in self.parts if part.owner in owners)

    def table(self) -> str:
        """One line a part, the sum, and what is left.

        Example:
            >>> print(MemoryBudget(parts=[Part("engine", "weights", 3 << 30)], device_bytes=4 << 30).table())
            engine   weights                           3.00 GiB
            together                                   3.00 GiB of 4.00 GiB, 1.00 GiB left
        """
        lines = [f"{part.owner:8} {part.name:30} {part.num_bytes / GIB:7.2f} GiB" for part in self.parts]
        end = f"{'together':39} {self.total_bytes / GIB:7.2f} GiB"
        if self.device_bytes is not None:
            left = self.device_bytes - self.total_bytes
            verdict = f"{left / GIB:.2f} GiB left" if left >= 0 else f"{-left / GIB:.2f} GiB TOO MUCH"
            end += f" of {self.device_bytes / GIB:.2f} GiB, {verdict}"
        return "\n".join([*lines, end])

    @property
    def fits(self) -> bool:
        """Whether the device has enough, as far as anybody knows."""
        return self.device_bytes is None or self.total_bytes <= self.device_bytes

    def check(self) -> None:
        """Refuse a plan that does not fit.

        Raises:
            ConfigError: with the table, and what makes it smaller.
        """
        if not self.fits:
            raise ConfigError(f"more memory is needed than there is:\n{self.table()}\n{SMALLER}")


def trainer_parts(
    size: ModelSize,
    *,
    precision: Precision,
    max_tokens_per_micro_batch: int,
    gradient_checkpointing: bool = False,
    optimizer_states: int = 2,
    reference: bool = False,
) -> list[Part]:
    """What one rank of a data-parallel trainer holds while it trains.

    Args:
        size: of the policy.
        precision: of the Trainer.
        max_tokens_per_micro_batch: packed tokens whose activations live together.
        gradient_checkpointing: see `lightning_gym.PolicyModule`.
        optimizer_states: tensors like the parameter that the optimizer keeps for each: 2 for AdamW, 0 for plain SGD.
        reference: a frozen copy of the policy is kept, for a KL or as a teacher.
    """
    element = 4 if precision == "32-true" or precision.endswith("mixed") else 2
    parts = [
        Part("trainer", "weights", size.num_parameters * element),
        Part("trainer", "gradients", size.num_trained * element),
        Part("trainer", "optimizer state", size.num_trained * element * optimizer_states),
        Part(
            "trainer",
            f"activations, {max_tokens_per_micro_batch} tokens",
            max_tokens_per_micro_batch
            * size.activation_bytes_per_token(precision, gradient_checkpointing=gradient_checkpointing),
        ),
        Part("trainer", "logits", min(MAX_LOGITS_BYTES, 4 * 4 * max_tokens_per_micro_batch * size.vocab_size)),
    ]
    if precision.endswith("mixed"):
        parts.append(Part("trainer", "weights cast for the forward", size.num_parameters * 2))
    if reference:
        parts.append(Part("trainer", "reference model", size.num_parameters * element))
    return parts


def precision_of(model: "nn.Module") -> Precision:
    """That of a model trained as its parameters are."""
    import torch

    dtype = next(model.parameters()).dtype
    names: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}
    return names.get(dtype, "32-true")


def compute_dtype(precision: Precision) -> str:
    """That a forward computes in.

    Example:
        >>> compute_dtype("bf16-mixed")
        'bfloat16'
    """
    if precision.startswith("bf16"):
        return "bfloat16"
    return "float16" if precision.startswith("16") else "float32"


def trainer_bytes_to_come(model: "nn.Module", *, precision: Precision, max_tokens_per_micro_batch: int) -> int:
    """What AdamW training will allocate beside the weights of a model that is on its device already."""
    parts = trainer_parts(
        ModelSize.of_model(model),
        precision=precision,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        gradient_checkpointing=getattr(model, "is_gradient_checkpointing", False) is True,
    )
    return sum(part.num_bytes for part in parts if part.name != "weights")


def engine_parts(
    size: ModelSize,
    *,
    dtype: str,
    kv_cache_bytes: int,
    max_num_seqs: int,
    max_batched_tokens: int,
    shared: bool = False,
    cuda_graphs: bool = True,
) -> list[Part]:
    """What the engine holds while it samples, and while the trainer trains unless it sleeps.

    Args:
        size: of the policy.
        dtype: the engine computes in, as torch calls it.
        kv_cache_bytes: of the KV cache.
        max_num_seqs: requests decoded together.
        max_batched_tokens: tokens of one engine step, prefill included.
        shared: its weights are the trainer's (``sync_mode="share"``).
        cuda_graphs: it is not run with ``enforce_eager``.
    """
    element = _ELEMENT_BYTES[dtype]
    widest = max(2 * size.intermediate_size, size.query_size + 2 * size.kv_size)
    step = max_batched_tokens * element * (4 * size.hidden_size + 2 * widest)
    sampling = 3 * 4 * max_num_seqs * size.vocab_size  # float32 logits, their log-softmax, and a copy
    return [
        Part(
            "engine",
            "weights, shared with the trainer" if shared else "weights",
            0 if shared else size.num_parameters * element,
        ),
        Part("engine", "KV cache", kv_cache_bytes),
        Part("engine", f"a step of {max_batched_tokens} tokens", step + sampling),
        *([Part("engine", "CUDA graphs (allowance)", GRAPHS_ALLOWANCE_BYTES)] if cuda_graphs else []),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What an engine is told of memory."""

    kv_cache_bytes: int
    utilization: float
    """Part of the device that the engine takes, weights included; what vLLM calls ``gpu_memory_utilization``."""
    budget: MemoryBudget
    """Of the whole device: what is taken already, the engine's parts, and what the trainer will still take."""


def plan_engine(
    size: ModelSize,
    *,
    dtype: str,
    device_bytes: int,
    free_bytes: int,
    trainer_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
    max_batched_tokens: int,
    kv_cache_bytes: int | None = None,
    cuda_graphs: bool = True,
) -> EnginePlan:
    """Fit an engine beside a trainer whose weights are on the device and whose other parts are still to come.

    The KV cache gets what every request at its longest would need, or what trainer and engine leave of the device if
    that is less, and room for one request in any case: `trainer_bytes` counts the largest micro-batch that is allowed.

    Args:
        size: of the policy.
        dtype: the engine computes in.
        device_bytes: all that the device has.
        free_bytes: of it now.
        trainer_bytes: that the trainer will still allocate: gradients, optimizer state, activations.
        max_num_seqs: requests decoded together.
        max_model_len: tokens of one request.
        max_batched_tokens: tokens of one engine step.
        kv_cache_bytes: asked for; ``None`` works it out.
        cuda_graphs: the engine captures graphs.

    Raises:
        ConfigError: the engine does not fit into what is free now, or one request does not into the KV cache.

    Example:
        >>> shape = {"num_layers": 1, "hidden_size": 8, "query_size": 8, "kv_size": 4, "intermediate_size": 16}
        >>> size = ModelSize(num_parameters=680, num_trained=680, vocab_size=10, **shape)
        >>> limits = {"max_num_seqs": 2, "max_model_len": 100, "max_batched_tokens": 64}
        >>> device = {"device_bytes": 8 << 30, "free_bytes": 7 << 30, "trainer_bytes": 1 << 30}
        >>> plan_engine(size, dtype="bfloat16", **device, **limits).kv_cache_bytes
        3200
    """

    def parts(cache: int) -> list[Part]:
        return engine_parts(
            size,
            dtype=dtype,
            kv_cache_bytes=cache,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            cuda_graphs=cuda_graphs,
        )

    one_request = max_model_len * size.kv_bytes_per_token(dtype)
    if kv_cache_bytes is None:
        room = free_bytes - trainer_bytes - DEVICE_ALLOWANCE_BYTES - sum(part.num_bytes for part in parts(0))
        kv_cache_bytes = min(max_num_seqs * one_request, max(room, one_request))
    elif kv_cache_bytes < one_request:
        raise ConfigError(
            f"kv_cache_memory_bytes is {kv_cache_bytes / GIB:.3f} GiB, and one request of max_model_len="
            f"{max_model_len} tokens needs {one_request / GIB:.3f} GiB"
        )
    engine = MemoryBudget(parts=parts(kv_cache_bytes), device_bytes=free_bytes)
    engine.check()
    budget = MemoryBudget(
        parts=[
            Part("device", "taken already", device_bytes - free_bytes),
            Part("device", "workspaces (allowance)", DEVICE_ALLOWANCE_BYTES),
            Part("trainer", "at most still to come", trainer_bytes),
            *engine.parts,
        ],
        device_bytes=device_bytes,
    )
    return EnginePlan(kv_cache_bytes=kv_cache_bytes, utilization=engine.total_bytes / device_bytes, budget=budget)


def wanted_kv_cache_bytes(size: ModelSize, *, dtype: str, max_num_seqs: int, max_model_len: int) -> int:
    """A KV cache in which every request fits at its longest: more is never used but for prefixes."""
    return max_num_seqs * max_model_len * size.kv_bytes_per_token(dtype)
