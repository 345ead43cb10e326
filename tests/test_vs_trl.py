"""What the arms of the comparison with TRL share: equal prompts, forced lengths, a model that does not stop."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import vs_trl
from benchmarks._vs_trl_workload import Workload, reward_of
from lightning_gym.logprobs import check_packing
from lightning_gym.packed_attention import use_packed_attention


def test_a_workload_is_read_as_it_was_written(tmp_path):
    workload = Workload(name="w", lengths=(3, 1), group_size=2, steps=4)
    workload.save(tmp_path)

    assert Workload.load(tmp_path) == workload


def test_prompts_have_one_length_and_lengths_the_ratio_that_is_said(tmp_path):
    vs_trl.save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    equal, ragged = vs_trl.WORKLOADS

    assert len({len(tokenizer.encode(prompt)) for prompt in equal.prompts()}) == 1
    assert len(set(equal.lengths)) == 1
    assert max(ragged.lengths) == 8 * min(ragged.lengths)
    assert {len(workload.lengths) * workload.group_size for workload in vs_trl.WORKLOADS} == {128}


def test_the_model_never_ends_a_turn_and_packs(tmp_path):
    vs_trl.save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    use_packed_attention(model)

    check_packing(model)
    with torch.no_grad():
        logits = model(
            torch.randint(model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
        ).logits
    assert logits.softmax(-1)[..., model.config.eos_token_id].max() < 1e-6


def test_the_reward_differs_with_the_ids():
    assert [reward_of(ids) for ids in ([2, 4], [1, 2], [1, 3], [])] == [1.0, 0.5, 0.0, 0.0]
