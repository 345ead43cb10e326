"""What two ranks try on a policy of which each holds a part; test_sharding.py starts them and reads what they found."""

import json
import sys
import traceback
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_gym import sharding
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.errors import ConfigError, WeightSyncError
from lightning_gym.logprobs import check_packing, token_logprobs
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.policy.engine import EngineModel
from lightning_gym.ranks import Ranks
from lightning_gym.sync import WeightSync
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer
from lightning_gym.weights import checkpoint_weights, named_weights, weights

CASES = {}
TOKENIZER = tiny_tokenizer()


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


def ranks():
    return Ranks(dist.get_rank(), dist.get_world_size())


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def small(*, tied=True, seed=0):
    """Two layers; the MLP has 99 rows, so one rank's part is smaller than the other's."""
    model = tiny_model(
        TOKENIZER, num_layers=2, hidden_size=64, intermediate_size=99, tie_word_embeddings=tied, seed=seed
    )
    use_packed_attention(model)
    return model


def cut(model, **options):
    return sharding.shard(model, mesh(), **options)


def engine_of(model, directory, *, dtype="float32", kind=FakeEngine):
    """A fake engine on the weights of `model`, gathered."""
    small().config.save_pretrained(directory)
    config = small(tied="lm_head.weight" not in {weight.name for weight in weights(model)}).config
    config.save_pretrained(directory)
    engine = kind(max_model_len=64)
    engine.start(EngineModel(path=directory, dtype=dtype, weights=lambda: checkpoint_weights(model)))
    return engine


def shake(model, by=0.1):
    """Change every rank's part in place, deterministically."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.mul_(1 + by).add_(by / 10)


def shaken(state, by=0.1):
    return {name: tensor * (1 + by) + by / 10 for name, tensor in state.items()}


def plain(model):
    return {name: tensor.detach().clone() for name, tensor in named_weights(model)}


def equal(views, state):
    return views.keys() == state.keys() and all(
        torch.equal(view, state[name].to(view.dtype)) for name, view in views.items()
    )


def row(seed):
    """One packed row of two sequences, whose tokens train from the second on."""
    ids = torch.randint(3, 40, (1, 24), generator=torch.Generator().manual_seed(seed))
    position_ids = torch.cat([torch.arange(10), torch.arange(14)])[None]
    zeros = torch.zeros(1, 24)
    return TrajectoryBatch(
        input_ids=ids,
        position_ids=position_ids,
        loss_mask=position_ids > 1,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weight=zeros + 1 / 24,
        weight_versions=torch.zeros_like(ids),
        sequence_lengths=(10, 14),
        temperature=1.0,
    )


def loss(model, batch, **options):
    return (token_logprobs(model, batch, **options) * batch.loss_weight).sum()


# -- FSDP2


@case
def every_rank_holds_a_part_and_the_whole_has_the_names_and_values_of_the_model(directory):
    for tied in (True, False):
        model = small(tied=tied)
        before, checkpoint = plain(model), {name: t.clone() for name, t in checkpoint_weights(model)}
        assert not sharding.is_sharded(model)
        cut(cut(model))  # a second time, as every fit of a Trainer does
        assert sharding.is_sharded(model)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        total = sum(tensor.numel() for tensor in before.values())
        assert held < 0.6 * total, (held, total)
        assert equal(plain(model), before)
        assert equal(dict(checkpoint_weights(model)), checkpoint)
        assert {weight.name: weight.shape for weight in weights(model)} == {n: t.shape for n, t in before.items()}


@case
def packed_rows_have_the_logprobs_and_the_gradient_of_the_whole_model(directory):
    for options in ({}, {"max_logits": 500}):  # in one piece, and in chunks that the backward computes again
        whole, model = small(), cut(small())
        check_packing(model)
        expected = [token_logprobs(whole, row(seed), **options) for seed in (0, 1)]
        here = row(dist.get_rank())
        found = token_logprobs(model, here, **options)
        assert (found - expected[dist.get_rank()]).abs().max() < 1e-5
        (loss(whole, row(0), **options) + loss(whole, row(1), **options)).div(2).backward()
        loss(model, here, **options).backward()
        for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
            difference = (parameter.grad.full_tensor() - reference.grad).norm() / reference.grad.norm()
            assert difference < 1e-5, (name, difference)


@case
def after_a_sync_every_engine_holds_the_whole_policy_bit_for_bit(directory):
    for tied in (True, False):
        for mode, dtype in (("copy", "float32"), ("copy", "bfloat16"), ("reload", "float32")):
            model = cut(small(tied=tied))
            engine = engine_of(model, directory, dtype=dtype)
            state = plain(model)
            assert equal(engine.weight_views(), state), "it starts from the gathered weights"
            sync = WeightSync(engine, model, mode=mode, ranks=ranks())
            for version in (0, 1):
                shake(model)
                state = shaken(state)
                report = sync.sync(version)
                assert equal(engine.weight_views(), state)
                assert report.num_tensors == len(state)
                assert report.num_bytes == sum(view.nbytes for view in engine.weight_views().values())
                assert report.canary_diff < (1e-4 if dtype == "float32" else 0.1)
                assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters()), "cut again"
            engine.close()


@case
def what_is_frozen_is_gathered_once(directory):
    model = cut(small())
    model.model.embed_tokens.requires_grad_(False)
    engine = engine_of(model, directory)
    sync = WeightSync(engine, model, ranks=ranks())
    count = len(list(model.parameters()))
    found = [sync.sync(version).num_tensors for version in range(3)]
    assert found == [count, count - 1, count - 1], found
    engine.close()


@case
def weights_in_parts_cannot_be_shared_and_auto_copies_them(directory):
    model = cut(small())
    engine = engine_of(model, directory)
    with pytest.raises(ConfigError, match="every rank holds a part"):
        WeightSync(engine, model, mode="share", ranks=ranks())
    assert WeightSync(engine, model, ranks=ranks()).sync(0).mode == "copy"
    engine.close()


@case
def an_engine_that_fails_on_one_rank_fails_on_both_and_nobody_waits(directory):
    for mode in ("copy", "reload"):

        class Failing(FakeEngine):
            def update_weights(self, write, *, version):
                if version == 1 and dist.get_rank() == 1:
                    raise WeightSyncError("the engine of rank 1 is gone")
                super().update_weights(write, version=version)

            def load_weights(self, given):
                if self.events[-1] == "update:2" and dist.get_rank() == 1:
                    next(iter(given))
                    raise WeightSyncError("the engine of rank 1 is gone in the middle")
                super().load_weights(given)

        model = cut(small())
        engine = engine_of(model, directory, kind=Failing)
        sync = WeightSync(engine, model, mode=mode, ranks=ranks())
        sync.sync(0)
        for version in (1, 2) if mode == "reload" else (1,):
            with pytest.raises(RuntimeError, match="the engine of rank 1 is gone") as caught:
                sync.sync(version)
            assert isinstance(caught.value, WeightSyncError) == (dist.get_rank() == 1)
        assert sync.sync(3).version == 3, "the ranks still agree on what comes next"
        engine.close()


@case
def adapters_on_a_cut_model_reach_the_engine_merged_and_move_alone(directory):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    whole = peft.get_peft_model(small(), config)
    torch.manual_seed(0)
    model = cut(peft.get_peft_model(small(), config))
    engine = engine_of(model, directory)
    assert all((view - plain(whole)[name]).abs().max() < 1e-6 for name, view in engine.weight_views().items())
    sync = WeightSync(engine, model, ranks=ranks())
    for version in range(2):
        for adapted in (whole, model):
            optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
            seeds = (0, 1) if adapted is whole else (dist.get_rank(),)
            for seed in seeds:
                loss(adapted, row(seed)).div(len(seeds)).backward()
            optimizer.step()
            adapted.zero_grad()
        report = sync.sync(version)
        assert report.num_tensors == (4 if version else len(engine.weight_views())), report
        assert report.canary_diff < 1e-4
        state = plain(whole)
        assert all((view - state[name]).abs().max() < 1e-5 for name, view in engine.weight_views().items())
    engine.close()


@case
def no_more_than_a_bucket_is_whole_at_a_time(directory):
    model, limit = cut(small()), sharding.BUCKET_BYTES
    largest = max(weight.shape.numel() * 4 for weight in weights(model))
    sharding.BUCKET_BYTES = largest
    try:
        sizes = [
            sum(weight.shape.numel() * 4 for weight in bucket)
            for bucket in sharding.buckets(model, weights(model), lambda weight: weight.parameters())
        ]
        assert len(sizes) > 3
        assert max(sizes) <= largest
        engine = engine_of(model, directory)
        WeightSync(engine, model, ranks=ranks()).sync(0)
        assert equal(engine.weight_views(), plain(model))
        engine.close()
    finally:
        sharding.BUCKET_BYTES = limit


# -- FSDP1


def flat(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layers = {type(model.model.layers[0])}
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(layers), device_id=torch.device("cpu"), **options
    )


@case
def flattened_weights_of_fsdp1_reach_the_engine_whole(directory):
    for tied in (True, False):
        for mode in ("copy", "reload"):
            plain_model = small(tied=tied)
            state, checkpoint = plain(plain_model), {name: t.clone() for name, t in checkpoint_weights(plain_model)}
            model = flat(small(tied=tied), use_orig_params=True)
            check_packing(model)
            assert sharding.is_sharded(model)
            assert {weight.name: weight.shape for weight in weights(model)} == {n: t.shape for n, t in state.items()}
            assert equal(dict(checkpoint_weights(model)), checkpoint)
            engine = engine_of(model, directory)
            sync = WeightSync(engine, model, mode=mode, ranks=ranks())
            for version in (0, 1):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                loss(model, row(dist.get_rank())).backward()
                loss(plain_model, row(0)).div(2).backward()
                loss(plain_model, row(1)).div(2).backward()
                optimizer.step()
                torch.optim.SGD(plain_model.parameters(), lr=0.1).step()
                model.zero_grad()
                plain_model.zero_grad()
                assert sync.sync(version).canary_diff < 1e-4
                views, wanted = engine.weight_views(), plain(plain_model)
                assert all((views[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)
            engine.close()


@case
def weights_that_fsdp1_flattened_for_good_are_refused(directory):
    model = flat(small(), use_orig_params=False)
    check_packing(model)
    with pytest.raises(ConfigError, match="use_orig_params=True"):
        list(weights(model))


# -- ZeRO-3, as DeepSpeed documents it


class GatheredParameters:
    """DeepSpeed's: inside, the parameters have their whole data."""

    live = 0

    def __init__(self, parameters, modifier_rank=None, fwd_module=None, enabled=True):
        assert modifier_rank is None
        self.parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]

    def __enter__(self):
        for parameter in self.parameters:
            parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, parameter.ds_tensor)
            parameter.data = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
        GatheredParameters.live = sum(parameter.numel() for parameter in self.parameters)

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data = torch.empty(0)


def partitioned(model):
    """`model` as DeepSpeed's stage 3 leaves it: empty parameters, a flat part of each beside them."""
    import types

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    sys.modules["deepspeed"] = module
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = index, parameter.shape, parameter.numel()
        size = -(-parameter.numel() // dist.get_world_size())
        padded = nn.functional.pad(parameter.data.flatten(), (0, 2 * size - parameter.numel()))
        parameter.ds_tensor = padded[dist.get_rank() * size :][:size].clone()
        parameter.data = torch.empty(0)
    return model


@case
def partitioned_weights_of_zero_3_reach_the_engine_whole(directory):
    state = plain(small())
    model = partitioned(small())
    assert sharding.is_sharded(model)
    assert {weight.name: weight.shape for weight in weights(model)} == {n: t.shape for n, t in state.items()}
    limit, sharding.BUCKET_BYTES = sharding.BUCKET_BYTES, 200_000
    try:
        engine = engine_of(model, directory)
        assert equal(engine.weight_views(), state)
        sync = WeightSync(engine, model, ranks=ranks())
        sync._canary.check = lambda *_, **__: 0.0  # a forward is DeepSpeed's own
        for parameter in model.parameters():
            parameter.ds_tensor.mul_(1.1).add_(0.01)
        sync.sync(0)
        assert equal(engine.weight_views(), shaken(state))
        assert GatheredParameters.live < sum(tensor.numel() for tensor in state.values())
    finally:
        sharding.BUCKET_BYTES = limit
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "given back"
    engine.close()


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {}
    chosen = sys.argv[2:] or list(CASES)
    for name in chosen:
        directory = Path(sys.argv[1]) / f"model-{dist.get_rank()}"
        directory.mkdir(exist_ok=True)
        try:
            CASES[name](directory)
        except Exception:  # noqa: BLE001  told to the test of that case
            found[name] = traceback.format_exc()
            print(f"rank {dist.get_rank()}, {name}:\n{found[name]}", file=sys.stderr, flush=True)
        else:
            found[name] = ""
    every = ranks().gather(found)
    if dist.get_rank() == 0:
        results = {name: "\n".join(rank[name] for rank in every).strip() for name in chosen}
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
