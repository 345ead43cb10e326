"""However a step is split - order, micro-batches, accumulation, ranks - its gradient is the same, for every loss.

The policy is a table of bigram logits: the gradient of everything by it is exact and cheap, so that all combinations
can be tried.
"""

import json
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.batch import Aggregation, StepTotals, loss_weights, pack_window
from lightning_gym.corrections import CORRECTIONS, token_tis
from lightning_gym.losses import LOSSES, grpo
from lightning_gym.penalties import entropy_bonus, kl_in_reward, kl_penalty
from lightning_gym.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 7
AGGREGATIONS = get_args(Aggregation)
COUNTED = [field.name for field in fields(StepTotals)]
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-7}


# -- the policy, and the same for the old, the sampling and the reference one


def table(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)


def scores(logits, batch):
    """Logprobs and entropies of the trained tokens, each given the token before it."""
    ids = batch.input_ids[0]
    of_each = logits[ids.roll(1)].log_softmax(-1)
    chosen = of_each.gather(-1, ids[:, None])[:, 0]
    entropies = -(of_each.exp() * of_each).sum(-1)
    return (torch.where(batch.loss_mask, values[None], 0) for values in (chosen, entropies))


def with_policies(batch):
    dtype = batch.loss_weight.dtype
    near = table(0, dtype)
    old, rollout, ref = (
        next(scores(near + size * table(seed, dtype), batch)) for seed, size in ((1, 0.3), (2, 0.3), (3, 0.6))
    )
    return replace(batch, old_logprobs=old, rollout_logprobs=rollout, ref_logprobs=ref)


# -- the objectives


def corrected(correction, logprobs, entropies, batch):
    return grpo(logprobs, correction(logprobs, batch)[0])[0]


def penalised(logprobs, entropies, batch):
    rewarded, _ = kl_in_reward(logprobs, batch, coefficient=0.3)
    weighed, _ = token_tis(logprobs, rewarded)
    kl, _ = kl_penalty(logprobs, batch, coefficient=0.2)
    return grpo(logprobs, weighed)[0] + kl + entropy_bonus(entropies, batch, coefficient=0.1)[0]


def plain(loss, logprobs, entropies, batch):
    return loss(logprobs, batch)[0]


OBJECTIVES = {
    **{name: partial(plain, loss) for name, loss in LOSSES.items()},
    # bands in which something is left of random policies that are this far apart
    "gspo": partial(plain, partial(LOSSES["gspo"], clip_low=0.1, clip_high=0.1)),
    "gspo_token": partial(plain, partial(LOSSES["gspo_token"], clip_low=0.1, clip_high=0.1)),
    "dual_clip": partial(plain, partial(grpo, dual_clip=1.3)),
    **{f"grpo+{name}": partial(corrected, correction) for name, correction in CORRECTIONS.items()},
    "grpo+geometric_mask": partial(corrected, partial(CORRECTIONS["geometric_mask"], low=0.8, high=1.25)),
    "penalised": penalised,
}


# -- windows, whole and split


def window(rng, num_rollouts):
    """Ragged rollouts of one to three segments; now and then a segment without a trained token."""
    segments, advantages = [], {}
    for rollout in range(num_rollouts):
        advantages[f"r{rollout}"] = float(rng.normal())
        for segment in range(int(rng.integers(1, 4))):
            length = int(rng.integers(2, 12))
            mask = rng.random(length) < 0.6
            mask[0] = False
            mask[-1] |= segment == 0
            segments.append(
                Trajectory(
                    rollout_id=f"r{rollout}",
                    segment=segment,
                    group_id=rollout // 2,
                    token_ids=rng.integers(0, VOCABULARY, length),
                    loss_mask=mask,
                    rollout_logprobs=np.zeros(length, dtype=np.float32),
                    weight_versions=np.where(mask, 0, -1),
                )
            )
    return segments, advantages


def gradient(objective, of_ranks, advantages, *, aggregation, num_micro_batches, dtype, ceiling=10_000):
    """What DDP and accumulation leave: the mean over ranks of the sum over micro-batches of their mean loss."""
    leaf = table(0, dtype).requires_grad_()
    parts = [StepTotals.of(segments) for segments in of_ranks]
    totals = StepTotals(**{name: sum(getattr(part, name) for part in parts) for name in COUNTED})
    for segments in of_ranks:
        weights = loss_weights(
            segments,
            aggregation=aggregation,
            constant_length=20 if aggregation == "constant" else None,
            totals=totals,
        )
        batches = pack_window(
            segments,
            [advantages[segment.rollout_id] for segment in segments],
            weights,
            num_micro_batches=num_micro_batches,
            max_tokens_per_micro_batch=ceiling,
            weight_scale=num_micro_batches * len(of_ranks),
            dtype=dtype,
        )
        for batch in batches:
            logprobs, entropies = scores(leaf, batch)
            loss = objective(logprobs, entropies, with_policies(batch))
            (loss / num_micro_batches / len(of_ranks)).backward()
    return leaf.grad


def by_rank(segments, num_ranks, rng):
    """Whole groups to ranks at random; a rank may get none."""
    owner = {group: int(rng.integers(num_ranks)) for group in {segment.group_id for segment in segments}}
    return [[segment for segment in segments if owner[segment.group_id] == rank] for rank in range(num_ranks)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
@settings(deadline=None, max_examples=5)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rollouts=st.integers(1, 8),
    num_ranks=st.integers(1, 3),
    num_micro_batches=st.sampled_from([1, 2, 3, 5, 12]),
)
def test_the_gradient_does_not_depend_on_the_split(name, aggregation, seed, num_rollouts, num_ranks, num_micro_batches):
    rng = np.random.default_rng(seed)
    segments, advantages = window(rng, num_rollouts)
    shuffled = [segments[index] for index in rng.permutation(len(segments))]
    of_ranks = by_rank(shuffled, num_ranks, rng)
    for dtype, limit in LIMIT.items():
        whole = gradient(
            OBJECTIVES[name], [segments], advantages, aggregation=aggregation, num_micro_batches=1, dtype=dtype
        )
        split = gradient(
            OBJECTIVES[name],
            of_ranks,
            advantages,
            aggregation=aggregation,
            num_micro_batches=num_micro_batches,
            dtype=dtype,
        )
        assert (split - whole).norm() <= limit * whole.norm() + torch.finfo(dtype).eps


@pytest.mark.parametrize("aggregation", ["token_mean", "rollout_mean"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_rollout_played_twice_leaves_a_mean_as_it_is(name, aggregation):
    segments, advantages = window(np.random.default_rng(5), 4)
    again = [replace(segment, rollout_id=f"{segment.rollout_id}'") for segment in segments]
    twice = advantages | {f"{rollout}'": value for rollout, value in advantages.items()}
    how = {"aggregation": aggregation, "num_micro_batches": 3, "dtype": torch.float64}
    once = gradient(OBJECTIVES[name], [segments], advantages, **how)
    both = gradient(OBJECTIVES[name], [segments + again], twice, **how)
    assert (both - once).norm() <= 1e-12 * once.norm()


def test_control_a_mean_taken_in_each_micro_batch_depends_on_the_split():
    def mean_of_micro_batch(logprobs, entropies, batch):
        return (-batch.advantages * logprobs)[batch.loss_mask].mean()

    segments, advantages = window(np.random.default_rng(6), 6)
    how = {"aggregation": "token_mean", "dtype": torch.float64}
    whole = gradient(mean_of_micro_batch, [segments], advantages, num_micro_batches=1, **how)
    split = gradient(mean_of_micro_batch, [segments], advantages, num_micro_batches=3, **how)
    assert (split - whole).norm() > 1e-2 * whole.norm()


def test_the_ceiling_of_a_micro_batch_changes_nothing_but_the_number_that_is_needed():
    segments, advantages = window(np.random.default_rng(7), 8)
    how = {"aggregation": "rollout_mean", "dtype": torch.float64}
    whole = gradient(OBJECTIVES["penalised"], [segments], advantages, num_micro_batches=1, **how)
    for ceiling in (20, 40, 80):
        needed = -(-sum(map(len, segments)) // ceiling) + 4
        found = gradient(
            OBJECTIVES["penalised"], [segments], advantages, num_micro_batches=needed, ceiling=ceiling, **how
        )
        assert (found - whole).norm() <= 1e-7 * whole.norm()


# -- the same under DDP, on gloo

RANKS = """
import gc, importlib.util, json, sys

import numpy as np
import torch
import torch.distributed as dist

spec = importlib.util.spec_from_file_location("properties", sys.argv[1])
properties = importlib.util.module_from_spec(spec)
spec.loader.exec_module(properties)
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()


class Policy(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.logits = torch.nn.Parameter(properties.table(0, dtype))

    def forward(self, batch):
        return tuple(properties.scores(self.logits, batch))


rng = np.random.default_rng(11)
segments, advantages = properties.window(rng, 6)
of_ranks = properties.by_rank(segments, size, rng)
if size > 2:
    of_ranks = [of_ranks[0] + of_ranks[2], of_ranks[1], []]  # a rank without a rollout
own = properties.StepTotals.of(of_ranks[rank])
sums = torch.tensor([getattr(own, name) for name in properties.COUNTED])
dist.all_reduce(sums)
totals = properties.StepTotals(**dict(zip(properties.COUNTED, sums.tolist(), strict=True)))


def error(objective, aggregation, dtype):
    constant = 20 if aggregation == "constant" else None
    weights = properties.loss_weights(of_ranks[rank], aggregation=aggregation, constant_length=constant, totals=totals)
    batches = properties.pack_window(
        of_ranks[rank], [advantages[s.rollout_id] for s in of_ranks[rank]], weights, num_micro_batches=2,
        max_tokens_per_micro_batch=10_000, weight_scale=2 * size, dtype=dtype,
    )
    policy = torch.nn.parallel.DistributedDataParallel(Policy(dtype))
    with policy.no_sync():
        (objective(*policy(batches[0]), properties.with_policies(batches[0])) / 2).backward()
    (objective(*policy(batches[1]), properties.with_policies(batches[1])) / 2).backward()
    whole = properties.gradient(
        objective, [segments], advantages, aggregation=aggregation, num_micro_batches=1, dtype=dtype
    )
    return ((policy.module.logits.grad - whole).norm() / whole.norm()).item()


errors = {
    f"{name} {aggregation} {dtype}": error(objective, aggregation, dtype)
    for dtype in properties.LIMIT
    for name, objective in properties.OBJECTIVES.items()
    for aggregation in properties.AGGREGATIONS
}
if rank == 0:
    print(json.dumps(errors))
gc.collect()  # a DistributedDataParallel that is alive keeps gloo's threads running, and they may abort the exit
dist.destroy_process_group()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_gradient_under_ddp_is_that_of_one_process(tmp_path, num_ranks):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*launcher, script, __file__],
        check=False,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 2 * len(OBJECTIVES) * len(AGGREGATIONS)
    for name, error in errors.items():
        assert error <= LIMIT[torch.float64 if "float64" in name else torch.float32], name
