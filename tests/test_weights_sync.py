"""Weights: under which names they leave a module, and the proof that the engine holds them."""

import pytest
import torch
from torch import nn

from lightning_gym.errors import WeightSyncError
from lightning_gym.policy.engine import EngineModel
from lightning_gym.sync import WeightSync, check_manifest
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer
from lightning_gym.weights import checkpoint_weights, named_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def small(*, tied=True, seed=0):
    return tiny_model(
        tiny_tokenizer(), num_layers=1, hidden_size=32, num_kv_heads=1, tie_word_embeddings=tied, seed=seed
    )


@pytest.fixture
def engine_of(tmp_path):
    """Makes a fake engine that was started from other weights than the trainer's, and closes it."""
    engines = []

    def make(*, tied=True, kind=FakeEngine):
        other = small(tied=tied, seed=9)
        other.config.save_pretrained(tmp_path)
        engine = kind(max_model_len=64)
        engine.start(EngineModel(path=tmp_path, dtype="float32", weights=lambda: checkpoint_weights(other)))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


# -- names


class Wrapped(nn.Module):
    """What DDP does to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Compiled(nn.Module):
    """What torch.compile does to names."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_named_once_and_a_checkpoint_names_tied_ones_twice(tied):
    model = small(tied=tied)
    once, all_names = dict(named_weights(model)), dict(checkpoint_weights(model))
    assert once.keys() == {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in once) is not tied
    assert all_names.keys() == once.keys() | {"lm_head.weight"}
    if tied:
        assert all_names["lm_head.weight"].data_ptr() == once["model.embed_tokens.weight"].data_ptr()
    assert not any(tensor.requires_grad for tensor in once.values())


@pytest.mark.parametrize("wrap", [Wrapped, Compiled, lambda m: Compiled(Wrapped(m))])
def test_a_wrapper_does_not_change_the_names(wrap):
    model = small()
    assert [name for name, _ in named_weights(wrap(model))] == [name for name, _ in named_weights(model)]
    assert [name for name, _ in checkpoint_weights(wrap(model))] == [name for name, _ in checkpoint_weights(model)]


def test_the_named_tensors_are_the_parameters_own():
    model = small()
    name, tensor = next(named_weights(model))
    tensor.fill_(0.25)
    assert (dict(model.named_parameters())[name] == 0.25).all()


# -- the manifest


def manifest(**shapes):
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def test_equal_manifests_are_accepted():
    check_manifest({"a": torch.zeros(2, 3)}, manifest(a=(2, 3)))


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (manifest(a=(2, 3)), "b: the engine has it, the trainer does not"),
        (manifest(a=(2, 3), b=(4,), c=(1,)), "c: the trainer has it, the engine does not"),
        (manifest(a=(3, 2), b=(4,)), r"a: \(3, 2\) in the trainer, \(2, 3\) in the engine"),
        (manifest(a=(6,), c=(1,)), r"a: \(6,\) in.*; b: the engine has it.*; c: the trainer has it"),
    ],
    ids=["missing", "extra", "mis-shaped", "all at once"],
)
def test_a_tensor_that_is_missing_extra_or_mis_shaped_is_named(trainer, said):
    with pytest.raises(WeightSyncError, match=said):
        check_manifest({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, trainer)


def test_a_long_list_of_differences_is_cut_and_counted():
    with pytest.raises(WeightSyncError, match=r"; and 12 more\. Is `policy`"):
        check_manifest({}, manifest(**{f"p{i:02}": (1,) for i in range(20)}))


def test_an_engine_of_another_model_is_refused_before_anything_is_copied(engine_of):
    engine = engine_of(tied=False)
    before = {name: view.clone() for name, view in engine.weight_views().items()}
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight: the engine has it, the trainer does not"):
        WeightSync(engine, small(tied=True))
    assert all(torch.equal(view, before[name]) for name, view in engine.weight_views().items())
    assert engine.weight_version is None


# -- the sync


@pytest.mark.parametrize("tied", [True, False])
def test_after_a_sync_the_engines_tensors_are_the_trainers_bit_for_bit(engine_of, tied):
    engine, model = engine_of(tied=tied), small(tied=tied)
    sync = WeightSync(engine, model)
    for version in (0, 1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
        views, trained = engine.weight_views(), dict(named_weights(model))
        assert not any(torch.equal(views[name], tensor) for name, tensor in trained.items())
        report = sync.sync(version)
        assert all(torch.equal(views[name], tensor) for name, tensor in trained.items())
        assert engine.weight_version == report.version == version
        assert report.num_tensors == len(trained)
        assert report.num_bytes == 4 * sum(tensor.numel() for tensor in trained.values())
        assert report.canary_diff < 1e-4
        assert 0 <= report.copy_seconds <= report.seconds
    assert engine.events == ["start", "update:0", "update:1", "update:7"]


def test_the_trainer_is_left_as_it_was(engine_of):
    engine, model = engine_of(), small()
    model.train()
    before = {name: tensor.clone() for name, tensor in named_weights(model)}
    state = torch.get_rng_state()
    WeightSync(engine, model).sync(0)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Forgetful(FakeEngine):
    """Shows copies of some of its tensors, so that what is written there is lost."""

    forgets = ""

    def weight_views(self):
        return {name: v.clone() if name == self.forgets else v for name, v in super().weight_views().items()}


TENSORS = [name for name, _ in named_weights(small(tied=False))]


@pytest.mark.parametrize("name", TENSORS)
def test_the_canary_notices_any_one_tensor_that_was_not_copied(engine_of, name):
    model = small(tied=False)
    with torch.no_grad():  # norms are all ones in a fresh model, in the engine's as in the trainer's
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine = engine_of(tied=False, kind=Forgetful)
    engine.forgets = name
    sync = WeightSync(engine, model)
    with pytest.raises(WeightSyncError, match=r"after syncing version 3 .* disagree by .* nats on the canary"):
        sync.sync(3)


def test_weights_that_are_not_numbers_stop_the_run(engine_of):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightSyncError, match="disagree by nan"):
        sync.sync(1)


def test_an_engine_that_is_still_generating_is_not_written_to(engine_of):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model)
    sync.sync(0)
    engine.resume()
    before = {name: view.clone() for name, view in engine.weight_views().items()}
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(WeightSyncError, match="pause first"):
        sync.sync(1)
    assert engine.weight_version == 0
    assert all(torch.equal(view, before[name]) for name, view in engine.weight_views().items())
