"""Corrections and penalties against enumeration: what they are expected to do is what they do in expectation."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_gym.corrections import (
    CORRECTIONS,
    check_composition,
    correction_named,
    geometric_mask,
    in_ratio,
    none,
    sequence_mask,
    sequence_tis,
    token_mask,
    token_tis,
    with_correction_scale,
)
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.losses import LOSSES, distillation, grpo, reinforce
from lightning_gym.penalties import entropy_bonus, kl_in_reward, kl_penalty
from lightning_gym.ranks import Ranks
from lightning_gym.testing import packed_batch, tiny_batch

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHING = [token_tis, token_mask, sequence_tis, sequence_mask, geometric_mask]
NAMES = ["ratio_mean", "ratio_sq_mean", "weight_mean", "weight_sq_mean", "out_of_band_frac"]


def apart(*log_ratios, weights=None):
    """A batch of one sequence and logprobs that lie so far above the engine's."""
    count = len(log_ratios)
    batch = packed_batch(
        mask=[[False, *[True] * count]],
        rollout_logprobs=[[0.0, *[-5.0] * count]],
        weights=[[0.0, *(weights or [1.0] * count)]],
        advantages=[[0.0, *[1.0] * count]],
        dtype=torch.float64,
    )
    return torch.tensor([[0.0, *(-5.0 + ratio for ratio in log_ratios)]], dtype=torch.float64), batch


# -- corrections


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
def test_where_engine_and_trainer_agree_a_correction_changes_nothing_and_reports_that(correction):
    logprobs, batch = apart(0.0, 0.0, 0.0)
    corrected, metrics = correction(logprobs, batch)
    assert torch.equal(corrected.loss_weight, batch.loss_weight)
    assert {name: value.item() for name, value in metrics.items()} == dict(zip(NAMES, [1, 1, 1, 1, 0], strict=True))


LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("correction", "weights", "outside"),
    [
        (partial(none, low=0.4, high=2.1), [1, 1, 1], 1 / 3),
        (token_tis, [2, 2, 0.5], 1 / 3),
        (partial(token_mask, low=0.4), [0, 2, 0.5], 1 / 3),
        (sequence_tis, [2, 2, 2], 1.0),
        (partial(sequence_tis, cap=9), [8, 8, 8], 0.0),
        (sequence_mask, [0, 0, 0], 1.0),
        (partial(sequence_mask, high=9), [8, 8, 8], 0.0),
        (partial(sequence_mask, low=9, high=99), [0, 0, 0], 1.0),
        (geometric_mask, [0, 0, 0], 1.0),
        (partial(geometric_mask, high=2.01), [8, 2, 0.5], 0.0),
        (partial(geometric_mask, high=2.01, weigh_tokens=False), [1, 1, 1], 0.0),
        (partial(geometric_mask, low=2.1, high=3), [0, 0, 0], 1.0),
    ],
)
def test_the_weights_of_ratios_8_2_and_one_half(correction, weights, outside):
    logprobs, batch = apart(3 * LOG2, LOG2, -LOG2)
    corrected, metrics = correction(logprobs, batch)
    assert corrected.loss_weight[0, 1:].tolist() == pytest.approx(weights, rel=1e-9)
    assert corrected.loss_weight[0, 0] == 0
    assert metrics["out_of_band_frac"].item() == pytest.approx(outside)
    assert metrics["ratio_mean"].item() == pytest.approx(10.5 / 3)
    assert metrics["ratio_sq_mean"].item() == pytest.approx((64 + 4 + 0.25) / 3)
    assert metrics["weight_mean"].item() == pytest.approx(sum(weights) / 3)
    assert metrics["weight_sq_mean"].item() == pytest.approx(sum(weight**2 for weight in weights) / 3)


def test_sequences_are_judged_one_by_one():
    batch = packed_batch(
        mask=[[False, True], [False, True, True]],
        rollout_logprobs=[[0, -5.0], [0, -5.0, -5.0]],
        weights=[[0, 1], [0, 1, 1]],
    )
    logprobs = torch.tensor([[0.0, -5 + 2 * LOG2, 0.0, -5 + LOG2, -5.0]])
    assert sequence_mask(logprobs, batch)[0].loss_weight[0].tolist() == pytest.approx([0, 0, 0, 2, 2])


def test_with_old_logprobs_the_ratio_is_theirs_to_the_engine_and_not_the_current_ones():
    logprobs, batch = apart(3 * LOG2)
    batch = replace(batch, old_logprobs=batch.rollout_logprobs + torch.tensor([[0.0, LOG2]]))
    assert token_tis(logprobs, batch, cap=9)[0].loss_weight[0, 1].item() == pytest.approx(2)


def test_a_correction_has_no_gradient_of_its_own():
    logprobs, batch = apart(LOG2, -LOG2)
    logprobs.requires_grad_()
    corrected, _ = token_tis(logprobs, batch, cap=9)
    assert not corrected.loss_weight.requires_grad
    grpo(logprobs, corrected)[0].backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0, -2, -0.5])


def test_one_broken_token_cannot_overflow_the_others():
    logprobs, batch = apart(500.0, 0.0)
    for correction in WEIGHING:
        corrected, metrics = correction(logprobs, batch)
        assert torch.isfinite(corrected.loss_weight).all()
        assert all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("first", [*WEIGHING, in_ratio])
@pytest.mark.parametrize("second", [*WEIGHING, in_ratio])
def test_a_second_correction_is_refused(first, second):
    logprobs, batch = apart(LOG2)
    corrected, _ = first(logprobs, batch)
    with pytest.raises(ConfigError, match="corrected already"):
        second(logprobs, corrected)


def test_a_penalty_refuses_a_corrected_batch():
    logprobs, batch = apart(LOG2)
    corrected, _ = token_tis(logprobs, replace(batch, ref_logprobs=batch.rollout_logprobs))
    for penalty in (kl_penalty, entropy_bonus):
        with pytest.raises(ConfigError, match="as it came"):
            penalty(logprobs, corrected, coefficient=0.1)


def test_in_ratio_hands_the_mismatch_to_the_clip():
    logprobs, batch = apart(LOG2, -LOG2)
    logprobs.requires_grad_()
    corrected, _ = in_ratio(logprobs, batch)
    loss, metrics = grpo(logprobs, corrected)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 - 0.5)
    assert logprobs.grad[0].tolist() == pytest.approx([0, 0, -0.5])
    assert metrics["clip_high_frac"].item() == 0.5


@pytest.mark.parametrize("loss", [LOSSES["reinforce"], LOSSES["rloo"], partial(reinforce)])
def test_in_ratio_is_refused_where_there_is_no_ratio(loss):
    with pytest.raises(ConfigError, match="has none"):
        check_composition(loss, in_ratio)
    check_composition(loss, token_tis)
    check_composition(grpo, in_ratio)


def test_a_correction_is_found_by_name_and_an_unknown_name_lists_those_there_are():
    assert correction_named("icepop") is token_mask
    with pytest.raises(ConfigError) as caught:
        correction_named("tis")
    assert all(name in str(caught.value) for name in CORRECTIONS)


def test_a_fillers_token_is_counted_in_no_metric():
    filler = replace(tiny_batch(), weight_versions=torch.full((1, 2), -1))
    for correction in CORRECTIONS.values():
        _, metrics = correction(torch.tensor([[0.0, -9.0]]), filler)
        assert all(value == 0 for value in metrics.values())


# -- the same in expectation: the sampler is another policy, and the gradient is that of ours


def policies(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    logits, sampler, rewards = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(3))
    return logits.requires_grad_(), (logits.detach() + 0.5 * sampler).log_softmax(0), rewards


def test_uncapped_token_weights_make_the_expectation_under_the_sampler_that_of_the_policy():
    logits, sampler, rewards = policies(1)
    (logits.softmax(0) * rewards).sum().backward()
    expected, logits.grad = logits.grad, None
    for action in range(4):
        logprobs = torch.stack([torch.zeros(()), logits.log_softmax(0)[action]])[None]
        batch = packed_batch(
            mask=[[False, True]],
            advantages=[[0, rewards[action]]],
            weights=[[0, sampler[action].exp()]],
            rollout_logprobs=[[0, sampler[action]]],
            dtype=torch.float64,
        )
        reinforce(logprobs, token_tis(logprobs, batch, cap=1e9)[0])[0].backward()
    torch.testing.assert_close(-logits.grad, expected, rtol=1e-12, atol=1e-14)


def two_step_gradient(correction):
    """Expected gradient of all sequences of two tokens, sampled by another policy; and the true one."""
    first, first_sampler, _ = policies(2, 3)
    second, second_sampler, _ = policies(3, 3)
    rewards = torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (first.softmax(0)[:, None] * second.softmax(0)[None] * rewards).sum().backward()
    expected = torch.cat([first.grad, second.grad])
    first.grad = second.grad = None
    for a in range(3):
        for b in range(3):
            logprobs = torch.stack([torch.zeros(()), first.log_softmax(0)[a], second.log_softmax(0)[b]])[None]
            chance = (first_sampler[a] + second_sampler[b]).exp()
            batch = packed_batch(
                mask=[[False, True, True]],
                advantages=[[0, rewards[a, b], rewards[a, b]]],
                weights=[[0, chance, chance]],
                rollout_logprobs=[[0, first_sampler[a], second_sampler[b]]],
                dtype=torch.float64,
            )
            reinforce(logprobs, correction(logprobs, batch)[0])[0].backward()
    return -torch.cat([first.grad, second.grad]), expected


def test_uncapped_sequence_weights_are_exact_for_sequences_and_token_weights_are_not():
    found, expected = two_step_gradient(partial(sequence_tis, cap=1e9))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    found, expected = two_step_gradient(partial(token_tis, cap=1e9))
    assert (found - expected).norm() > 1e-2 * expected.norm()
    found, expected = two_step_gradient(none)
    assert (found - expected).norm() > 1e-2 * expected.norm()


# -- normalised over the window


def test_a_normalised_correction_leaves_the_weight_of_the_window_as_it_was():
    window = []
    for log_ratios in ((LOG2, -LOG2, 0.3), (1.5,), (-0.7, 0.1)):
        logprobs, batch = apart(*log_ratios, weights=[0.1 * (i + 1) for i in range(len(log_ratios))])
        window.append(replace(batch, old_logprobs=logprobs))
    before = sum(batch.loss_weight.sum().item() for batch in window)
    for correction in (token_tis, token_mask, sequence_tis):
        scaled = with_correction_scale(window, correction, Ranks())
        after = [correction(batch.old_logprobs, batch)[0] for batch in scaled]
        assert sum(batch.loss_weight.sum().item() for batch in after) == pytest.approx(before)
        plain = [correction(batch.old_logprobs, batch)[0] for batch in window]
        ratios = [(a.loss_weight / p.loss_weight).nan_to_num(1)[0, 1:] for a, p in zip(after, plain, strict=True)]
        kept = torch.cat(ratios)[torch.cat([p.loss_weight[0, 1:] for p in plain]) > 0]
        assert kept.std() < 1e-12
        assert not torch.allclose(kept, torch.ones_like(kept))


def test_the_mean_of_a_normalised_correction_is_that_of_all_ranks():
    class TwoRanks(Ranks):
        def sums(self, values):
            return [value + other for value, other in zip(values, (1.0, 3.0), strict=True)]

    logprobs, batch = apart(LOG2)
    (scaled,) = with_correction_scale([replace(batch, old_logprobs=logprobs)], token_tis, TwoRanks())
    assert scaled.correction_scale == pytest.approx((1 + 1) / (2 + 3))


def test_a_normalised_correction_needs_the_old_logprobs_of_the_window():
    _, batch = apart(LOG2)
    with pytest.raises(AlignmentError, match="with_old_logprobs"):
        with_correction_scale([batch], token_tis, Ranks())


def test_a_window_in_which_nothing_is_left_has_no_mean_and_weighs_nothing():
    logprobs, batch = apart(5.0)
    (scaled,) = with_correction_scale([replace(batch, old_logprobs=logprobs)], sequence_mask, Ranks())
    assert sequence_mask(logprobs, scaled)[0].loss_weight.sum() == 0


# -- the KL table: which in-loss form has which expected gradient


def kl_gradients():
    logits, ref, _ = policies(5)
    ref = ref.detach()
    own = logits.log_softmax(0)
    (forward,) = torch.autograd.grad((own.exp() * (own - ref)).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad((ref.exp() * (ref - own)).sum(), logits)
    return logits, ref, forward, backward


def expected_gradient(logits, sampler, term_of):
    """Sum over all actions of the sampler's chance times the gradient of the term."""
    total = torch.zeros_like(logits)
    for action in range(len(logits)):
        logprob = logits.log_softmax(0)[action]
        (found,) = torch.autograd.grad(term_of(action, logprob), logits)
        total += sampler[action].exp() * found
    return total


def test_the_kl_table():
    logits, ref, forward, backward = kl_gradients()
    own = logits.detach().log_softmax(0)
    forms = {
        "k1": lambda x: x,
        "k2": lambda x: x**2 / 2,
        "k3": lambda x: torch.exp(-x) - 1 + x,
    }
    plain = {
        name: expected_gradient(logits, own, lambda action, logprob, form=form: form(logprob - ref[action]))
        for name, form in forms.items()
    }
    torch.testing.assert_close(plain["k1"], torch.zeros_like(logits), rtol=0, atol=1e-14)
    torch.testing.assert_close(plain["k2"], forward, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(plain["k3"], backward, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(forward, backward, rtol=1e-2)
    for name in ("k1", "k3"):
        scored = expected_gradient(
            logits,
            own,
            lambda action, logprob, form=forms[name]: (logprob - logprob.detach()).exp() * form(logprob - ref[action]),
        )
        torch.testing.assert_close(scored, forward, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("term", ["penalty", "reward", "distillation"])
def test_every_kl_of_ours_has_the_gradient_of_kl_from_the_policy_to_the_reference(term, off_policy):
    logits, ref, forward, _ = kl_gradients()
    sampler = policies(6)[1] if off_policy else logits.detach().log_softmax(0)
    unclipped = partial(LOSSES["clipped"], clip_low=1.0, clip_high=1e9)

    def of_action(action, logprob):
        batch = packed_batch(
            mask=[[False, True]],
            weights=[[0, 1]],
            old_logprobs=[[0, sampler[action]]] if off_policy else None,
            ref_logprobs=[[0, ref[action]]],
            dtype=torch.float64,
        )
        logprobs = torch.stack([torch.zeros((), dtype=torch.float64), logprob])[None]
        if term == "penalty":
            return kl_penalty(logprobs, batch, coefficient=1.0)[0]
        if term == "distillation":
            return distillation(logprobs, batch, clip=1e9)[0]
        return unclipped(logprobs, kl_in_reward(logprobs, batch, coefficient=1.0)[0])[0]

    found = expected_gradient(logits, sampler, of_action)
    if off_policy and term != "penalty":
        # The advantage is log p_old - log p_ref, frozen before the update: the KL of the policy that sampled.
        own = logits.log_softmax(0)
        (forward,) = torch.autograd.grad((own.exp() * (sampler - ref)).sum(), logits)
    torch.testing.assert_close(found, forward, rtol=1e-12, atol=1e-14)


def test_the_logged_kl_is_that_of_the_policy_in_expectation():
    logits, ref, _, _ = kl_gradients()
    own = logits.detach().log_softmax(0)
    for sampler in (own, policies(6)[1]):
        total = 0.0
        for action in range(4):
            batch = packed_batch(
                mask=[[False, True]],
                old_logprobs=[[0, sampler[action]]],
                ref_logprobs=[[0, ref[action]]],
                dtype=torch.float64,
            )
            found = kl_penalty(torch.tensor([[0.0, own[action]]], dtype=torch.float64), batch, coefficient=1.0)[1]
            assert found["ref_kl"] >= 0
            total += sampler[action].exp().item() * found["ref_kl"].item()
        assert total == pytest.approx((own.exp() * (own - ref)).sum().item(), rel=1e-9)


def test_kl_in_the_reward_counts_what_a_token_does_to_those_after_it_and_the_penalty_does_not():
    # Two tokens, the second's distribution given by the first: the gradient of the KL of whole sequences.
    generator = torch.Generator().manual_seed(8)
    first = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_first, ref_second = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1) for shape in ((3,), (3, 3))
    )
    a, b = first.log_softmax(0), second.log_softmax(1)
    joint = a[:, None] + b
    kl = (joint.exp() * (joint - ref_first[:, None] - ref_second)).sum()
    expected = torch.autograd.grad(kl, (first, second))
    found = {"reward": [torch.zeros_like(first), torch.zeros_like(second)]}
    found["penalty"] = [torch.zeros_like(first), torch.zeros_like(second)]
    for i in range(3):
        for j in range(3):
            logprobs = torch.stack([torch.zeros(()), first.log_softmax(0)[i], second.log_softmax(1)[i, j]])[None]
            batch = packed_batch(
                mask=[[False, True, True]],
                weights=[[0, 1, 1]],
                ref_logprobs=[[0, ref_first[i], ref_second[i, j]]],
                dtype=torch.float64,
            )
            rewarded, _ = kl_in_reward(logprobs, batch, coefficient=1.0)
            terms = {
                "reward": reinforce(logprobs, rewarded)[0],
                "penalty": kl_penalty(logprobs, batch, coefficient=1.0)[0],
            }
            chance = logprobs[0, 1:].sum().exp().detach()
            for name, term in terms.items():
                parts = torch.autograd.grad(term, (first, second), retain_graph=True)
                found[name] = [total + chance * part for total, part in zip(found[name], parts, strict=True)]
    for total, true in zip(found["reward"], expected, strict=True):
        torch.testing.assert_close(total, true, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["penalty"][1], expected[1], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found["penalty"][0], expected[0], rtol=1e-2)


def test_kl_in_the_reward_stays_inside_its_sequence():
    batch = packed_batch(
        mask=[[False, True, False, True], [False, True]], ref_logprobs=[[0, -1, 0, -1], [0, -1]], dtype=torch.float64
    )
    logprobs = torch.tensor([[0.0, 0.5, 9.0, 0.25, 0.0, 7.0]], dtype=torch.float64) - 1
    rewarded, _ = kl_in_reward(logprobs, batch, coefficient=2.0)
    assert rewarded.advantages[0].tolist() == pytest.approx([0, -1.5, 0, -0.5, 0, -14.0])


@pytest.mark.parametrize(
    "function", [partial(kl_penalty, coefficient=1), partial(kl_in_reward, coefficient=1), distillation]
)
def test_a_kl_without_a_reference_says_who_makes_one(function):
    with pytest.raises(AlignmentError, match="with_ref_logprobs"):
        function(torch.zeros(1, 2), tiny_batch())


def test_the_entropy_bonus_pushes_towards_the_uniform_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    entropy = -(logprobs.exp() * logprobs).sum()
    entropies = torch.stack([torch.zeros(()), entropy])[None]
    term, metrics = entropy_bonus(entropies, tiny_batch(weight=0.5), coefficient=0.1)
    (found,) = torch.autograd.grad(term, logits, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy, logits)
    torch.testing.assert_close(found, -0.05 * of_entropy)
    assert metrics["entropy"].item() == pytest.approx(entropy.item())
