"""Packed attention: every architecture computes a packed row as it computes each sequence alone, or is refused."""

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import ConfigError
from lightning_gym.logprobs import check_packing, padded_tokens, token_logprobs, use_padded_rows
from lightning_gym.packed_attention import (
    PACKED_ATTENTION,
    PackedLayout,
    adapted_varlen,
    forward_arguments,
    packed_attention,
    use_packed_attention,
)
from lightning_gym.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 97
LENGTHS = (17, 4, 25, 11)  # with windows of 8 below: shorter and longer sequences than the window
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that tokens care about each other
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA = SHAPE | {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen2-sliding": transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "llama": transformers.LlamaConfig(**SHAPE),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=8),
    "phi3": transformers.Phi3Config(**SHAPE, sliding_window=8),
    "granite": transformers.GraniteConfig(**SHAPE, logits_scaling=3.0),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=None
    ),
}
CANNOT_PACK = {
    "mamba": transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2
    ),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
}


def built(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = copy.deepcopy(config)  # from_config writes the attention into the one that it is given
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def packed_row(sequences):
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])[None]
    zeros = torch.zeros(positions.shape)
    return TrajectoryBatch(
        input_ids=torch.cat(sequences)[None],
        position_ids=positions,
        loss_mask=positions > 0,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros,
        weight_versions=torch.zeros_like(positions),
        sequence_lengths=tuple(len(ids) for ids in sequences),
    )


def random_sequences(lengths=LENGTHS, vocab=VOCAB):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def one_by_one(model, sequences):
    parts = []
    for ids in sequences:
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        chosen = logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        parts += [chosen.new_zeros(1), chosen]
    return torch.cat(parts)[None]


def gradient(model, logprobs):
    model.zero_grad()
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    (logprobs * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_like_one_by_one(model, sequences):
    eager = built(model.config)
    expected = one_by_one(eager, sequences)
    expected_gradient = gradient(eager, expected)
    attention = model.config._attn_implementation
    logprobs = token_logprobs(model, packed_row(sequences))
    assert (logprobs - expected).abs().max().item() < 1e-5
    assert expected.std() > 0.5
    found = gradient(model, logprobs)
    assert (model.config._attn_implementation, eager.config._attn_implementation) == (attention, "eager")
    assert ((found - expected_gradient).norm() / expected_gradient.norm()).item() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_computes_a_packed_row_as_it_computes_each_sequence_alone(name):
    model = built(CONFIGS[name])
    use_packed_attention(model)
    check_packing(model)
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert_like_one_by_one(model, random_sequences())


@pytest.mark.parametrize("name", CANNOT_PACK)
def test_a_model_that_cannot_pack_is_refused_with_the_way_out(name):
    model = built(CANNOT_PACK[name])
    use_packed_attention(model)
    with pytest.raises(ConfigError, match=r"(mixes packed|does not take a packed).*use_padded_rows"):
        check_packing(model)


@pytest.mark.parametrize("name", [*CANNOT_PACK, "qwen3", "gpt2", "gemma2"])
def test_in_padded_rows_every_model_computes_each_sequence_alone(name):
    model = built((CONFIGS | CANNOT_PACK)[name])
    use_padded_rows(model)
    check_packing(model)
    assert_like_one_by_one(model, random_sequences())


def test_padded_rows_count_what_they_cost():
    assert padded_tokens(packed_row(random_sequences())) == 4 * 25


def test_gradient_checkpointing_changes_nothing():
    model = built(CONFIGS["qwen3"])
    use_packed_attention(model)
    batch = packed_row(random_sequences())
    plain = gradient(model, token_logprobs(model, batch))
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(gradient(model, token_logprobs(model, batch)), plain)


def test_generation_with_left_padding_is_that_of_sdpa():
    model, sdpa = built(CONFIGS["qwen3"]), built(CONFIGS["qwen3"])
    sdpa.set_attn_implementation("sdpa")
    use_packed_attention(model)
    ids = random_sequences((9, 9))
    batch = torch.stack([torch.cat([torch.zeros(3, dtype=torch.int64), ids[0][3:]]), ids[1]])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    logits = model(batch, attention_mask=mask).logits
    assert torch.equal(logits, sdpa(batch, attention_mask=mask).logits)
    assert not torch.equal(logits, model(batch).logits)


class OwnPositions(nn.Module):
    """A model that counts positions through the row, whatever it is told."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, position_ids=None, **kwargs):
        return self.model(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)


@pytest.mark.parametrize("initializer_range", [0.2, 0.02])
def test_a_model_whose_positions_do_not_restart_is_refused(initializer_range):
    model = built(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=initializer_range
        )
    )
    use_packed_attention(model)
    check_packing(model)
    with pytest.raises(ConfigError, match="OwnPositions mixes packed sequences"):
        check_packing(OwnPositions(model))


class NoLayout(OwnPositions):
    """A model whose attention does not hear of the layout."""

    def forward(self, input_ids, packed_layout=None, **kwargs):
        return self.model(input_ids, **kwargs)


@pytest.mark.parametrize("context", [1.0, 3e-2, 3e-4])
def test_a_model_whose_attention_ignores_packing_is_refused_however_little_it_attends(context):
    model = built(transformers.Qwen2Config(**SHAPE | {"initializer_range": 0.02}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(context)
    use_packed_attention(model)
    check_packing(model)
    with pytest.raises(ConfigError, match="NoLayout mixes packed sequences"):
        check_packing(NoLayout(model))


def test_a_model_that_takes_no_layout_is_refused_in_words():
    class Strict(OwnPositions):
        def forward(self, input_ids, position_ids=None, use_cache=None, logits_to_keep=0):
            return self.model(input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

    with pytest.raises(ConfigError, match=r"Strict does not take a packed row .*packed_layout"):
        check_packing(Strict(built(CONFIGS["qwen2"])))


# -- the attention function


def heads(num_tokens, *, num_heads=2, requires_grad=False):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, num_heads, num_tokens, 4, generator=generator, requires_grad=requires_grad)


def plain_module(**config):
    module = nn.Module()
    module.config = transformers.PreTrainedConfig(**config)
    return module


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "an attention mask of its own"),
        ({"s_aux": torch.zeros(2)}, "asks for s_aux"),
        ({"position_bias": torch.zeros(1)}, "asks for position_bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_that_is_not_plainly_causal_is_refused(asked, said):
    arguments = {"attention_mask": None, "packed_layout": PackedLayout.of((5, 3))} | asked
    with pytest.raises(ConfigError, match=said):
        packed_attention(plain_module(), heads(8), heads(8), heads(8), **arguments)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "with chunked_attention layers"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 4}, "window of 4 tokens, and a sequence has 5"),
    ],
)
def test_layers_whose_mask_only_the_model_knows_are_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        packed_attention(
            plain_module(**config), heads(8), heads(8), heads(8), None, packed_layout=PackedLayout.of((5, 3))
        )


@pytest.mark.parametrize(
    ("lengths", "grids", "cells"),
    [
        ((3,), [[[0, 1, 2]]], [0, 1, 2]),
        ((1, 1), [[[0], [1]]], [0, 1]),
        ((3, 4, 1), [[[3, 4, 5, 6], [0, 1, 2, 0]], [[7]]], [4, 5, 6, 0, 1, 2, 3, 8]),
    ],
)
def test_a_layout_lays_sequences_into_grids_and_cells_read_them_back(lengths, grids, cells):
    layout = PackedLayout.of(lengths)
    assert [grid.tolist() for grid in layout.grids] == grids
    assert layout.cells.tolist() == cells
    assert torch.cat([grid.flatten() for grid in layout.grids])[layout.cells].tolist() == list(range(sum(lengths)))
    assert layout.borders.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert layout.longest == max(lengths)


def test_a_shared_prompt_is_laid_before_each_continuation():
    layout = PackedLayout.of((2, 1, 3, 4), continues=(-1, 0, 0, -1))
    assert [grid.tolist() for grid in layout.grids] == [[[0, 1, 3, 4, 5], [6, 7, 8, 9, 0]], [[0, 1, 2]]]
    assert torch.cat([grid.flatten() for grid in layout.grids])[layout.cells].tolist() == list(range(10))
    assert layout.borders is None


def test_a_flash_kernel_is_told_the_borders_and_cannot_share_prompts():
    model = tiny_model(tiny_tokenizer(), num_layers=1, hidden_size=32, num_kv_heads=1)
    model.config._attn_implementation = "flash_attention_2"
    use_packed_attention(model)
    assert model.config._attn_implementation == "flash_attention_2"
    arguments = forward_arguments(model, PackedLayout.of((5, 3)))
    assert arguments.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert arguments["cu_seq_lens_k"].tolist() == [0, 5, 8]
    assert arguments["cu_seq_lens_k"].dtype == torch.int32
    assert arguments["max_length_q"] == 5
    with pytest.raises(ConfigError, match="flash_attention_2 cannot share prompts"):
        forward_arguments(model, PackedLayout.of((2, 1, 1), continues=(-1, 0, 0)))


def fake_varlen(query, key, value, borders, borders_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """The signature of torch.nn.attention.varlen.varlen_attn, computed one sequence at a time."""
    assert borders is borders_k
    assert longest == longest_k == borders.diff().max()
    assert window_size == (-1, 0)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value)),
            is_causal=True,
            scale=scale,
            enable_gqa=enable_gqa,
        )[0].transpose(0, 1)
        for start, stop in borders.unfold(0, 2, 1).tolist()
    ]
    return torch.cat(parts)


def fake_varlen_without_groups(query, key, value, borders, borders_k, longest, longest_k, *, scale, window_size):
    """The signature of torch 2.11's: as many key as query heads."""
    assert query.shape == key.shape == value.shape
    return fake_varlen(
        *(query, key, value, borders, borders_k, longest, longest_k),
        scale=scale,
        window_size=window_size,
        enable_gqa=False,
    )


def unscaled_varlen(query, key, value, borders, borders_k, longest, longest_k, is_causal=False, return_aux=None):
    """The signature of torch 2.10's."""
    raise AssertionError("it cannot scale the scores")


@pytest.mark.parametrize("kernel", [fake_varlen, fake_varlen_without_groups])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"sliding_window": 3}, {"softcap": 1.0}])
def test_a_variable_length_kernel_gives_what_the_grids_give(monkeypatch, options, kernel):
    arguments = (plain_module(), heads(12, num_heads=4), heads(12), heads(12).flip(2), None)
    layout = PackedLayout.of((5, 1, 6))
    grids, _ = packed_attention(*arguments, packed_layout=layout, **options)
    monkeypatch.setattr("lightning_gym.packed_attention.varlen_kernel", lambda query: adapted_varlen(kernel))
    attended, _ = packed_attention(*arguments, packed_layout=layout, **options)
    assert (grids - attended).abs().max().item() < 1e-6
    assert grids.shape == attended.shape == (1, 12, 4, 4)


def test_a_variable_length_kernel_that_cannot_scale_is_left_alone():
    assert adapted_varlen(unscaled_varlen) is None


def test_under_autocast_every_kernel_gets_the_dtype_that_is_cast_to(monkeypatch):
    seen = []

    def kernel(query, key, value, *others, **options):
        seen.append((query.dtype, key.dtype, value.dtype))
        return fake_varlen(query, key, value, *others, **options)

    kernel.__signature__ = inspect.signature(fake_varlen)
    monkeypatch.setattr("lightning_gym.packed_attention.varlen_kernel", lambda query: adapted_varlen(kernel))
    query, key, value = heads(12, num_heads=4), heads(12), heads(12).bfloat16()  # float32 norms make float32 queries
    with torch.autocast("cpu", torch.bfloat16):
        packed_attention(plain_module(), query, key, value, None, packed_layout=PackedLayout.of((5, 7)))
    assert seen == [(torch.bfloat16,) * 3]
