"""Weights: under which names they leave a module, and the proof that the engine holds them."""

import logging

import pytest
import torch
from torch import nn

from lightning_gym.errors import ConfigError, WeightSyncError
from lightning_gym.manifest import check_manifest
from lightning_gym.policy.engine import EngineModel
from lightning_gym.sync import WeightSync
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer
from lightning_gym.weights import checkpoint_weights, named_weights

pytestmark = pytest.mark.usefixtures("one_thread")


MODES = ["share", "copy", "reload"]


def small(*, tied=True, seed=0):
    """One layer, with as many key/value heads as heads: q, k and v have equal shapes."""
    return tiny_model(
        tiny_tokenizer(), num_layers=1, hidden_size=32, num_kv_heads=1, tie_word_embeddings=tied, seed=seed
    )


def shake(model, seed=0, *, by=0.1):
    """Change every parameter, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(views, model):
    """Whether every view is the trainer's tensor, bit for bit, as the view's dtype holds it."""
    trained = dict(named_weights(model))
    return views.keys() == trained.keys() and all(
        torch.equal(view, trained[name].to(view.dtype)) for name, view in views.items()
    )


@pytest.fixture
def engine_of(tmp_path):
    """Makes a fake engine that was started from other weights than the trainer's, and closes it."""
    engines = []

    def make(*, tied=True, kind=FakeEngine, dtype="float32"):
        other = small(tied=tied, seed=9)
        other.config.save_pretrained(tmp_path)
        engine = kind(max_model_len=64)
        engine.start(EngineModel(path=tmp_path, dtype=dtype, weights=lambda: checkpoint_weights(other)))
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


@pytest.mark.parametrize("wrap", [Wrapped, Compiled, lambda m: Compiled(Wrapped(m)), lambda m: Wrapped(Compiled(m))])
def test_a_wrapper_does_not_change_the_names(wrap):
    model = small()
    assert [name for name, _ in named_weights(wrap(model))] == [name for name, _ in named_weights(model)]
    assert [name for name, _ in checkpoint_weights(wrap(model))] == [name for name, _ in checkpoint_weights(model)]


def test_the_named_tensors_are_the_parameters_own():
    model = small()
    name, tensor = next(named_weights(model))
    tensor.fill_(0.25)
    assert (dict(model.named_parameters())[name] == 0.25).all()


def test_a_part_of_the_model_that_is_called_module_keeps_its_name():
    model = nn.Module()
    model.submodule = nn.Module()
    model.submodule.module = nn.Linear(1, 1, bias=False)
    assert [name for name, _ in named_weights(Wrapped(model))] == ["submodule.module.weight"]


# -- LoRA


class Adapted(nn.Module):
    """A LoRA layer as PEFT lays it out: base and adapters side by side, the sum computed on demand."""

    merged = False

    def __init__(self, base, *, rank=2, seed=0):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        for part in (self.lora_A, self.lora_B):
            part["default"].weight.data.normal_(generator=generator)
        self.active_adapters = ["default"]

    def get_delta_weight(self, adapter):
        return 0.5 * self.lora_B[adapter].weight @ self.lora_A[adapter].weight

    def forward(self, x):
        return self.base_layer(x) + x @ self.get_delta_weight("default").T


def adapted(*, tied=True):
    """The model with LoRA on two layers and everything else frozen, under the names that PEFT gives."""
    model = small(tied=tied).requires_grad_(False)
    layer = model.model.layers[0]
    layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    return model


class PeftNames(nn.Module):
    """What PEFT's model does to names."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_an_adapted_model_are_the_merged_ones_under_the_base_models_names(tied):
    model, base = adapted(tied=tied), small(tied=tied)
    merged, plain = dict(named_weights(PeftNames(model))), dict(named_weights(base))
    assert merged.keys() == plain.keys()
    assert dict(checkpoint_weights(PeftNames(model))).keys() == dict(checkpoint_weights(base)).keys()
    for name, tensor in merged.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        delta = layer.get_delta_weight("default") if isinstance(layer, Adapted) else 0
        assert torch.equal(tensor, plain[name] + delta)
        assert torch.equal(dict(checkpoint_weights(model))[name], tensor)


def test_adapters_reach_the_engine_merged_and_frozen_weights_only_once(engine_of):
    engine, model = engine_of(), adapted()
    sync = WeightSync(engine, model)
    first = sync.sync(0)
    assert (first.mode, first.num_tensors) == ("copy", len(list(named_weights(model))))
    q_proj = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q_proj.lora_B["default"].weight.mul_(3.0)
    second = sync.sync(1)
    assert second.num_tensors == 2
    assert equal(engine.weight_views(), model)
    assert second.canary_diff < 1e-4


def test_adapters_cannot_be_shared(engine_of):
    with pytest.raises(ConfigError, match=r"q_proj\.weight has a LoRA adapter: .* Use sync_mode='auto'"):
        WeightSync(engine_of(), adapted(), mode="share")


# -- the manifest


def manifest(**shapes):
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def test_equal_manifests_are_accepted():
    check_manifest(manifest(a=(2, 3)), manifest(a=(2, 3)))


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
        check_manifest(manifest(a=(2, 3), b=(4,)), trainer)


def test_a_long_list_of_differences_is_cut_and_counted():
    with pytest.raises(WeightSyncError, match=r"; and 12 more\. Is `policy`"):
        check_manifest({}, manifest(**{f"p{i:02}": (1,) for i in range(20)}))


def test_an_engine_of_another_model_is_refused_before_anything_is_copied(engine_of):
    engine = engine_of(tied=False)
    before = clones(engine.weight_views())
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight: the engine has it, the trainer does not"):
        WeightSync(engine, small(tied=True))
    assert all(torch.equal(view, before[name]) for name, view in engine.weight_views().items())
    assert engine.weight_version is None


# -- the sync, on every rung


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_after_a_sync_the_engines_tensors_are_the_trainers_bit_for_bit(engine_of, mode, tied, dtype):
    engine, model = engine_of(tied=tied, dtype=str(dtype).removeprefix("torch.")), small(tied=tied).to(dtype)
    sync = WeightSync(engine, model, mode=mode)
    assert not equal(engine.weight_views(), model)
    whole = sum(tensor.nbytes for _, tensor in named_weights(model))
    for index, version in enumerate((0, 1, 7)):
        shake(model, version)
        wanted = clones(dict(named_weights(model)))
        if index and mode != "share":
            assert not equal(engine.weight_views(), model)
        report = sync.sync(version)
        assert equal(engine.weight_views(), model)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in named_weights(model))
        assert (report.mode, report.version, engine.weight_version) == (mode, version, version)
        moved = (0, 0) if index and mode == "share" else (whole, len(wanted))
        assert (report.num_bytes, report.num_tensors) == moved
        assert report.canary_diff < (1e-4 if dtype == torch.float32 else 0.1)
        assert 0 < report.canary_seconds < report.seconds
    assert engine.events == ["start", "update:0", "update:1", "update:7"]


def test_weights_are_cast_where_the_engine_computes_in_another_dtype(engine_of):
    engine, model = engine_of(dtype="bfloat16"), small()
    sync = WeightSync(engine, model)
    for version in (0, 1):
        shake(model, version)
        assert sync.sync(version).mode == "copy"
        assert equal(engine.weight_views(), model)


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_is_left_as_it_was(engine_of, mode):
    engine, model = engine_of(), small()
    model.train()
    before = clones(dict(named_weights(model)))
    parameters = list(model.parameters())
    state = torch.get_rng_state()
    sync = WeightSync(engine, model, mode=mode)
    sync.sync(0)
    assert model.training
    for stage in ("synced", "closed"):
        assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model)), stage
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
        sync.close()
    assert torch.equal(torch.get_rng_state(), state)
    storages = [parameter.untyped_storage() for parameter in parameters]
    assert [storage.nbytes() for storage in storages] == [parameter.nbytes for parameter in parameters]


def test_frozen_parts_are_written_once_and_again_when_they_change(engine_of):
    engine, model = engine_of(tied=False), small(tied=False)
    model.model.embed_tokens.requires_grad_(False)
    sync = WeightSync(engine, model, mode="copy")
    count = len(list(model.parameters()))
    assert [sync.sync(version).num_tensors for version in range(3)] == [count, count - 1, count - 1]
    shake(model)
    assert sync.sync(3).num_tensors == count
    assert equal(engine.weight_views(), model)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data + 1
    assert sync.sync(4).num_tensors == count
    model.requires_grad_(True)
    assert [sync.sync(version).num_tensors for version in (5, 6)] == [count, count]
    assert equal(engine.weight_views(), model)


# -- sharing


def test_with_shared_weights_an_optimizer_step_is_an_update_of_the_engine(engine_of):
    engine, model = engine_of(), small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sync = WeightSync(engine, model)
    assert sync.sync(0).mode == "share"
    before = clones(engine.weight_views())
    for foreach in (True, False):
        optimizer.param_groups[0]["foreach"] = foreach
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        views = engine.weight_views()
        assert equal(views, model)
        assert not any(torch.equal(view, before[name]) for name, view in views.items())
        before = clones(views)
        assert sync.sync(1).num_bytes == 0


def test_shared_weights_that_changed_since_the_sync_are_not_sampled_from(engine_of):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model, mode="share")
    sync.sync(4)
    sync.check_unchanged()
    shake(model)
    with pytest.raises(WeightSyncError, match="changed after version 4 was synced"):
        sync.check_unchanged()
    sync.sync(5)
    sync.check_unchanged()


def test_copied_weights_may_change_while_the_engine_samples(engine_of):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model, mode="copy")
    sync.sync(4)
    shake(model)
    sync.check_unchanged()


def swap_data(model):
    model.model.norm.weight.data = model.model.norm.weight.data + 1


def assign(model):
    model.load_state_dict(clones(model.state_dict()), assign=True)


def there_and_back(model):
    model.to(torch.float64).to(torch.float32)


@pytest.mark.parametrize("break_it", [swap_data, assign, there_and_back])
def test_parameters_that_were_given_another_storage_are_noticed(engine_of, break_it, caplog):
    model = small(tied=False)
    sync = WeightSync(engine_of(tied=False), model, mode="share")
    sync.sync(0)
    break_it(model)
    with pytest.raises(WeightSyncError, match=r"were given another storage than the engine's .* sync_mode='copy'"):
        sync.sync(1)

    engine, model = engine_of(tied=False), small(tied=False)
    sync = WeightSync(engine, model)
    sync.sync(0)
    break_it(model)
    with caplog.at_level(logging.WARNING):
        assert sync.sync(1).mode == "copy"
    assert "from here on weights are copied" in caplog.text
    assert equal(engine.weight_views(), model)
    shake(model)
    assert not equal(engine.weight_views(), model), "nothing is shared any more"
    sync.sync(2)
    assert equal(engine.weight_views(), model)


def test_a_checkpoint_in_place_keeps_weights_shared(engine_of):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model, mode="share")
    sync.sync(0)
    model.load_state_dict(small(seed=3).state_dict())
    assert sync.sync(1).num_bytes == 0
    assert equal(engine.weight_views(), model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_shared_weights_is_saved_and_loaded_like_any_other(engine_of, tied, tmp_path):
    model = small(tied=tied)
    wanted = clones(dict(named_weights(model)))
    WeightSync(engine_of(tied=tied), model, mode="share").sync(0)
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    model.save_pretrained(tmp_path / "saved")
    loaded = small(tied=tied, seed=5)
    loaded.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True))
    again = type(model).from_pretrained(tmp_path / "saved")
    for name, tensor in wanted.items():
        assert torch.equal(dict(named_weights(loaded))[name], tensor)
        assert torch.equal(dict(named_weights(again))[name], tensor)
    size = sum(tensor.nbytes for tensor in wanted.values())
    assert (tmp_path / "model.ckpt").stat().st_size < 1.1 * size + 64 * 32 * 4 * (1 if tied else 2)


# -- which rung


def flatten(model):
    """Make the parameters slices of one buffer, as some optimizers and wrappers do."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return model


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        (lambda: small().double(), {}, "is torch.float64 on cpu in the trainer and torch.float32 on cpu in the engine"),
        (lambda: flatten(small()), {}, "is part of a buffer that an optimizer or a wrapper flattened"),
        (small, {"max_lag": 1}, "max_lag is 1, so training would change weights that the engine samples from"),
    ],
    ids=["dtype", "flattened", "lag"],
)
def test_what_cannot_be_shared_is_copied_and_the_log_says_why(engine_of, model, changes, reason, caplog):
    engine, model = engine_of(), model()
    with pytest.raises(ConfigError, match=f"sync_mode='share' cannot be used: .*{reason}"):
        WeightSync(engine, model, mode="share", **changes)
    with caplog.at_level(logging.INFO):
        sync = WeightSync(engine, model, **changes)
    assert "weights reach the engine by copy; not share: " in caplog.text
    assert reason in caplog.text
    assert sync.sync(0).mode == "copy"
    assert equal(engine.weight_views(), model)


class Opaque(FakeEngine):
    """Holds its weights in a form of its own."""

    def weight_views(self):
        raise WeightSyncError("the weights are quantised")


def test_an_engine_that_shows_no_tensors_is_reloaded(engine_of, caplog):
    engine, model = engine_of(kind=Opaque), small()
    for mode in ("share", "copy"):
        with pytest.raises(ConfigError, match=f"sync_mode='{mode}' cannot be used: the weights are quantised"):
            WeightSync(engine, model, mode=mode)
    with caplog.at_level(logging.INFO):
        sync = WeightSync(engine, model)
    assert "by reload; not share: the weights are quantised; not copy: the weights are quantised" in caplog.text
    shake(model)
    assert sync.sync(0).mode == "reload"
    assert equal(FakeEngine.weight_views(engine), model)
    shake(model)
    with pytest.raises(WeightSyncError, match="disagree"):
        sync._canary.check(torch.float32, version=0)


# -- faults: each stops the run before a rollout, on every rung


def synced(engine_of, mode, **changes):
    engine, model = engine_of(tied=False, **changes), small(tied=False)
    shake(model, 1, by=0.5)  # norms are all ones in a fresh model, in the engine's as in the trainer's
    sync = WeightSync(engine, model, mode=mode)
    return engine, model, sync


def lose(model):
    model.model.layers[0].self_attn.q_norm.weight = None


def gain(model):
    model.model.register_parameter("bias", nn.Parameter(torch.zeros(3)))


def reshape(model):
    model.model.norm.weight = nn.Parameter(torch.ones(16))


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def halve(model):
    model.model.norm.weight.data = model.model.norm.weight.data.half()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lose, r"q_norm\.weight: the engine has it, the trainer does not"),
        (gain, r"model\.bias: the trainer has it, the engine does not"),
        (reshape, r"norm\.weight: \(16,\) in the trainer, \(32,\) in the engine"),
        (tie, r"lm_head\.weight: the engine has it, the trainer does not"),
        (halve, r"model\.norm\.weight: torch\.float32 at first, torch\.float16 now"),
    ],
    ids=["missing", "extra", "mis-shaped", "tied", "dtype"],
)
def test_a_trainer_that_holds_other_tensors_than_at_first_is_not_synced(engine_of, mode, break_it, said):
    engine, model, sync = synced(engine_of, mode)
    sync.sync(0)
    before = clones(engine.weight_views())
    break_it(model)
    with pytest.raises(WeightSyncError, match=said):
        sync.sync(1)
    assert engine.weight_version == 0
    assert all(torch.equal(view, before[name]) for name, view in engine.weight_views().items())


@pytest.mark.parametrize("mode", MODES)
def test_a_head_that_was_untied_is_not_synced(engine_of, mode):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model, mode=mode)
    sync.sync(0)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight: the trainer has it, the engine does not"):
        sync.sync(1)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_computes_with_other_tensors_than_before_stops_the_run(engine_of, mode):
    engine, _, sync = synced(engine_of, mode)
    sync.sync(0)
    norm = engine._model.model.norm
    norm.weight.data = norm.weight.data.clone()
    with pytest.raises(WeightSyncError, match=r"other tensors than those that the sync writes: model\.norm\.weight"):
        sync.sync(1)


class Forgetful(FakeEngine):
    """Shows a copy of one of its tensors, and skips it when it loads: what is written there is lost."""

    forgets = ""
    copy = None

    def weight_views(self):
        views = super().weight_views()
        if self.copy is None:
            self.copy = views[self.forgets].clone()
        return views | {self.forgets: self.copy}

    def load_weights(self, weights):
        own = self._model.state_dict()
        super().load_weights((name, own[name] if name == self.forgets else tensor) for name, tensor in weights)


TENSORS = [name for name, _ in named_weights(small(tied=False))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TENSORS)
def test_the_canary_notices_any_one_tensor_that_is_stale(engine_of, mode, name):
    class Forgets(Forgetful):
        forgets = name

    _, _, sync = synced(engine_of, mode, kind=Forgets)
    with pytest.raises(WeightSyncError, match=r"after syncing version 3 .* disagree by .* nats on the canary"):
        sync.sync(3)


class Swapped(FakeEngine):
    """Takes q for k and k for q, whose shapes are equal."""

    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")

    def weight_views(self):
        views = super().weight_views()
        return views | dict(zip(self.names, [views[name] for name in reversed(self.names)], strict=True))

    def load_weights(self, weights):
        other = dict(zip(self.names, reversed(self.names), strict=True))
        super().load_weights((other.get(name, name), tensor) for name, tensor in weights)


@pytest.mark.parametrize("mode", MODES)
def test_the_canary_notices_two_parts_in_each_others_place(engine_of, mode):
    _, _, sync = synced(engine_of, mode, kind=Swapped)
    with pytest.raises(WeightSyncError, match="nats on the canary"):
        sync.sync(0)


def test_an_engine_whose_loader_refuses_a_checkpoint_stops_the_run(engine_of):
    class Picky(FakeEngine):
        def load_weights(self, weights):
            super().load_weights(item for item in weights if "norm" not in item[0])

    _, _, sync = synced(engine_of, "reload", kind=Picky)
    with pytest.raises(WeightSyncError, match=r"(?s)could not load these weights: .*q_norm\.weight"):
        sync.sync(0)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_not_numbers_stop_the_run(engine_of, mode):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model, mode=mode)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightSyncError, match="disagree by nan"):
        sync.sync(1)


@pytest.mark.parametrize("mode", ["copy", "reload"])
def test_an_engine_that_is_still_generating_is_not_written_to(engine_of, mode):
    engine, model = engine_of(), small()
    sync = WeightSync(engine, model, mode=mode)
    sync.sync(0)
    engine.resume()
    before = clones(engine.weight_views())
    shake(model)
    with pytest.raises(WeightSyncError, match="pause first"):
        sync.sync(1)
    assert engine.weight_version == 0
    assert all(torch.equal(view, before[name]) for name, view in engine.weight_views().items())
