"""Policies with PEFT's adapters: only those train, and the engine samples from the merged weights."""

import lightning.pytorch as L
import pytest
import torch

from lightning_gym import GymCallback, GymDataModule, PolicyModule, VLLMEngine
from lightning_gym.errors import ConfigError
from lightning_gym.gym.environments import Counter
from lightning_gym.logprobs import check_packing, token_logprobs
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym, packed_batch, tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "all linear, rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "a part trained whole": {"modules_to_save": ["lm_head"]},
}


def base():
    return tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=2, num_kv_heads=1, tie_word_embeddings=False)


def adapted(**changes):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **(KINDS["lora"] | changes))
    return peft.get_peft_model(base(), config)


@pytest.fixture
def model_dir(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    base().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def varied(monkeypatch):
    def verify(self, response):
        return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)

    monkeypatch.setattr(Counter, "verify", verify)


def fit(policy, model_dir, run_dir, *, engine=None, ckpt_path=None, **trainer):
    import random

    rng = random.Random(0)
    callback = GymCallback(
        engine=engine or FakeEngine(max_model_len=96),
        gym=FakeGym(["counter"], max_steps=2),
        sampling=SamplingProfile(max_output_tokens=5),
        model_path=model_dir,
        run_dir=run_dir,
    )
    data = GymDataModule([Counter.row(rng) for _ in range(7)], prompts_per_step=2, group_size=3)
    options = {"max_steps": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    fitted = L.Trainer(callbacks=[callback], **(options | trainer))
    fitted.fit(policy, datamodule=data, ckpt_path=ckpt_path)
    return callback, fitted


@pytest.mark.usefixtures("varied")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_alone_and_the_engine_samples_from_base_and_adapter(model_dir, tmp_path, kind):
    model = adapted(**KINDS[kind])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    policy = PolicyModule(model, lr=1e-2, kl_coefficient=0.1)
    assert policy.reference is None, "the base is the reference: no second copy"
    callback, _ = fit(policy, model_dir, tmp_path / "run", accumulate_grad_batches=2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert [entry["train/logprob_diff_max"] < 1e-4 for entry in callback.history] == [True] * 3
    assert callback.history[0]["train/ref_kl"] == pytest.approx(0, abs=1e-6)
    assert callback.history[2]["train/ref_kl"] > 1e-4


@pytest.mark.usefixtures("varied")
def test_gradient_checkpointing_changes_no_weight_of_an_adapter(model_dir, tmp_path):
    ends = []
    for flag in (False, True):
        model = adapted()
        fit(PolicyModule(model, lr=1e-2, gradient_checkpointing=flag), model_dir, tmp_path / str(flag))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("varied")
@pytest.mark.parametrize("room", [0, 4], ids=["merged", "kept apart"])
def test_a_run_with_an_adapter_goes_on_from_its_checkpoint(model_dir, tmp_path, room):
    def engine():
        return FakeEngine(max_model_len=96, max_lora_rank=room)

    whole = adapted()
    fit(PolicyModule(whole, lr=1e-2), model_dir, tmp_path / "whole", engine=engine(), max_steps=4)
    first = PolicyModule(adapted(), lr=1e-2)
    _, trainer = fit(first, model_dir, tmp_path / "cut", engine=engine(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = adapted()
    again = {"max_steps": 4, "ckpt_path": tmp_path / "half.ckpt"}
    fit(PolicyModule(second, lr=1e-2), model_dir, tmp_path / "cut", engine=engine(), **again)
    for (name, one), (_, other) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_packed_row_under_an_adapter_is_what_each_sequence_is_alone():
    model = adapted(init_lora_weights=False)
    use_packed_attention(model)
    check_packing(model)
    whole = token_logprobs(model, packed_batch(mask=[[False, True, True], [False, True]]))
    merged = model.merge_and_unload()
    alone = token_logprobs(merged, packed_batch(mask=[[False, True, True], [False, True]]), max_logits=1)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_a_dropout_of_the_adapter_is_refused(model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"dropout 0\.1 .* lora_dropout=0\.0"):
        fit(PolicyModule(adapted(lora_dropout=0.1)), model_dir, tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: adapted(use_dora=True), r"q_proj has a variant of LoRA \(DoraLinearVariant\)"),
        (lambda: peft.get_peft_model(base(), peft.IA3Config(task_type="CAUSAL_LM")), "of the kind IA3"),
    ],
)
def test_an_adapter_that_is_no_sum_is_refused_before_a_rollout(model_dir, tmp_path, make, said):
    with pytest.raises(ConfigError, match=said):
        fit(PolicyModule(make()), model_dir, tmp_path / "run")


@pytest.mark.vllm
@pytest.mark.usefixtures("varied")
@pytest.mark.parametrize("room", [0, 4], ids=["merged", "kept apart"])
def test_an_adapter_trains_with_vllm(model_dir, tmp_path, room):
    model = adapted(**KINDS["head"])
    callback, _ = fit(
        PolicyModule(model, lr=1e-2, kl_coefficient=0.1),
        model_dir,
        tmp_path / "run",
        engine=VLLMEngine(max_model_len=96, max_num_seqs=16, max_lora_rank=room),
    )
    assert [entry["train/logprob_diff_max"] < 1e-4 for entry in callback.history] == [True] * 3
    assert all(entry["sync/canary_diff"] < 1e-4 for entry in callback.history)
    trained_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert (callback.history[-1]["sync/bytes"] == trained_bytes) == bool(room)
