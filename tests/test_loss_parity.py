"""Our losses on the tensors on which TRL's and NeMo RL's own code was run (tests/data/record_loss_parity.py)."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gym.advantages import component_advantages, group_advantages
from lightning_gym.batch import loss_weights
from lightning_gym.corrections import geometric_mask, none, sequence_mask, sequence_tis, token_mask, token_tis
from lightning_gym.losses import cispo, clipped, dapo, dr_grpo, grpo, gspo, reinforce, rloo, sapo
from lightning_gym.mismatch import entropy_estimate, mismatch_metrics
from lightning_gym.penalties import kl_penalty
from lightning_gym.testing import packed_batch, tiny_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
RECORDED = json.loads((Path(__file__).parent / "data" / "loss_parity.json").read_text())
INPUTS = RECORDED["inputs"]
LENGTHS = [sum(row) for row in INPUTS["mask"]]
CLOSE = {"rel": 1e-6, "abs": 1e-9}


def packed(name):
    """A padded ``[sequence, token]`` input, sequence by sequence, each with a prompt of one token in front."""
    return [[0.0, *row[:length]] for row, length in zip(INPUTS[name], LENGTHS, strict=True)]


def batch_of(aggregation, **changes):
    trajectories = [tiny_trajectory(num_trained=n, rollout_id=str(i)) for i, n in enumerate(LENGTHS)]
    constant = RECORDED["max_length"] if aggregation == "constant" else None
    weights = loss_weights(trajectories, aggregation=aggregation, constant_length=constant)
    fields = {
        "mask": [[False, *[True] * n] for n in LENGTHS],
        "weights": [[0.0, *[w] * n] for w, n in zip(weights, LENGTHS, strict=True)],
        "advantages": [[0.0, *[a] * n] for a, n in zip(INPUTS["advantages"], LENGTHS, strict=True)],
        "rollout_logprobs": packed("rollout_logprobs"),
        "old_logprobs": packed("old_logprobs"),
        "ref_logprobs": packed("ref_logprobs"),
        "dtype": torch.float64,
    }
    return packed_batch(**(fields | changes))


def logprobs():
    values = [value for row in packed("logprobs") for value in row]
    return torch.tensor([values], dtype=torch.float64, requires_grad=True)


def agrees(recorded, loss, leaf, *, value=True):
    loss.backward()
    if value:
        assert loss.item() == pytest.approx(recorded["loss"], **CLOSE)
    expected = [[0.0, *row[:n]] for row, n in zip(recorded["gradient"], LENGTHS, strict=True)]
    np.testing.assert_allclose(leaf.grad[0], np.concatenate(expected), rtol=1e-6, atol=1e-9)


TRL = {
    "grpo": (grpo, "rollout_mean"),
    "grpo_dual_clip": (partial(grpo, dual_clip=1.25), "rollout_mean"),
    "bnpo_token_mean": (grpo, "token_mean"),
    "dr_grpo": (dr_grpo, "constant"),
    "dapo": (dapo, "token_mean"),
    "gspo": (partial(gspo, clip_low=0.03, clip_high=0.04), "rollout_mean"),
    "cispo": (partial(cispo, clip_high=0.3), "token_mean"),  # TRL's epsilon_high=1.3 is the bound itself
    "sapo": (sapo, "rollout_mean"),
}


@pytest.mark.parametrize("name", TRL)
def test_the_loss_and_its_gradient_are_trls(name):
    loss, aggregation = TRL[name]
    leaf = logprobs()
    agrees(RECORDED["trl"][name], loss(leaf, batch_of(aggregation))[0], leaf)


def test_the_gradient_of_rloo_is_trls_on_policy():
    # TRL clips the ratio of whole sequences; at ratio 1 its value is -A, its gradient that of REINFORCE.
    leaf = logprobs()
    loss, _ = rloo(leaf, batch_of("rollout_sum"))
    agrees(RECORDED["trl"]["rloo_on_policy"], loss, leaf, value=False)


TRL_CORRECTIONS = {
    "token_truncate": partial(token_tis, cap=1.5),
    "token_mask": partial(token_mask, low=0.0, high=1.5),
    "sequence_truncate": partial(sequence_tis, cap=1.5),
    "sequence_mask": partial(sequence_mask, high=3.0),
}


@pytest.mark.parametrize("name", TRL_CORRECTIONS)
def test_a_corrected_loss_is_trls(name):
    leaf = logprobs()
    batch, _ = TRL_CORRECTIONS[name](leaf, batch_of("token_mean"))
    agrees(RECORDED["trl"][name], grpo(leaf, batch)[0], leaf)


def test_trls_default_kl_has_the_logged_value_of_ours_and_another_gradient():
    # Its k3 has the gradient of KL(ref || policy); ours that of KL(policy || ref). docs/losses.md says so.
    leaf = logprobs()
    batch = batch_of("rollout_mean", old_logprobs=None)
    theirs = RECORDED["trl"]["grpo_with_kl"]["loss"] - RECORDED["trl"]["grpo"]["loss"]
    log_ratio = torch.where(batch.loss_mask, leaf - batch.ref_logprobs, 0)
    k3 = torch.exp(-log_ratio) - 1 + log_ratio
    assert (batch.loss_weight * k3).sum().item() * 0.5 == pytest.approx(theirs, **CLOSE)
    token_mean = batch_of("token_mean", old_logprobs=None)
    assert kl_penalty(leaf, token_mean, coefficient=0.5)[1]["ref_kl"].item() == pytest.approx(
        (token_mean.loss_weight * k3).sum().item(), **CLOSE
    )


NEMO = {
    "grpo": (grpo, "token_mean"),
    "dapo": (dapo, "token_mean"),
    "dual_clip": (partial(clipped, dual_clip=1.25), "token_mean"),
    "seq_mean": (grpo, "rollout_mean"),
    "gspo": (partial(gspo, clip_low=0.03, clip_high=0.04), "rollout_mean"),
    "cispo": (partial(cispo, clip_high=0.3), "token_mean"),
    "reinforce": (reinforce, "token_mean"),
}


@pytest.mark.parametrize("name", NEMO)
def test_the_loss_and_its_gradient_are_nemo_rls(name):
    loss, aggregation = NEMO[name]
    leaf = logprobs()
    agrees(RECORDED["nemo_rl"][name], loss(leaf, batch_of(aggregation))[0], leaf)


NEMO_CORRECTIONS = {
    "tis": partial(token_tis, cap=1.5),
    "icepop": partial(token_mask, low=0.6, high=1.5),
    "seq_mask_tis": partial(geometric_mask, low=0.9, high=1.2),
}


@pytest.mark.parametrize("name", NEMO_CORRECTIONS)
def test_a_corrected_loss_is_nemo_rls(name):
    leaf = logprobs()
    batch, metrics = NEMO_CORRECTIONS[name](leaf, batch_of("token_mean"))
    agrees(RECORDED["nemo_rl"][name], grpo(leaf, batch)[0], leaf)
    if name != "seq_mask_tis":  # of sequences there, of tokens here
        assert metrics["out_of_band_frac"].item() == pytest.approx(RECORDED["nemo_rl"][name]["is_oob_ratio"], **CLOSE)


def test_the_gradient_of_our_kl_is_that_of_nemo_rls_k1_without_its_noise():
    # NeMo RL's w k has the gradient k + dk with w = exp(x - sg x): for k1 that is k1 + 1, for ours (k2) k1. The
    # difference is the score function alone, whose expectation is 0.
    ours = logprobs()
    batch = batch_of("token_mean", old_logprobs=None)
    kl_penalty(ours, batch, coefficient=0.5)[0].backward()
    gradient = np.array(RECORDED["nemo_rl"]["kl_k1"]["gradient"]) - RECORDED["nemo_rl"]["grpo"]["gradient"]
    theirs = np.concatenate([[0.0, *row[:n]] for row, n in zip(gradient, LENGTHS, strict=True)])
    score = 0.5 * batch.loss_weight[0].numpy()
    np.testing.assert_allclose(theirs - score, ours.grad[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("kind", "name"), [("k2", "kl_k2"), ("k3", "kl_k3")])
def test_the_value_of_a_kl_estimate_is_nemo_rls(kind, name):
    leaf = logprobs()
    batch = batch_of("token_mean", old_logprobs=None)
    term, metrics = kl_penalty(leaf, batch, coefficient=1.0)
    found = term.item() if kind == "k2" else metrics["ref_kl"].item()
    assert found == pytest.approx(RECORDED["nemo_rl"][name]["kl_penalty"], **CLOSE)


def test_the_measures_of_the_mismatch_are_nemo_rls():
    # NeMo RL measures the logprobs before the update.
    before = torch.tensor([[value for row in packed("old_logprobs") for value in row]], dtype=torch.float64)
    recorded = RECORDED["nemo_rl"]["grpo"]
    found = mismatch_metrics(before, batch_of("token_mean"))
    assert found["token_mult_prob_error"].item() == pytest.approx(recorded["token_mult_prob_error"], **CLOSE)
    assert found["generator_kl"].item() == pytest.approx(recorded["gen_kl_error"], **CLOSE)
    assert entropy_estimate(logprobs(), batch_of("token_mean")).item() == pytest.approx(
        recorded["approx_entropy"], **CLOSE
    )
    _, metrics = none(before, batch_of("token_mean"))
    assert metrics["weight_mean"].item() == 1.0


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("none", {}),
        ("group_std", {"scale": "group_std"}),
        ("leave_one_out", {"baseline": "leave_one_out"}),
    ],
)
def test_advantages_are_nemo_rls(name, how):
    groups = [index // RECORDED["group_size"] for index in range(len(LENGTHS))]
    found = group_advantages(INPUTS["rewards"], groups, **how)
    np.testing.assert_allclose(found, RECORDED["nemo_rl_advantages"][name], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "weights"), [("components", None), ("weighted_components", {"format": 0.5, "right": 2.0})]
)
def test_component_advantages_are_nemo_rls(name, weights):
    groups = [index // RECORDED["group_size"] for index in range(len(LENGTHS))]
    names = sorted(INPUTS["components"])
    rollouts = [{name: INPUTS["components"][name][index] for name in names} for index in range(len(LENGTHS))]
    found = component_advantages(rollouts, groups, weights=weights)
    # They add 1e-6 to each component's deviation, of which the smallest is 0.5; we add nothing.
    np.testing.assert_allclose(found, RECORDED["nemo_rl_advantages"][name], atol=1e-6 / 0.5)
