"""The head in chunks: the numbers of the full logits, in value and gradient, for every kind of head."""

import copy

import pytest
import torch
import transformers
from torch import nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import ConfigError
from lightning_gym.lm_head import after_head, chunked_scores, token_scores, use_float32_head
from lightning_gym.logprobs import token_logprobs, token_logprobs_and_entropies, use_padded_rows
from lightning_gym.packed_attention import use_packed_attention

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 101
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "tied": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "untied": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "bias": transformers.PhiConfig(**SHAPE),
    "soft cap": transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "scaled up": transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "scaled down": transformers.GraniteConfig(**SHAPE, logits_scaling=3.0),
}


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained low-rank update: a head as adapters wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.out_features = base.out_features

    def forward(self, hidden):
        return self.base(hidden) + self.up(self.down(hidden))


def built(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).float().eval()
        if getattr(model.lm_head, "bias", None) is not None:
            nn.init.normal_(model.lm_head.bias)
    use_packed_attention(model)
    return model


def with_lora():
    model = built(CONFIGS["untied"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.set_output_embeddings(LoRALinear(model.lm_head))
    return model


def row(lengths=(9, 14, 5), *, temperature=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    zeros = torch.zeros(positions.shape, dtype=dtype)
    return TrajectoryBatch(
        input_ids=torch.randint(VOCAB, positions.shape, generator=generator),
        position_ids=positions,
        loss_mask=(torch.rand(positions.shape, generator=generator) < 0.7) & (positions > 0),
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros,
        weight_versions=torch.zeros_like(positions),
        sequence_lengths=lengths,
        temperature=temperature,
    )


def scores_and_gradients(model, batch, max_logits):
    model.zero_grad()
    logprobs, entropies = token_logprobs_and_entropies(model, batch, max_logits=max_logits)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    (logprobs * weights + 0.3 * entropies * weights.flip(1)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs, entropies, gradients


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", [*CONFIGS, "lora"])
def test_in_chunks_values_and_gradients_are_those_of_the_models_own_logits(kind, temperature):
    model = with_lora() if kind == "lora" else built(CONFIGS[kind])
    batch = row(temperature=temperature)
    whole, chunked = (scores_and_gradients(model, batch, count) for count in (None, 5 * VOCAB))
    assert whole[0].std() > 0.3
    for i in (0, 1):
        assert (whole[i] - chunked[i]).abs().max().item() < 2e-5
        assert (chunked[i][~batch.loss_mask] == 0).all()
    assert whole[2].keys() == chunked[2].keys()
    for name, expected in whole[2].items():
        assert (chunked[2][name] - expected).norm() <= 1e-5 * expected.norm().clamp(min=1e-3), name
    assert "forward" not in vars(model.get_output_embeddings())


def test_in_padded_rows_the_head_is_chunked_too():
    model = built(CONFIGS["soft cap"])
    expected = token_logprobs(model, row())
    use_padded_rows(model)
    assert (token_logprobs(model, row(), max_logits=3 * VOCAB) - expected).abs().max().item() < 1e-5


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 19, 1000])
def test_chunks_of_every_size_cover_every_position_once(num_rows):
    hidden, ids = torch.randn(19, 8, generator=torch.Generator().manual_seed(1)), torch.arange(19)
    weight = torch.randn(23, 8, generator=torch.Generator().manual_seed(2))
    sizes = []

    def head(part):
        sizes.append(len(part))
        return part @ weight.T

    scores = chunked_scores(head, hidden, ids, max_rows=num_rows, score=token_scores)
    assert (scores - token_scores(hidden @ weight.T, ids)).abs().max().item() < 1e-6
    assert sum(sizes) == 19
    assert max(sizes) <= num_rows
    assert len(sizes) == -(-19 // num_rows)


def test_no_more_logits_than_allowed_are_alive_in_a_chunk():
    model = built(CONFIGS["untied"])
    seen = []
    own = model.lm_head.forward

    def counted(hidden):
        seen.append(len(hidden))
        return own(hidden)

    model.lm_head.forward = counted
    logprobs = token_logprobs(model, row(), max_logits=4 * VOCAB)
    assert (max(seen), sum(seen)) == (4, row().loss_mask.sum().item())
    logprobs.sum().backward()
    assert (max(seen), sum(seen)) == (4, 2 * row().loss_mask.sum().item())
    assert model.lm_head.forward is counted


def test_a_row_without_trained_tokens_is_scored_in_chunks_too():
    model = built(CONFIGS["tied"])
    batch = row()
    nothing = TrajectoryBatch(
        **{name: getattr(batch, name) for name in TrajectoryBatch.__dataclass_fields__}
        | {"loss_mask": torch.zeros_like(batch.loss_mask)}
    )
    logprobs = token_logprobs(model, nothing, max_logits=-1)
    logprobs.sum().backward()
    assert not logprobs.any()


class Squared(nn.Module):
    """A model that does something of its own to the logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **kwargs):
        output = self.model(**kwargs)
        output.logits = output.logits**2 / 10
        return output


def test_unknown_things_done_to_the_logits_are_refused_in_chunks_and_right_in_one_piece():
    model = Squared(built(CONFIGS["tied"]))
    with pytest.raises(ConfigError, match=r"not known here.*max_logits=None"):
        token_logprobs(model, row(), max_logits=VOCAB)
    assert "forward" not in vars(model.get_output_embeddings())
    assert token_logprobs(model, row(), max_logits=None).std() > 0.1


def test_after_head_is_nothing_for_a_plain_model():
    logits = torch.randn(3, 5)
    assert after_head(CONFIGS["tied"])(logits) is logits


def test_scores_are_normalised_in_float32_and_float64_is_kept():
    logits, ids = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16() * 8, torch.arange(4)
    scores = token_scores(logits, ids, with_entropy=True)
    exact = token_scores(logits.double(), ids, with_entropy=True)
    assert (scores.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert (scores - exact).abs().max().item() < 1e-5
    distribution = torch.distributions.Categorical(logits=logits.double())
    assert (exact[0] - distribution.log_prob(ids)).abs().max().item() < 1e-12
    assert (exact[1] - distribution.entropy()).abs().max().item() < 1e-12


def test_a_model_in_float64_is_scored_in_float64():
    model = built(CONFIGS["untied"]).double()
    whole, chunked = (token_logprobs(model, row(), max_logits=count) for count in (None, VOCAB))
    assert whole.dtype == chunked.dtype == torch.float64
    assert (whole - chunked).abs().max().item() < 1e-12


def test_without_a_gradient_chunks_give_the_same_values():
    model = built(CONFIGS["tied"])
    expected = token_logprobs(model, row(), max_logits=None)
    with torch.no_grad():
        logprobs = token_logprobs(model, row(), max_logits=3 * VOCAB)
    assert not logprobs.requires_grad
    assert (logprobs - expected).abs().max().item() < 1e-5


@pytest.mark.parametrize("max_logits", [None, 50])
@pytest.mark.parametrize("kind", ["tied", "untied", "soft cap"])
def test_a_float32_head_scores_a_bfloat16_model_as_its_own_weights_in_float32(kind, max_logits):
    model = built(CONFIGS[kind]).bfloat16()
    batch = row()
    hidden: list[torch.Tensor] = []
    with model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0])):
        rounded = token_logprobs(model, batch, max_logits=None)
    finish = after_head(model.config)
    logits = finish(nn.functional.linear(hidden[0][0].float(), model.lm_head.weight.float()))
    expected = token_scores(logits, batch.input_ids[0, batch.loss_mask[0]])[0]

    use_float32_head(model)
    exact = token_logprobs(model, batch, max_logits=max_logits)

    assert (exact[batch.loss_mask] - expected).abs().max() < 1e-6
    assert (rounded[batch.loss_mask] - expected).abs().max() > 1e-4  # the control: rounding is there to be seen
    exact.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_a_float32_head_stays_float32_under_autocast_and_in_copies():
    model = built(CONFIGS["untied"])
    batch = row()
    plain = token_logprobs(model, batch, max_logits=None)
    use_float32_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.lm_head(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32
        assert twin.lm_head(torch.ones(1, 32)).dtype == torch.float32
    assert torch.equal(token_logprobs(model, batch, max_logits=None), plain)
    assert not torch.equal(token_logprobs(twin, batch, max_logits=None), plain)


def test_a_head_that_is_no_plain_linear_layer_is_refused_in_float32():
    with pytest.raises(ConfigError, match="LoRALinear"):
        use_float32_head(with_lora())
