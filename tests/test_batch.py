"""Windows: weights that make one weighted sum the wanted mean, and packing that loses and invents nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.batch import TrajectoryBatch, loss_weights, pack_window
from lightning_gym.errors import AlignmentError, ConfigError
from lightning_gym.testing import tiny_batch, tiny_trajectory

OF_ROLLOUTS = ["token_mean", "rollout_mean", "rollout_sum", "prompt_mean", "constant"]
AGGREGATIONS = [*OF_ROLLOUTS, "sequence_mean", "sequence_sum"]


def window(lengths, *, num_micro_batches=1, ceiling=10_000, aggregation="token_mean", **changes):
    """One rollout of two trained tokens for every length."""
    segments = [tiny_trajectory(num_prompt=n - 2, num_trained=2, rollout_id=str(i)) for i, n in enumerate(lengths)]
    return pack_window(
        segments,
        [float(i + 1) for i in range(len(segments))],
        loss_weights(segments, aggregation=aggregation),
        num_micro_batches=num_micro_batches,
        max_tokens_per_micro_batch=ceiling,
        **changes,
    )


def weighted_sum(segments, values, aggregation):
    """What a loss of `values` (one for all the tokens of a segment) adds up to."""
    weights = loss_weights(segments, aggregation=aggregation, constant_length=10)
    return sum(
        weight * value * segment.num_trained for weight, value, segment in zip(weights, values, segments, strict=True)
    )


# -- weights


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # rollout a: segments of 3 and 1 trained tokens, losses 1 and 5; rollout b: 2 tokens of loss 3
        ("token_mean", (3 * 1 + 5 + 2 * 3) / 6),
        ("rollout_mean", ((3 * 1 + 5) / 4 + 3) / 2),
        ("rollout_sum", (3 * 1 + 5 + 2 * 3) / 2),
        ("constant", (3 * 1 + 5 + 2 * 3) / (2 * 10)),
        ("prompt_mean", (3 * 1 + 5 + 2 * 3) / 6),
        ("sequence_mean", (1 + 5 + 3) / 3),
        ("sequence_sum", (3 * 1 + 5 + 2 * 3) / 3),
    ],
)
def test_a_weighted_sum_is_the_wanted_mean_and_segments_of_a_rollout_are_one_vote(aggregation, expected):
    segments = [
        tiny_trajectory(num_trained=3, rollout_id="a"),
        tiny_trajectory(num_trained=1, rollout_id="a"),
        tiny_trajectory(num_trained=2, rollout_id="b"),
    ]
    assert weighted_sum(segments, [1, 5, 3], aggregation) == pytest.approx(expected)


def test_with_the_mean_of_prompts_a_long_winded_group_counts_as_much_as_a_short_one():
    long = [replace(tiny_trajectory(num_trained=n, rollout_id=f"long{n}"), group_id=0) for n in (30, 10)]
    short = [replace(tiny_trajectory(num_trained=n, rollout_id=f"short{n}"), group_id=1) for n in (1, 3)]
    found = weighted_sum([*long, *short], [2, 6, 4, 8], "prompt_mean")
    assert found == pytest.approx(((30 * 2 + 10 * 6) / 40 + (1 * 4 + 3 * 8) / 4) / 2)


counts = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=8)


@settings(deadline=None)
@given(counts, st.sampled_from(AGGREGATIONS))
def test_doubling_every_rollout_changes_no_mean(rollouts, aggregation):
    def segments(copies):
        return [
            tiny_trajectory(num_trained=count, rollout_id=f"{copy}-{index}")
            for copy in range(copies)
            for index, parts in enumerate(rollouts)
            for count in parts
        ]

    once, twice = segments(1), segments(2)
    values = [float(i % 7) - 2 for i in range(len(once))]
    assert weighted_sum(twice, values * 2, aggregation) == pytest.approx(weighted_sum(once, values, aggregation))


@settings(deadline=None)
@given(counts)
def test_a_rollout_cut_into_segments_counts_as_much_as_one_in_one_piece(rollouts):
    cut = [tiny_trajectory(num_trained=n, rollout_id=str(i)) for i, parts in enumerate(rollouts) for n in parts]
    whole = [tiny_trajectory(num_trained=sum(parts), rollout_id=str(i)) for i, parts in enumerate(rollouts)]
    for aggregation in OF_ROLLOUTS:
        values = [float(segment.rollout_id) for segment in cut]
        assert weighted_sum(cut, values, aggregation) == pytest.approx(
            weighted_sum(whole, [float(i) for i in range(len(rollouts))], aggregation)
        )


def test_weights_of_a_mean_sum_to_one():
    segments = [tiny_trajectory(num_trained=n, rollout_id=str(n)) for n in (1, 2, 5)]
    for aggregation in ("token_mean", "rollout_mean", "prompt_mean", "sequence_mean"):
        assert weighted_sum(segments, [1, 1, 1], aggregation) == pytest.approx(1)


def test_a_constant_needs_its_length():
    with pytest.raises(ConfigError, match="constant_length"):
        loss_weights([tiny_trajectory()], aggregation="constant")


# -- packing


def test_the_example_of_two_sequences_is_packed_as_the_docstring_says():
    segments = [
        tiny_trajectory(num_prompt=2, num_trained=2, rollout_id="a"),
        tiny_trajectory(num_prompt=2, num_trained=1, rollout_id="b", weight_version=3),
    ]
    (batch,) = pack_window(
        segments,
        [0.5, -0.5],
        loss_weights(segments, aggregation="token_mean"),
        num_micro_batches=1,
        max_tokens_per_micro_batch=7,
        temperature=0.7,
    )
    third = pytest.approx(1 / 3)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.loss_mask.tolist() == [[False, False, True, True, False, False, True]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, -1, -1, 0, 0, -1]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.5, 0, 0, -0.5]]
    assert batch.loss_weight.tolist() == [[0, 0, third, third, 0, 0, third]]
    assert batch.weight_versions.tolist() == [[-1, -1, 0, 0, -1, -1, 3]]
    assert (batch.sequence_lengths, len(batch), batch.num_tokens, batch.temperature) == ((4, 3), 2, 7, 0.7)
    assert {t.dtype for t in (batch.rollout_logprobs, batch.advantages, batch.loss_weight)} == {torch.float32}


@settings(deadline=None)
@given(st.lists(st.integers(3, 60), min_size=1, max_size=20), st.integers(1, 8))
def test_a_window_has_exactly_the_micro_batches_asked_for_and_every_trajectory_once(lengths, num_micro_batches):
    batches = window(lengths, num_micro_batches=num_micro_batches, weight_scale=num_micro_batches)
    assert len(batches) == num_micro_batches
    real = [batch for batch in batches if batch.loss_weight.any()]
    assert sorted(n for batch in real for n in batch.sequence_lengths) == sorted(lengths)
    advantages = sorted(value for batch in real for value in batch.advantages[batch.loss_mask].tolist())
    assert advantages == sorted([float(i + 1) for i in range(len(lengths))] * 2)
    assert sum(batch.loss_weight.double().sum().item() for batch in batches) == pytest.approx(num_micro_batches)
    loads = [batch.num_tokens for batch in real]
    if len(real) == num_micro_batches:
        assert max(loads) - min(loads) <= max(lengths)


def test_long_trajectories_are_spread_first():
    batches = window([50, 10, 40, 20, 30, 30], num_micro_batches=3)
    assert [batch.num_tokens for batch in batches] == [60, 60, 60]


def test_a_micro_batch_without_trajectories_is_one_token_of_weight_zero():
    real, filler = window([5], num_micro_batches=2)
    assert real.sequence_lengths == (5,)
    assert filler.loss_mask.tolist() == [[False, True]]
    assert not filler.loss_weight.any()
    assert not filler.advantages.any()
    assert filler.weight_versions.tolist() == [[-1, -1]]
    assert filler.input_ids.shape == filler.rollout_logprobs.shape == (1, 2)


@settings(deadline=None)
@given(st.lists(st.integers(3, 60), min_size=2, max_size=20), st.integers(60, 100))
def test_a_window_over_the_ceiling_names_the_number_of_micro_batches_that_fits(lengths, ceiling):
    if sum(lengths) <= ceiling:
        assert len(window(lengths, ceiling=ceiling)) == 1
        return
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=\d+") as caught:
        window(lengths, ceiling=ceiling)
    named = int(str(caught.value).partition("accumulate_grad_batches=")[2].split()[0])
    assert all(batch.num_tokens <= ceiling for batch in window(lengths, num_micro_batches=named, ceiling=ceiling))
    with pytest.raises(ConfigError):
        window(lengths, num_micro_batches=named - 1, ceiling=ceiling)


def test_a_trajectory_over_the_ceiling_cannot_be_helped_by_more_micro_batches():
    with pytest.raises(ConfigError, match=r"61 tokens.*max_tokens_per_micro_batch=60.*max_model_len"):
        window([61, 10], ceiling=60, num_micro_batches=2)


def test_a_rank_without_trajectories_gets_fillers_only():
    batches = pack_window([], [], [], num_micro_batches=3, max_tokens_per_micro_batch=9, temperature=0.7)
    assert [(batch.num_tokens, batch.loss_weight.any().item(), batch.temperature) for batch in batches] == [
        (2, False, 0.7)
    ] * 3


def test_a_rank_without_trajectories_needs_no_totals_to_have_no_weights():
    assert [loss_weights([], aggregation=aggregation, constant_length=1) for aggregation in AGGREGATIONS] == [[]] * 7


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_step_in_which_no_token_trains_is_refused(aggregation):
    with pytest.raises(AlignmentError, match="none of the 2 trajectories of this step has a token that trains"):
        loss_weights([tiny_trajectory(num_trained=0)] * 2, aggregation=aggregation, constant_length=1)


def test_a_rollout_masked_out_wholly_weighs_nothing_and_still_counts():
    segments = [tiny_trajectory(num_trained=0, rollout_id="a"), tiny_trajectory(num_trained=2, rollout_id="b")]
    assert weighted_sum(segments, [7, 3], "rollout_mean") == pytest.approx(3 / 2)


def test_float64_is_kept_where_it_is_asked_for():
    segments = [tiny_trajectory()]
    (batch,) = pack_window(
        segments, [0.1], [0.3], num_micro_batches=1, max_tokens_per_micro_batch=9, dtype=torch.float64
    )
    assert (batch.advantages[0, -1].item(), batch.loss_weight[0, -1].item()) == (0.1, 0.3)
    assert batch.rollout_logprobs.dtype == torch.float64


def test_one_value_a_trajectory_is_asked_for():
    with pytest.raises(ValueError, match="zip"):
        pack_window([tiny_trajectory()], [0.1, 0.2], [1.0], num_micro_batches=1, max_tokens_per_micro_batch=9)


# -- TrajectoryBatch


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = tiny_batch(old_logprob=-2.0)
    moved = batch.to("meta")
    names = ["input_ids", "position_ids", "loss_mask", "rollout_logprobs", "advantages", "loss_weight"]
    for name in [*names, "weight_versions", "old_logprobs"]:
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(batch, name).device.type == "cpu", name
    assert moved.ref_logprobs is None
    assert moved.sequence_lengths == (2,)


@pytest.mark.parametrize(
    "name", ["position_ids", "loss_mask", "rollout_logprobs", "advantages", "weight_versions", "old_logprobs"]
)
def test_a_tensor_of_another_shape_is_refused_by_name(name):
    batch = tiny_batch()
    fields = {field: getattr(batch, field) for field in TrajectoryBatch.__dataclass_fields__}
    with pytest.raises(AlignmentError, match=rf"{name} has shape \(1, 3\), input_ids \(1, 2\)"):
        TrajectoryBatch(**fields | {name: torch.zeros(1, 3)})


def test_lengths_that_do_not_add_up_are_refused():
    batch = tiny_batch()
    fields = {field: getattr(batch, field) for field in TrajectoryBatch.__dataclass_fields__}
    with pytest.raises(AlignmentError, match="add up to 3, but there are 2 tokens"):
        TrajectoryBatch(**fields | {"sequence_lengths": (1, 2)})


def test_a_float64_advantage_is_rounded_once():
    segments = [tiny_trajectory()]
    (batch,) = pack_window(segments, [0.1], [1.0], num_micro_batches=1, max_tokens_per_micro_batch=9)
    assert batch.advantages[0, -1].item() == np.float32(0.1)


def test_continuations_of_another_number_of_sequences_are_refused():
    batch = tiny_batch()
    fields = {field: getattr(batch, field) for field in TrajectoryBatch.__dataclass_fields__}
    with pytest.raises(AlignmentError, match="continues speaks about 2 sequences, there are 1"):
        TrajectoryBatch(**fields | {"continues": (-1, 0)})
