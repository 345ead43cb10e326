"""Export: what transformers loads from the directory is the policy of the checkpoint, in its logprobs."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_gym import GymCallback, PolicyModule
from lightning_gym.errors import ConfigError, OutOfSpaceError
from lightning_gym.export import RECORD, export, policy_record, read_checkpoint
from lightning_gym.model_dir import check_model_dir, full_disk_named
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 13, 21, 34, 55, 89]])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=32, num_layers=1, num_kv_heads=1).save_pretrained(directory)
    (directory / "train.jsonl").write_text("no part of a model\n")
    return directory


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def logprobs(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float().log_softmax(-1)


class Holder(L.LightningModule):
    """A module that holds its policy under another name, deeper."""

    def __init__(self, model):
        super().__init__()
        self.agent = nn.ModuleDict({"actor": model})


def saved(path, module, *, attribute="model", model_path=None):
    """A checkpoint as the Trainer writes it, with what `GymCallback` adds."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    callback = GymCallback(
        engine=FakeEngine(), gym=FakeGym(), policy=attribute, model_path=None if model_path is None else model_path
    )
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    torch.save(checkpoint, path)
    return path


def test_transformers_loads_the_policy_of_the_checkpoint(model_dir, tmp_path):
    module = PolicyModule(model_dir)
    moved(module.model)
    export(read_checkpoint(saved(tmp_path / "a.ckpt", module)), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logprobs(loaded), logprobs(module.model))
    assert not torch.equal(logprobs(loaded), logprobs(AutoModelForCausalLM.from_pretrained(model_dir)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_tokenizer_and_chat_template_are_those_of_the_start_byte_for_byte(model_dir, tmp_path):
    export(read_checkpoint(saved(tmp_path / "a.ckpt", PolicyModule(model_dir))), tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()
    messages = [{"role": "user", "content": "x"}]
    rendered = [
        AutoTokenizer.from_pretrained(where).apply_chat_template(messages, tokenize=False)
        for where in (model_dir, tmp_path / "out")
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_under_another_name_of_any_dtype(model_dir, tmp_path, tied, dtype):
    source = tmp_path / "source"
    shutil.copytree(model_dir, source)
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1, tie_word_embeddings=tied)
    model.config.save_pretrained(source)
    model = moved(model.to(dtype))
    path = saved(tmp_path / "a.ckpt", Holder(model), attribute="agent.actor", model_path=source)
    export(read_checkpoint(path), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype
    assert torch.equal(logprobs(loaded), logprobs(model))


# -- LoRA, by the names that PEFT gives


class LoraLinear(nn.Module):
    """As peft 0.18 lays an adapted layer out."""

    def __init__(self, base, rank, scale):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(1)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scale = scale
        for part in (self.lora_A, self.lora_B):
            nn.init.normal_(part["default"].weight, generator=generator)

    def forward(self, x):
        return self.base_layer(x) + self.scale * self.lora_B["default"](self.lora_A["default"](x))


class Adapted(nn.Module):
    """As peft wraps a model."""

    def __init__(self, model, **config):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        settings = {"r": 4, "lora_alpha": 8, "use_rslora": False, "target_modules": {"q_proj"}} | config
        self.peft_config = {"default": FakePeftConfig(settings)}
        scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
        for layer in model.model.layers:
            layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj, settings["r"], scale)

    @property
    def config(self):
        return self.base_model.model.config


class FakePeftConfig:
    def __init__(self, values):
        self.values = values

    def to_dict(self):
        return dict(self.values)


def adapted(model_dir, **config):
    return Adapted(AutoModelForCausalLM.from_pretrained(model_dir), **config)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged(model_dir, tmp_path, rslora):
    model = adapted(model_dir, use_rslora=rslora)
    path = saved(tmp_path / "a.ckpt", PolicyModule(model), model_path=model_dir)
    export(read_checkpoint(path), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logprobs(loaded), logprobs(model.base_model.model), rtol=0, atol=2e-5)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert (logprobs(loaded) - logprobs(base)).abs().max() > 1e-2


def test_an_adapter_alone_has_the_files_and_names_of_peft(model_dir, tmp_path):
    from safetensors.torch import load_file

    model = adapted(model_dir)
    path = saved(tmp_path / "a.ckpt", PolicyModule(model), model_path=model_dir)
    export(read_checkpoint(path), tmp_path / "out", adapter=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj"])
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(weights) == {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(weights[next(name for name in weights if "lora_A" in name)], layer.lora_A["default"].weight)


def test_peft_loads_what_was_exported(model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    path = saved(tmp_path / "a.ckpt", PolicyModule(model), model_path=model_dir)
    checkpoint = read_checkpoint(path)
    export(checkpoint, tmp_path / "merged")
    export(checkpoint, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logprobs(loaded), logprobs(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"a": 1}}])
def test_an_adapter_that_is_not_merged_here_is_named(model_dir, tmp_path, config):
    path = saved(tmp_path / "a.ckpt", PolicyModule(adapted(model_dir, **config)), model_path=model_dir)
    with pytest.raises(ConfigError, match=rf"{next(iter(config))}.*merge_and_unload"):
        read_checkpoint(path)


def test_the_record_of_a_policy_is_plain_python(model_dir):
    record = policy_record(adapted(model_dir), attribute="model", model_path=model_dir)
    assert json.loads(json.dumps(record)) == record


# -- bad input


def test_what_is_no_checkpoint_is_named(model_dir, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    whole = saved(tmp_path / "whole.ckpt", PolicyModule(model_dir)).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "other", "half"):
        with pytest.raises(ConfigError, match=rf"{name}\.ckpt cannot be read as a checkpoint"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(ConfigError, match="is a directory"):
        read_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "gone.ckpt")


def test_a_policy_that_is_not_there_is_answered_with_what_is(model_dir, tmp_path):
    path = saved(tmp_path / "a.ckpt", PolicyModule(model_dir))
    with pytest.raises(ConfigError, match=r"no tensors under 'actor\.'; it has \['model'\]"):
        read_checkpoint(path, attribute="actor")


def test_a_checkpoint_of_another_model_is_refused_by_its_tensors(model_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=2, num_kv_heads=1).config.save_pretrained(other)
    path = saved(tmp_path / "a.ckpt", PolicyModule(model_dir))
    with pytest.raises(ConfigError, match=r"missing \['model\.layers\.1.*--model-path"):
        export(read_checkpoint(path, model_path=other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_say_its_model_asks_for_it(model_dir, tmp_path):
    path = saved(tmp_path / "a.ckpt", PolicyModule(model_dir))
    checkpoint = torch.load(path)
    del checkpoint[RECORD]
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match="--model-path DIR"):
        read_checkpoint(path)
    assert read_checkpoint(path, model_path=model_dir).model_path == model_dir


def test_nothing_is_overwritten(model_dir, tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path / "a.ckpt", PolicyModule(model_dir)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        export(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no LoRA adapter"):
        export(checkpoint, tmp_path / "new", adapter=True)


@pytest.mark.parametrize(
    ("gone", "said"),
    [("config.json", r"missing config\.json"), ("tokenizer.json", "a tokenizer"), ("model.safetensors", "weights")],
)
def test_a_model_directory_that_misses_a_file_is_named_with_it(model_dir, tmp_path, gone, said):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    check_model_dir(broken)
    (broken / gone).unlink()
    with pytest.raises(ConfigError, match=said):
        check_model_dir(broken)


def test_a_shard_that_is_missing_is_named(model_dir, tmp_path):
    broken = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(broken, max_shard_size="50KB")
    for name in ("tokenizer.json",):
        shutil.copy(model_dir / name, broken)
    check_model_dir(broken)
    shard = max(broken.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        check_model_dir(broken)


def test_a_full_disk_is_named_and_other_errors_are_not(tmp_path):
    with pytest.raises(OutOfSpaceError, match="no space left while writing here"), full_disk_named(Path("here")):
        Path("/dev/full").write_text("x")
    with pytest.raises(OutOfSpaceError), full_disk_named(Path("here")):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), full_disk_named(Path("here")):
        (tmp_path / "gone").stat()


@pytest.mark.vllm
def test_vllm_loads_the_directory_with_the_trainers_logprobs(model_dir, tmp_path):
    from lightning_gym import VLLMEngine
    from lightning_gym.policy.engine import EngineModel

    module = PolicyModule(adapted(model_dir))
    export(read_checkpoint(saved(tmp_path / "a.ckpt", module, model_path=model_dir)), tmp_path / "out")
    engine = VLLMEngine(max_model_len=64, engine_args={"load_format": "safetensors"})  # vLLM's own loader, from disk
    try:
        engine.start(EngineModel(path=tmp_path / "out", dtype="float32", weights=lambda: iter(())))
        engine.update_weights(lambda: None, version=0)
        found = torch.tensor(engine.prompt_logprobs(IDS[0].tolist()))
    finally:
        engine.close()
    expected = logprobs(module.model.base_model.model)[0, :-1].gather(-1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
