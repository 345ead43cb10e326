"""Logprobs of packed rows: those of separate forwards, in value and gradient, and of no neighbour."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.logprobs import check_packing, token_logprobs, use_padded_rows
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.testing import tiny_batch, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (7, 2, 13, 5)


@pytest.fixture(scope="module")
def plain(one_thread):
    """A model with the attention it came with."""
    return tiny_model(tiny_tokenizer(), num_layers=2, hidden_size=64)


@pytest.fixture(scope="module")
def model(plain):
    packed = tiny_model(tiny_tokenizer(), num_layers=2, hidden_size=64)
    use_packed_attention(packed)
    return packed


def packed_row(sequences, *, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(len(ids) for ids in sequences)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    mask = (torch.rand(positions.shape, generator=generator) < 0.6) & (positions > 0)
    zeros = torch.zeros(positions.shape)
    return TrajectoryBatch(
        input_ids=torch.cat(sequences)[None],
        position_ids=positions,
        loss_mask=mask,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros,
        weight_versions=torch.zeros_like(positions),
        sequence_lengths=lengths,
        temperature=temperature,
    )


def random_sequences(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(400, (length,), generator=generator) for length in LENGTHS]


def reference(model, sequences, mask, temperature=1.0):
    """log p of every token given those before it, one sequence at a time, full logits."""
    parts = []
    for ids in sequences:
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float() / temperature
        chosen = logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        parts += [chosen.new_zeros(1), chosen]
    return torch.cat(parts)[None] * mask


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_packed_logprobs_are_those_of_separate_forwards(model, plain, temperature):
    sequences = random_sequences()
    batch = packed_row(sequences, temperature=temperature)
    logprobs = token_logprobs(model, batch)
    expected = reference(plain, sequences, batch.loss_mask, temperature)
    assert (logprobs - expected).abs().max().item() < 1e-5
    assert (logprobs[~batch.loss_mask] == 0).all()
    assert (logprobs[batch.loss_mask] < -1).all()
    assert logprobs.dtype == torch.float32


def test_packed_gradients_are_those_of_separate_forwards(model, plain):
    sequences = random_sequences()
    batch = packed_row(sequences)
    weights = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for net, logprobs in ((model, token_logprobs(model, batch)), (plain, reference(plain, sequences, batch.loss_mask))):
        net.zero_grad()
        (logprobs * weights).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert gradients[1].norm() > 1
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 1e-5


def test_temperature_divides_the_logits(model):
    batch = packed_row(random_sequences())
    cold, warm = (token_logprobs(model, replace(batch, temperature=t)) for t in (0.5, 1.0))
    assert (cold - warm)[batch.loss_mask].abs().min() > 0


def test_other_tokens_in_one_packed_sequence_change_the_others_by_exactly_nothing(model):
    sequences = random_sequences()
    before = token_logprobs(model, packed_row(sequences))
    changed = [*sequences[:2], (sequences[2] + 17) % 400, sequences[3]]
    batch = packed_row(changed)
    after = token_logprobs(model, batch)
    inside = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool)
    outside[inside] = False
    assert (before[:, inside] - after[:, inside]).abs().max() > 0.01
    assert torch.equal(before[:, outside], after[:, outside])


def test_a_later_token_changes_no_earlier_logprob(model):
    sequences = random_sequences()
    before = token_logprobs(model, packed_row(sequences))
    sequences[0][-1] = (sequences[0][-1] + 1) % 400
    after = token_logprobs(model, packed_row(sequences))
    assert torch.equal(before[:, : LENGTHS[0] - 1], after[:, : LENGTHS[0] - 1])


def test_a_row_without_trained_tokens_has_zero_logprobs(model):
    batch = replace(tiny_batch(), loss_mask=torch.tensor([[False, False]]))
    assert token_logprobs(model, batch).tolist() == [[0.0, 0.0]]


def test_more_than_one_row_is_refused(model):
    two = torch.zeros(2, 2)
    batch = TrajectoryBatch(
        input_ids=two.long(),
        position_ids=two.long(),
        loss_mask=two.bool(),
        rollout_logprobs=two,
        advantages=two,
        loss_weight=two,
        weight_versions=two.long(),
        sequence_lengths=(2,),
    )
    with pytest.raises(AlignmentError, match=r"one packed row.*\(2, 2\)"):
        token_logprobs(model, batch)


class AllLogits(nn.Module):
    """A wrapper that does not pass on which logits are wanted."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, logits_to_keep, **kwargs):
        return self.model(**kwargs)


def test_logits_of_another_count_than_asked_for_are_refused(model):
    with pytest.raises(AlignmentError, match="asked the model for logits at 1 positions, got 2"):
        token_logprobs(AllLogits(model), tiny_batch())


# -- check_packing


class Contaminating(nn.Module):
    """A wrapper that hides where sequences begin, so that they attend to each other."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, packed_layout=None, position_ids=None, **kwargs):
        return self.model(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)


def test_a_model_that_packs_is_accepted_and_left_as_it_was(model):
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        check_packing(model)
        assert model.training is training
        assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None or parameter.requires_grad for parameter in model.parameters())


def test_a_model_whose_sequences_see_each_other_is_refused_with_the_difference(model):
    model.train()
    wrapped = Contaminating(model)
    with pytest.raises(ConfigError, match=r"Contaminating mixes packed sequences: logprobs differ by [\d.e-]+ nats"):
        check_packing(wrapped)
    assert wrapped.training
    model.eval()


def test_a_model_that_computes_nan_is_refused(model):
    broken = tiny_model(tiny_tokenizer(), num_layers=1, hidden_size=32, num_kv_heads=1)
    use_packed_attention(broken)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="differ by nan"):
        check_packing(broken)


class Recording(nn.Module):
    """A wrapper that notes what it was asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.asked = model, model.config, []

    def forward(self, **kwargs):
        self.asked.append(kwargs)
        return self.model(**kwargs)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_is_never_asked_for_a_cache_nor_given_a_mask(model, padded):
    recording = Recording(model)
    if padded:  # flash kernels and transformers' own packing look for sequences only without either
        use_padded_rows(recording)
    token_logprobs(recording, packed_row(random_sequences()))
    (asked,) = recording.asked
    assert asked["use_cache"] is False
    assert "attention_mask" not in asked
    assert ("packed_layout" in asked) is not padded


# -- bad input


@pytest.mark.parametrize(("token", "said"), [(426, "token id 426"), (-1, "token id -1")])
def test_a_token_outside_the_models_vocabulary_is_refused_before_the_forward(model, token, said):
    batch = replace(tiny_batch(), input_ids=torch.tensor([[token, 1]]))
    assert model.get_input_embeddings().num_embeddings == 426
    with pytest.raises(AlignmentError, match=rf"{said}, but the model embeds ids 0 to 425.*tokenizer"):
        token_logprobs(model, batch)


def test_a_sequence_whose_first_token_trains_is_refused(model):
    batch = replace(packed_row(random_sequences()), loss_mask=torch.ones(1, sum(LENGTHS), dtype=torch.bool))
    with pytest.raises(AlignmentError, match="the first token of a sequence trains"):
        token_logprobs(model, batch)
