"""Packing: nothing is lost, nothing moves off its token, and no gradient depends on how a step is split."""

import copy
from typing import get_args
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_gym.batch import Aggregation, StepTotals, loss_weights, pack_window
from lightning_gym.errors import ConfigError
from lightning_gym.logprobs import token_logprobs, use_padded_rows
from lightning_gym.losses import grpo, reinforce
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.packing import rows_of_pieces
from lightning_gym.testing import tiny_model, tiny_tokenizer
from lightning_gym.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

AGGREGATIONS = get_args(Aggregation)
ROOMY = 10_000


@st.composite
def windows(draw, *, max_groups=4, max_length=24):
    """Trajectories of several groups: prompts shared or not, several turns, several segments a rollout."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    window = []
    for group in range(draw(st.integers(1, max_groups))):
        prompt = random.integers(400, size=random.integers(1, max_length // 2))
        for member in range(draw(st.integers(1, 4))):
            for segment in range(draw(st.integers(1, 2))):
                shared = prompt if segment == 0 and random.random() < 0.8 else random.integers(400, size=3)
                window.append(_trajectory(random, shared, group, member, segment, max_length))
    return window


def _trajectory(random, prompt, group, member, segment, max_length):
    length = len(prompt) + random.integers(1, max_length // 2)
    mask = (np.arange(length) >= len(prompt)) & (random.random(length) < 0.7)
    mask[len(prompt)] = True
    return Trajectory(
        rollout_id=f"{group}-{member}",
        segment=segment,
        group_id=group,
        token_ids=np.concatenate([prompt, random.integers(400, size=length - len(prompt))]),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -random.exponential(size=length) - 3, 0).astype(np.float32),
        weight_versions=np.where(mask, random.integers(5, size=length), -1),
    )


def advantage_of(trajectory):
    return 0.1 + crc32(trajectory.rollout_id.encode()) % 1000 / 500 - 1


def pack(window, *, aggregation="token_mean", num_micro_batches=1, ceiling=ROOMY, totals=None, ranks=1, **options):
    return pack_window(
        window,
        [advantage_of(trajectory) for trajectory in window],
        loss_weights(window, aggregation=aggregation, constant_length=16, totals=totals),
        num_micro_batches=num_micro_batches,
        max_tokens_per_micro_batch=ceiling,
        weight_scale=num_micro_batches * ranks,
        **options,
    )


# -- conservation


@settings(deadline=None)
@given(windows(), st.randoms(), st.integers(1, 6), st.booleans(), st.sampled_from(AGGREGATIONS))
def test_every_trained_token_is_there_once_with_its_own_values(window, random, num_micro_batches, share, aggregation):
    weights = loss_weights(window, aggregation=aggregation, constant_length=16)
    expected = sorted(
        (
            int(trajectory.token_ids[t]),
            t,
            float(trajectory.rollout_logprobs[t]),
            float(np.float32(advantage_of(trajectory))),
            pytest.approx(weight * num_micro_batches),
            int(trajectory.weight_versions[t]),
            trajectory.token_ids[:t].tolist(),
        )
        for trajectory, weight in zip(window, weights, strict=True)
        for t in np.flatnonzero(trajectory.loss_mask)
    )
    random.shuffle(window)
    batches = pack(window, aggregation=aggregation, num_micro_batches=num_micro_batches, share_prefix=share)
    assert len(batches) == num_micro_batches
    found = sorted(entry for batch in batches for entry in _trained(batch))
    assert [entry[:4] for entry in found] == [entry[:4] for entry in expected]
    assert found == expected


def _trained(batch):
    """(id, position, logprob, advantage, weight, version, all the ids before) of every trained token of the engine."""
    histories = {}
    start = 0
    for index, length in enumerate(batch.sequence_lengths):
        parent = batch.continues[index] if batch.continues else -1
        before = histories.get(parent, [])
        ids = batch.input_ids[0, start : start + length].tolist()
        histories[index] = [*before, *ids]
        for t in range(start, start + length):
            assert batch.position_ids[0, t].item() == len(before) + t - start
            values = (batch.rollout_logprobs, batch.advantages, batch.loss_weight)
            if not batch.loss_mask[0, t]:
                assert not any(tensor[0, t] for tensor in values)
                assert batch.weight_versions[0, t] == -1
            elif batch.weight_versions[0, t] >= 0:
                yield (
                    batch.input_ids[0, t].item(),
                    batch.position_ids[0, t].item(),
                    *(tensor[0, t].item() for tensor in values),
                    batch.weight_versions[0, t].item(),
                    histories[index][: len(before) + t - start],
                )
        start += length


@settings(deadline=None)
@given(windows(), st.integers(1, 5), st.integers(24, 80), st.booleans())
def test_no_micro_batch_is_over_the_ceiling_and_the_number_named_is_enough(window, num_micro_batches, ceiling, share):
    try:
        batches = pack(window, num_micro_batches=num_micro_batches, ceiling=ceiling, share_prefix=share)
    except ConfigError as error:
        named = int(str(error).partition("accumulate_grad_batches=")[2].split()[0])
        assert named > num_micro_batches
        batches = pack(window, num_micro_batches=named, ceiling=ceiling, share_prefix=share)
    assert max(batch.num_tokens for batch in batches) <= ceiling


@settings(deadline=None)
@given(st.lists(st.integers(2, 400), min_size=1, max_size=40), st.integers(1, 8), st.sampled_from([16.0, 200.0, 1e9]))
def test_costs_are_within_a_third_of_the_best_that_could_be(lengths, num_rows, parity):
    window = [_of_length(length, index) for index, length in enumerate(lengths)]
    rows = rows_of_pieces(window, num_rows=num_rows, ceiling=sum(lengths), parity=parity)
    costs = [sum(piece.stop + piece.stop**2 / parity for piece in row) for row in rows]
    each = [length + length**2 / parity for length in lengths]
    best = max(sum(each) / num_rows, *each)
    if len(each) > num_rows:  # the two that meet in one row, of the num_rows + 1 dearest
        best = max(best, sum(sorted(each, reverse=True)[num_rows - 1 : num_rows + 1]))
    assert max(costs) <= best * 4 / 3 + 1e-9  # Graham 1969: longest processing time first
    assert costs == sorted(costs, reverse=True)


def _of_length(length, index):
    return Trajectory(
        rollout_id=str(index),
        segment=0,
        group_id=index,
        token_ids=np.arange(length),
        loss_mask=np.arange(length) > 0,
        rollout_logprobs=np.zeros(length, np.float32),
        weight_versions=np.zeros(length, np.int64),
    )


def test_a_long_sequence_weighs_more_than_its_tokens_where_attention_matters():
    window = [_of_length(length, index) for index, length in enumerate([100, 50, 50])]
    by_tokens = rows_of_pieces(window, num_rows=2, ceiling=200, parity=1e9)
    by_cost = rows_of_pieces([*window, _of_length(40, 3)], num_rows=2, ceiling=200, parity=50.0)
    assert [sum(piece.stop for piece in row) for row in by_tokens] == [100, 100]
    assert [sum(piece.stop for piece in row) for row in by_cost] == [100, 140]


def test_a_window_that_only_fits_unbalanced_still_fits():
    window = [_of_length(length, index) for index, length in enumerate([6, 5, 4, 3, 2])]
    rows = rows_of_pieces(window, num_rows=2, ceiling=10, parity=0.1)
    assert sorted(sum(piece.stop for piece in row) for row in rows) == [10, 10]


# -- gradients


def _tiny_qwen3():
    return tiny_model(tiny_tokenizer(), num_layers=2, hidden_size=32, num_kv_heads=1, head_dim=16)


def _tiny_gpt2():
    """Qwen3 in transformers rounds to float32 inside its norms, whatever the model's dtype; GPT-2 computes in it."""
    config = GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def models(one_thread):
    models = {torch.float32: _tiny_qwen3(), torch.float64: _tiny_gpt2()}
    for model in models.values():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)  # so that tokens care about each other
        use_packed_attention(model)
    return models


def gradient(model, batches_of_ranks, loss):
    """What the optimizer sees: the mean over ranks of gradients that each were divided by the accumulation."""
    model.zero_grad()
    for batches in batches_of_ranks:
        for batch in batches:
            value, _ = loss(token_logprobs(model, batch), batch)
            (value / len(batches) / len(batches_of_ranks)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


LIMITS = {torch.float32: 1e-5, torch.float64: 1e-7}


@pytest.mark.parametrize("dtype", LIMITS)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_gradient_depends_on_how_a_step_is_split(models, dtype, data):
    window = data.draw(windows(max_groups=3, max_length=16))
    aggregation = data.draw(st.sampled_from(AGGREGATIONS))
    loss = data.draw(st.sampled_from([grpo, reinforce]))
    expected = gradient(models[dtype], [pack(window, aggregation=aggregation, dtype=dtype)], loss)
    ranks, num_micro_batches = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5]))
    shuffled = data.draw(st.permutations(window))
    # Ranks play whole groups. Only a mean over prompts needs them whole; the others are held to whole rollouts.
    owners = [
        crc32(str(t.group_id if aggregation == "prompt_mean" else t.rollout_id).encode()) % ranks for t in shuffled
    ]
    of_ranks = [[t for t, owner in zip(shuffled, owners, strict=True) if owner == rank] for rank in range(ranks)]
    batches_of_ranks = [
        pack(
            part,
            aggregation=aggregation,
            num_micro_batches=num_micro_batches,
            totals=StepTotals.of(window),
            ranks=ranks,
            dtype=dtype,
            share_prefix=data.draw(st.booleans()),
        )
        for part in of_ranks
    ]
    assert {len(batches) for batches in batches_of_ranks} == {num_micro_batches}
    assert relative(gradient(models[dtype], batches_of_ranks, loss), expected) <= LIMITS[dtype]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(window=windows(max_groups=2, max_length=20))
def test_a_shared_prompt_gives_the_logprobs_and_the_gradient_of_its_copies(models, window):
    model = models[torch.float64]
    apart, together = (pack(window, dtype=torch.float64, share_prefix=share) for share in (False, True))
    assert together[0].num_tokens <= apart[0].num_tokens
    assert relative(gradient(model, [together], grpo), gradient(model, [apart], grpo)) <= 1e-7
    assert _scored(model, together) == pytest.approx(_scored(model, apart), abs=1e-10)
    padded = copy.deepcopy(model)
    use_padded_rows(padded)
    assert relative(gradient(padded, [together], grpo), gradient(model, [apart], grpo)) <= 1e-7


def _scored(model, batches):
    """Logprobs of every trained token, in the order of the ids that lead to it."""
    scored = []
    with torch.no_grad():
        for batch in batches:
            logprobs = token_logprobs(model, batch)[batch.loss_mask].tolist()
            histories = [(entry[-1], entry[0]) for entry in _trained(batch)]
            scored += zip(histories, logprobs, strict=True)
    return [value for _, value in sorted(scored)]


def test_a_prompt_is_shared_by_its_group_only_and_stored_once():
    random = np.random.default_rng(0)
    prompt = random.integers(400, size=10)
    window = [_trajectory(random, prompt, group, member, 0, 20) for group in range(2) for member in range(3)]
    (apart,), (together,) = (pack(window, share_prefix=share) for share in (False, True))
    assert apart.num_tokens - together.num_tokens == 2 * 2 * 10
    assert together.continues == (-1, 0, 0, 0, -1, 4, 4, 4)
    assert apart.continues == ()
    assert len(pack(window, num_micro_batches=4, share_prefix=True)) == 4  # balance goes before sharing
