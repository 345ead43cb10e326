"""Losses against arithmetic that can be done by hand: enumeration, closed forms, and identities between them."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from lightning_gym.batch import TrajectoryBatch, loss_weights, pack_window
from lightning_gym.comparison import WindowSettings
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import (
    LOSSES,
    METHODS,
    cispo,
    clipped,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    loss_named,
    reinforce,
    rloo,
    sapo,
)
from lightning_gym.mismatch import mismatch_metrics
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.testing import packed_batch, tiny_batch, tiny_model, tiny_tokenizer
from lightning_gym.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
LN2 = math.log(2)
REWARDED = sorted(LOSSES.keys() - {"distillation"})


def one_token(logprob):
    """Logprobs for `tiny_batch`, whose second token trains; and the leaf to differentiate by."""
    leaf = torch.tensor(float(logprob), requires_grad=True)
    return torch.stack([torch.zeros(()), leaf])[None], leaf


def row(*, advantages, weights, mask=None, old=None, rollout=None, versions=None, dtype=torch.float32):
    """A batch of one packed sequence whose first position never trains."""
    count = len(advantages)
    trained = [False, *(mask or [True] * (count - 1))] if mask is None or len(mask) == count - 1 else mask

    def tensor(values, kind=dtype):
        return torch.tensor([values], dtype=kind)

    return TrajectoryBatch(
        input_ids=torch.arange(count)[None],
        position_ids=torch.arange(count)[None],
        loss_mask=torch.tensor([trained]),
        rollout_logprobs=tensor(rollout or [0.0] * count),
        advantages=tensor(advantages),
        loss_weight=tensor(weights),
        weight_versions=torch.tensor([versions or [0] * count]),
        sequence_lengths=(count,),
        old_logprobs=None if old is None else tensor(old),
    )


# -- values and gradients by hand


def test_reinforce_is_minus_advantage_times_logprob_times_weight():
    batch = row(advantages=[0, 0.5, -2.0, 3.0], weights=[0, 0.25, 0.5, 0.0])
    logprobs = torch.tensor([[0.0, -1.0, -0.5, -7.0]], requires_grad=True)
    loss, metrics = reinforce(logprobs, batch)
    assert loss.item() == pytest.approx(0.25 * 0.5 * 1.0 + 0.5 * -2.0 * 0.5)
    loss.backward()
    assert logprobs.grad.tolist() == [[0.0, -0.125, 1.0, 0.0]]
    assert metrics == {}


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clip_frac"),
    [
        # of a good token: more of it counts up to 1.2, less of it counts in full
        (2.0, 1.0, -2.0, -2.0, 0.0),
        (2.0, 1.1, -2.2, -2.2, 0.0),
        (2.0, 1.5, -2.4, 0.0, 1.0),
        (2.0, 0.5, -1.0, -1.0, 0.0),
        # of a bad token: less of it counts down to 0.8, more of it counts in full
        (-2.0, 1.0, 2.0, 2.0, 0.0),
        (-2.0, 0.9, 1.8, 1.8, 0.0),
        (-2.0, 0.5, 1.6, 0.0, 1.0),
        (-2.0, 1.5, 3.0, 3.0, 0.0),
        # of a token that was as good as the rest
        (0.0, 1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clip_removes_the_gradient_exactly_where_the_token_has_moved_far_enough(
    advantage, ratio, loss, gradient, clip_frac
):
    batch = tiny_batch(advantage=advantage, old_logprob=-1.0)
    logprobs, leaf = one_token(-1.0 + math.log(ratio))
    value, metrics = grpo(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert leaf.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert metrics["clip_frac"].item() == clip_frac


def test_the_two_bounds_are_independent():
    for ratio, expected in ((1.25, -1.25), (1.35, -1.3), (0.75, -0.75)):
        logprobs, _ = one_token(-1.0 + math.log(ratio))
        loss, _ = clipped(logprobs, tiny_batch(advantage=1.0, old_logprob=-1.0), clip_low=0.1, clip_high=0.3)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    for ratio, expected in ((0.85, 0.9), (0.95, 0.95), (1.5, 1.5)):
        logprobs, _ = one_token(-1.0 + math.log(ratio))
        loss, _ = clipped(logprobs, tiny_batch(advantage=-1.0, old_logprob=-1.0), clip_low=0.1, clip_high=0.3)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_clip_frac_counts_trained_tokens_only():
    old = [0.0, -1.0, -1.0, -1.0]
    logprobs = torch.tensor([[0.0, -0.5, -1.0, -0.5]])  # ratios 1.65, 1, 1.65
    both = row(advantages=[0, 1, 1, 1], weights=[0, 1, 1, 1], old=old)
    assert grpo(logprobs, both)[1]["clip_frac"].item() == pytest.approx(2 / 3)
    one = row(advantages=[0, 1, 1, 0], weights=[0, 1, 1, 0], mask=[True, True, False], old=old)
    assert grpo(logprobs, one)[1]["clip_frac"].item() == pytest.approx(1 / 2)


def test_without_a_trained_token_clip_frac_is_zero_and_the_loss_is_zero():
    batch = row(advantages=[0, 0], weights=[0, 0], mask=[False])
    loss, metrics = grpo(torch.zeros(1, 2), batch)
    assert (loss.item(), metrics["clip_frac"].item()) == (0.0, 0.0)


@pytest.mark.parametrize("old", [None, "equal"])
def test_at_ratio_one_the_gradient_of_every_loss_is_that_of_reinforce(old):
    generator = torch.Generator().manual_seed(0)
    values = [0.0, *(-torch.rand(7, generator=generator) * 3).tolist()]
    advantages = [0.0, *torch.randn(7, generator=generator).tolist()]
    weights = [0.0, *torch.rand(7, generator=generator).tolist()]
    batch = row(advantages=advantages, weights=weights, old=values if old else None)
    gradients = []
    for loss in (reinforce, grpo, clipped, rloo, dr_grpo, dapo, cispo, sapo, LOSSES["gspo_token"]):
        logprobs = torch.tensor([values], requires_grad=True)
        loss(logprobs, batch)[0].backward()
        gradients.append(logprobs.grad)
    assert torch.equal(gradients[1], gradients[2])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=1e-7)
    expected = -torch.tensor([weights]) * torch.tensor([advantages])
    torch.testing.assert_close(gradients[0], expected)


# -- the policy-gradient theorem, by enumeration


@pytest.mark.parametrize("loss", [LOSSES[name] for name in REWARDED], ids=REWARDED)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_expected_gradient_over_all_actions_is_the_gradient_of_the_expected_reward(loss, baseline):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    (logits.softmax(0) * rewards).sum().backward()
    expected = logits.grad.clone()
    logits.grad = None
    chances = logits.detach().softmax(0)
    for action in range(5):
        logprobs = torch.stack([torch.zeros((), dtype=torch.float64), logits.log_softmax(0)[action]])[None]
        advantage = (rewards[action] - baseline).item()
        batch = row(advantages=[0, advantage], weights=[0, chances[action].item()], dtype=torch.float64)
        loss(logprobs, batch)[0].backward()  # the chance of sampling the action is its weight: a sum over all is E
    torch.testing.assert_close(-logits.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "loss", [partial(clipped, clip_low=1.0, clip_high=1e9), partial(cispo, clip_high=1e9)], ids=["clipped", "cispo"]
)
def test_the_ratio_makes_the_expectation_under_the_old_policy_that_of_the_new_one(loss):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    old = torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(0)
    rewards = torch.randn(4, generator=generator, dtype=torch.float64)
    (logits.softmax(0) * rewards).sum().backward()
    expected = logits.grad.clone()
    logits.grad = None
    for action in range(4):
        logprobs = torch.stack([torch.zeros((), dtype=torch.float64), logits.log_softmax(0)[action]])[None]
        batch = row(
            advantages=[0, rewards[action].item()],
            weights=[0, old[action].exp().item()],
            old=[0, old[action].item()],
            dtype=torch.float64,
        )
        loss(logprobs, batch)[0].backward()
    torch.testing.assert_close(-logits.grad, expected, rtol=1e-12, atol=1e-14)


# -- dual clip, GSPO, CISPO, SAPO


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "fraction"),
    [(-2.0, 2.0, 4.0, 4.0, 0.0), (-2.0, 9.0, 6.0, 0.0, 1.0), (2.0, 9.0, -2.4, 0.0, 0.0)],
)
def test_dual_clip_bounds_the_loss_of_a_bad_token_and_leaves_good_ones_alone(
    advantage, ratio, loss, gradient, fraction
):
    logprobs, leaf = one_token(-3.0 + math.log(ratio))
    value, metrics = grpo(logprobs, tiny_batch(advantage=advantage, old_logprob=-3.0), dual_clip=3.0)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-5)
    assert leaf.grad.item() == pytest.approx(gradient, abs=1e-5)
    assert metrics["dual_clip_frac"].item() == fraction


def test_a_dual_clip_below_one_is_refused():
    with pytest.raises(ConfigError, match="dual_clip is 0"):
        grpo(torch.zeros(1, 2), tiny_batch(), dual_clip=0.5)


def two_sequences(**changes):
    """Log-ratios 0.3 and -0.1 in the first sequence, 0.5 in the second."""
    fields = {
        "mask": [[False, True, True], [False, True]],
        "advantages": [[0, 2, 2], [0, -1]],
        "weights": [[0, 0.25, 0.25], [0, 0.5]],
        "old_logprobs": [[0, -1.0, -1.0], [0, -2.0]],
        "dtype": torch.float64,
    }
    logprobs = torch.tensor([[0.0, -0.7, -1.1, 0.0, -1.5]], dtype=torch.float64, requires_grad=True)
    return packed_batch(**(fields | changes)), logprobs


def test_gspo_takes_one_ratio_a_sequence_and_sequences_do_not_share_theirs():
    batch, logprobs = two_sequences()
    loss, metrics = gspo(logprobs, batch, clip_low=9, clip_high=9)
    loss.backward()
    first, second = math.exp(0.1), math.exp(0.5)
    assert loss.item() == pytest.approx(0.5 * -2 * first + 0.5 * second)
    assert logprobs.grad[0].tolist() == pytest.approx([0, -0.5 * first, -0.5 * first, 0, 0.5 * second])
    assert metrics["clip_frac"].item() == 0


def test_gspo_clips_whole_sequences():
    batch, logprobs = two_sequences()
    loss, metrics = gspo(logprobs, batch, clip_low=0.05, clip_high=0.05)
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0, 0, 0, 0, 0.5 * math.exp(0.5)])
    assert metrics["clip_frac"].item() == pytest.approx(2 / 3)
    assert metrics["clip_high_frac"].item() == pytest.approx(2 / 3)


def test_gspo_of_tokens_is_gspo_of_sequences_where_a_sequence_has_one_advantage_and_only_there():
    for advantages, equal in (([[0, 2, 2], [0, -1]], True), ([[0, 2, 1], [0, -1]], False)):
        gradients = []
        for level in ("sequence", "token"):
            batch, logprobs = two_sequences(advantages=advantages)
            loss, _ = gspo(logprobs, batch, clip_low=0.5, clip_high=0.5, level=level)
            loss.backward()
            gradients.append((loss.item(), logprobs.grad))
        assert gradients[0][0] == pytest.approx(gradients[1][0])
        assert torch.allclose(gradients[0][1], gradients[1][1]) == equal


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    batch, logprobs = two_sequences()
    loss, metrics = cispo(logprobs, batch, clip_high=0.2)
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0, -0.5 * 1.2, -0.5 * math.exp(-0.1), 0, 0.5 * 1.2])
    assert metrics["clip_frac"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(("advantage", "temperature"), [(2.0, 1.0), (-2.0, 1.05)])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.7])
def test_the_gate_of_sapo_is_the_slope_of_its_loss(advantage, temperature, ratio):
    logprobs, leaf = one_token(-1.0 + math.log(ratio))
    loss, metrics = sapo(logprobs, tiny_batch(advantage=advantage, old_logprob=-1.0))
    loss.backward()
    sigmoid = 1 / (1 + math.exp(-temperature * (ratio - 1)))
    assert metrics["gate_mean"].item() == pytest.approx(4 * sigmoid * (1 - sigmoid), rel=1e-5)
    assert leaf.grad.item() == pytest.approx(-advantage * ratio * metrics["gate_mean"].item(), rel=1e-5)


# -- methods


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_says_about_the_batch_are_settings_of_a_window(method):
    settings = METHODS[method] | ({"constant_length": 8} if METHODS[method]["aggregation"] == "constant" else {})
    WindowSettings(prompts_per_step=1, group_size=2, **settings)
    assert method in LOSSES


# -- split invariance


@pytest.fixture(scope="module")
def model():
    # Double precision, so that what is left of a difference is the split's and not the summation order's.
    model = tiny_model(tiny_tokenizer(), num_layers=1, hidden_size=32, num_kv_heads=1).double()
    use_packed_attention(model)
    return model


def ragged_window(seed, count=7):
    """Trajectories of random lengths and masks; every third rollout has two segments."""
    rng = np.random.default_rng(seed)
    segments = []
    for index in range(count):
        length = int(rng.integers(3, 20))
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        segments.append(
            Trajectory(
                rollout_id=f"r{index - (index % 3 == 2)}",
                segment=int(index % 3 == 2),
                group_id=0,
                token_ids=rng.integers(0, 400, length),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, -rng.random(length) * 5, 0).astype(np.float32),
                weight_versions=np.where(mask, 0, -1),
            )
        )
    return segments, dict(zip([s.rollout_id for s in segments], rng.normal(size=count).tolist(), strict=True))


def window_gradient(model, segments, advantages, loss, *, aggregation, num_micro_batches):
    """The gradient that accumulation over a window leaves, each micro-batch's loss divided as Lightning divides."""
    batches = pack_window(
        segments,
        [advantages[segment.rollout_id] for segment in segments],
        loss_weights(segments, aggregation=aggregation, constant_length=50),
        num_micro_batches=num_micro_batches,
        max_tokens_per_micro_batch=10_000,
        weight_scale=num_micro_batches,
    )
    model.zero_grad()
    total = 0.0
    for batch in batches:
        value, _ = loss(token_logprobs(model, batch), batch)
        (value / num_micro_batches).backward()
        total += value.item() / num_micro_batches
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), total


@pytest.mark.parametrize("loss", [reinforce, grpo], ids=["reinforce", "grpo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "rollout_mean", "rollout_sum", "constant"])
def test_gradient_and_loss_do_not_depend_on_how_the_window_is_split(model, loss, aggregation):
    segments, advantages = ragged_window(3)
    whole, loss_of_all = window_gradient(
        model, segments, advantages, loss, aggregation=aggregation, num_micro_batches=1
    )
    assert whole.norm() > 1e-3
    rng = np.random.default_rng(0)
    for num_micro_batches in (2, 5, 9):
        shuffled = [segments[i] for i in rng.permutation(len(segments))]
        parts, loss_of_parts = window_gradient(
            model, shuffled, advantages, loss, aggregation=aggregation, num_micro_batches=num_micro_batches
        )
        assert ((parts - whole).norm() / whole.norm()).item() < 1e-6
        assert loss_of_parts == pytest.approx(loss_of_all, rel=1e-6, abs=1e-9)


def test_control_a_mean_per_micro_batch_would_depend_on_the_split(model):
    def mean_per_micro_batch(logprobs, batch):
        mask = batch.loss_mask
        return (-batch.advantages * logprobs)[mask].mean(), {}

    segments, advantages = ragged_window(3)
    whole, _ = window_gradient(
        model, segments, advantages, mean_per_micro_batch, aggregation="token_mean", num_micro_batches=1
    )
    parts, _ = window_gradient(
        model, segments, advantages, mean_per_micro_batch, aggregation="token_mean", num_micro_batches=5
    )
    assert ((parts - whole).norm() / whole.norm()).item() > 1e-2


# -- mismatch_metrics, loss_named


def test_mismatch_metrics_are_those_of_the_trained_tokens():
    batch = row(
        advantages=[0, 1, 1, 0],
        weights=[0, 1, 1, 0],
        mask=[True, True, False],
        rollout=[0.0, -1.0, -2.0, 0.0],
        versions=[-1, 4, 4, -1],
    )
    metrics = mismatch_metrics(torch.tensor([[9.0, -1.0 - LN2, -1.5, 9.0]]), batch)
    assert metrics["logprob_diff_max"].item() == pytest.approx(LN2)
    assert metrics["logprob_diff_mean"].item() == pytest.approx((LN2 + 0.5) / 2)
    assert metrics["token_mult_prob_error"].item() == pytest.approx((2 + math.exp(0.5)) / 2)
    k3 = (0.5 - 1 + LN2, math.exp(0.5) - 1 - 0.5)
    assert metrics["generator_kl"].item() == pytest.approx(sum(k3) / 2)
    assert metrics["num_trained"].item() == 2


def test_a_fillers_token_is_no_mismatch_and_an_empty_batch_agrees():
    filler = row(advantages=[0, 0], weights=[0, 0], versions=[-1, -1])
    metrics = mismatch_metrics(torch.tensor([[0.0, -6.0]]), filler)
    assert {name: value.item() for name, value in metrics.items()} == {
        "logprob_diff_max": 0.0,
        "logprob_diff_mean": 0.0,
        "token_mult_prob_error": 1.0,
        "generator_kl": 0.0,
        "num_trained": 0.0,
    }


@pytest.mark.parametrize("function", [*LOSSES.values(), mismatch_metrics])
def test_logprobs_of_another_shape_are_refused(function):
    with pytest.raises(AlignmentError, match=r"\(1, 1\).*\(1, 2\)"):
        function(torch.zeros(1, 1), tiny_batch())


def test_a_loss_is_found_by_name_and_an_unknown_name_lists_those_there_are():
    assert loss_named("grpo") is grpo
    with pytest.raises(ConfigError) as caught:
        loss_named("ppo")
    assert all(name in str(caught.value) for name in LOSSES)
