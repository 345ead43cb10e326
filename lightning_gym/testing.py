"""Small stand-ins that are held to the contracts of the real things.

Public, so that a user can test an own `LightningModule` or environment in seconds, on a CPU, without a download.
`tiny_tokenizer` and `tiny_model` are real Hugging Face classes of toy size: they save, load and serve like a released
checkpoint.

Importing this package imports no torch; the functions that need it import it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lightning_gym.fake_engine import FakeEngine
from lightning_gym.fake_gym import FakeGym

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from lightning_gym.batch import TrajectoryBatch
    from lightning_gym.outcome import Outcome
    from lightning_gym.trajectory import Trajectory

__all__ = [
    "CHAT_TEMPLATE",
    "FakeEngine",
    "FakeGym",
    "packed_batch",
    "tiny_batch",
    "tiny_model",
    "tiny_outcome",
    "tiny_tokenizer",
    "tiny_trajectory",
]

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part.text if part.type == "text" else "" }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- set text = text_of(message.content) -%}
  {{- "<|im_start|>" + message.role + "\\n" + text -}}
  {%- for call in message.tool_calls or [] -%}
    {%- set call = call.function or call -%}
    {{- "\\n" if text or not loop.first -}}
    {{- "<tool_call>\\n{\\"name\\": " + call.name | tojson + ", \\"arguments\\": " -}}
    {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
    {{- "}\\n</tool_call>" -}}
  {%- endfor -%}
  {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
"""ChatML with Hermes-style calls.

`tools` is ignored on purpose: a tiny policy knows its tools from the demonstrations it was trained on, and two JSON
schemas in front of every prompt would cost more tokens than the whole rollout. Each message is rendered without
looking at its neighbours, so a slice of a conversation renders to the same slice of its text.
"""

_SMALL_CORPUS = (
    "<|im_start|>user\nadd 1 then add 2 then get the count<|im_end|>\n<|im_start|>assistant\n",
    '<tool_call>\n{"name": "increment_counter", "arguments": {"count": 1}}\n</tool_call>\n<tool_call>',
    '<tool_call>\n{"name": "get_counter_value", "arguments": {}}\n</tool_call><|im_end|>\n',
    '<|im_start|>tool\n{"success":true}<|im_end|>\n<|im_start|>tool\n{"count":3}<|im_end|>\n',
    "<|im_start|>user\nreverse a b c d e f g h i j k l m n o p q r s t u v w x y z<|im_end|>\n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello, what is the answer?",
)

# A letter between white space is a symbol of its own, together with the space in front of it: without this, the BPE
# would learn "a b" as one token and a task about single letters would be about an arbitrary grouping of them.
_LONE_LETTER = r" ?(?<!\S)\p{L}(?!\S)"


def tiny_tokenizer(corpus: Iterable[str] | None = None, *, vocab_size: int = 640) -> "PreTrainedTokenizerFast":
    r"""Train a byte-level BPE tokenizer with a ChatML template, in a fraction of a second and always to the same ids.

    Text between digits, lone letters and special tokens is *not* split into words: whatever the corpus repeats
    verbatim, such as the fixed part of a tool call, becomes a single token. Decode steps are what a small run pays
    for. The full byte alphabet is in the vocabulary, so any text encodes and decodes to itself.

    ``<tool_call>`` and ``</tool_call>`` are single tokens but not *special* ones, as in Qwen3: a decoder that skips
    special tokens must not swallow the call.

    Args:
        corpus: texts, rendered chat turns included; a small built-in one if ``None``. What is seen at least twice is
            merged.
        vocab_size: upper limit; a small corpus runs out of merges before.

    Example:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.tokenize('<tool_call>\n{"name": "increment_counter", "arguments": {"count": 1')[2:]
        ['1']
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(_LONE_LETTER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # the two call tokens are added after training
        min_frequency=2,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_between_added_tokens(corpus if corpus is not None else _SMALL_CORPUS * 2), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (CALL_START, CALL_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _between_added_tokens(corpus: Iterable[str]) -> Iterable[str]:
    """What the BPE will see of each text: training, unlike encoding, does not cut the text at added tokens."""
    border = re.compile("|".join(map(re.escape, (PAD, TURN_START, TURN_END, CALL_START, CALL_END))))
    for text in corpus:
        yield from filter(None, border.split(text))


def tiny_model(
    tokenizer: "PreTrainedTokenizerFast",
    *,
    seed: int = 0,
    tie_word_embeddings: bool = True,
    num_layers: int = 2,
    hidden_size: int = 192,
    intermediate_size: int | None = None,
    head_dim: int = 32,
    num_kv_heads: int = 2,
    max_position_embeddings: int = 512,
) -> "Qwen3ForCausalLM":
    """A randomly initialised Qwen3 of toy size, fp32, on the CPU; 0.9 M parameters by default.

    Qwen3, because vLLM serves the architecture natively and because it has what real models have: grouped key/value
    heads, q/k norms, a fused gate and up projection, tied embeddings.

    Args:
        seed: of the initial weights; the global generator is left as it was.
        intermediate_size: three times `hidden_size` if ``None``.
        head_dim: 32 is the smallest that vLLM's attention on a CPU takes.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(num_kv_heads, hidden_size // head_dim),
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[TURN_END],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float().eval()


def tiny_trajectory(
    *, num_prompt: int = 2, num_trained: int = 2, rollout_id: str = "a", group_id: int = 0, weight_version: int = 0
) -> "Trajectory":
    """A trajectory of one turn: ids 1, 2, ..., logprobs of -1 nat."""
    import numpy as np

    from lightning_gym.trajectory import Trajectory

    length = num_prompt + num_trained
    mask = np.arange(length) >= num_prompt
    return Trajectory(
        rollout_id=rollout_id,
        segment=0,
        group_id=group_id,
        token_ids=np.arange(1, length + 1, dtype=np.int64),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        weight_versions=np.where(mask, weight_version, -1).astype(np.int64),
    )


def tiny_outcome(
    *, group_id: int = 0, attempt: int = 0, reward: float | None = 1.0, sampled_tokens: int = 2, **changes: object
) -> "Outcome":
    """An attempt that took one call, named ``"group.attempt"``; it failed if `reward` is ``None``."""
    from dataclasses import replace
    from typing import Any, cast

    from lightning_gym.outcome import Outcome

    outcome = Outcome(
        rollout_id=f"{group_id}.{attempt}",
        group_id=group_id,
        agent="agent",
        reward=reward,
        components={},
        sampled_tokens=sampled_tokens,
        sampled_logprobs=-0.5 * sampled_tokens,
        num_calls=1,
        num_segments=1,
        num_breaks=0,
        truncated=False,
        masked=False,
        seconds=1.0,
        failure="infra" if reward is None else None,
        misalignment=None,
    )
    return replace(outcome, **cast("dict[str, Any]", changes))


def tiny_batch(*, advantage: float = 1.0, weight: float = 1.0, old_logprob: float | None = None) -> "TrajectoryBatch":
    """A batch of two tokens of which the second trains, for worked examples of losses."""
    import torch

    from lightning_gym.batch import TrajectoryBatch

    def second(value: float) -> "torch.Tensor":
        return torch.tensor([[0.0, value]])

    return TrajectoryBatch(
        input_ids=torch.tensor([[1, 2]]),
        position_ids=torch.tensor([[0, 1]]),
        loss_mask=torch.tensor([[False, True]]),
        rollout_logprobs=second(-1.0),
        advantages=second(advantage),
        loss_weight=second(weight),
        weight_versions=torch.tensor([[-1, 0]]),
        sequence_lengths=(2,),
        old_logprobs=None if old_logprob is None else second(old_logprob),
    )


def packed_batch(
    *,
    mask: "Sequence[Sequence[bool]]",
    advantages: "Sequence[Sequence[float]] | None" = None,
    weights: "Sequence[Sequence[float]] | None" = None,
    rollout_logprobs: "Sequence[Sequence[float]] | None" = None,
    old_logprobs: "Sequence[Sequence[float]] | None" = None,
    ref_logprobs: "Sequence[Sequence[float]] | None" = None,
    dtype: "torch.dtype | None" = None,
) -> "TrajectoryBatch":
    """A packed batch from values written down sequence by sequence, for worked examples and tests of losses.

    Args:
        mask: one list a sequence, one entry a token; the first of a sequence should be false.
        advantages: like `mask`; 0 if ``None``.
        weights: like `mask`; the mean over trained tokens if ``None``.
        rollout_logprobs: like `mask`; 0 if ``None``.
        old_logprobs: like `mask`, or ``None`` for none.
        ref_logprobs: like `mask`, or ``None`` for none.
        dtype: of the floating-point fields; float32 if ``None``.

    Example:
        >>> packed_batch(mask=[[False, True], [False, True, True]]).position_ids.tolist()
        [[0, 1, 0, 1, 2]]
    """
    import torch

    from lightning_gym.batch import TrajectoryBatch

    def row(values: "Sequence[Sequence[float]]") -> "torch.Tensor":
        return torch.tensor([[value for sequence in values for value in sequence]], dtype=dtype or torch.float32)

    lengths = tuple(len(sequence) for sequence in mask)
    trains = row(mask).bool()
    zeros = torch.zeros_like(row(mask))
    mean = trains / trains.sum().clamp(min=1)
    return TrajectoryBatch(
        input_ids=torch.arange(trains.shape[1])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        loss_mask=trains,
        rollout_logprobs=zeros if rollout_logprobs is None else row(rollout_logprobs),
        advantages=zeros if advantages is None else row(advantages),
        loss_weight=mean.to(zeros.dtype) if weights is None else row(weights),
        weight_versions=torch.where(trains, 0, -1),
        sequence_lengths=lengths,
        old_logprobs=None if old_logprobs is None else row(old_logprobs),
        ref_logprobs=None if ref_logprobs is None else row(ref_logprobs),
    )
