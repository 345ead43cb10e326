"""The tiny tokenizer and model keep what the rest of the suite takes for granted."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.policy.parsers import parse_hermes
from lightning_gym.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()

INCREMENT = {"type": "function", "function": {"name": "increment_counter", "arguments": '{"count": 7}'}}


def render(*messages, **options):
    return TOKENIZER.apply_chat_template(list(messages), tokenize=False, **options)


@settings(deadline=None)
@given(st.text())
def test_any_text_decodes_to_itself(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@settings(deadline=None)
@given(st.integers(min_value=0))
def test_every_digit_is_a_token_of_its_own(number):
    assert TOKENIZER.tokenize(str(number)) == list(str(number))
    assert [token for token in TOKENIZER.tokenize(f'{{"count": {number}}}') if token.isdigit()] == list(str(number))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=1))
def test_every_letter_between_spaces_is_a_token_of_its_own(letters):
    assert len(TOKENIZER.tokenize(" ".join(letters))) == len(letters)
    assert len(TOKENIZER.tokenize("reverse " + " ".join(letters))) == len(letters) + len(TOKENIZER.tokenize("reverse"))


def test_the_fixed_text_of_a_call_is_a_single_token():
    call = '<tool_call>\n{"name": "increment_counter", "arguments": {"count": 7}}\n</tool_call>'
    assert len(TOKENIZER.tokenize(call)) == 5
    assert TOKENIZER.tokenize(call)[2] == "7"


def test_training_the_tokenizer_again_gives_the_same_ids():
    corpus = ["the cat sat on the mat", "the dog sat on the log"]
    first, second = tiny_tokenizer(iter(corpus)), tiny_tokenizer(corpus)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_corpus_with_turn_markers_does_not_teach_their_spelling():
    tokenizer = tiny_tokenizer(["<|im_start|>x<|im_end|>", "<tool_call>y</tool_call>"] * 4)
    assert not {"<|im", "im_start", "tool_call", "im_"} & set(tokenizer.get_vocab())


def test_a_decoder_that_skips_special_tokens_keeps_the_call():
    text = render({"role": "assistant", "content": None, "tool_calls": [INCREMENT]})
    said = text.removeprefix("<|im_start|>assistant\n").removesuffix("\n")
    decoded = TOKENIZER.decode(TOKENIZER.encode(said), skip_special_tokens=True)
    assert decoded == said.removesuffix("<|im_end|>")
    assert [call.arguments for call in parse_hermes(decoded).tool_calls] == ['{"count": 7}']


def test_a_turn_ends_with_the_end_of_sequence_token():
    text = render({"role": "assistant", "content": "7"})
    assert text == "<|im_start|>assistant\n7<|im_end|>\n"
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


@pytest.mark.parametrize("arguments", ['{"count": 7}', {"count": 7}], ids=["as JSON text", "as a dict"])
def test_calls_of_one_turn_are_rendered_the_hermes_way(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "increment_counter", "arguments": arguments}}
    block = '<tool_call>\n{"name": "increment_counter", "arguments": {"count": 7}}\n</tool_call>'
    for content in (None, ""):
        turn = {"role": "assistant", "content": content, "tool_calls": [call, call]}
        assert render(turn) == f"<|im_start|>assistant\n{block}\n{block}<|im_end|>\n"
    turn = {"role": "assistant", "content": "I add.", "tool_calls": [call]}
    assert render(turn) == f"<|im_start|>assistant\nI add.\n{block}<|im_end|>\n"


def test_what_the_template_renders_is_what_the_parser_reads():
    message = parse_hermes(
        render({"role": "assistant", "content": "I add.", "tool_calls": [INCREMENT, INCREMENT]})
        .removeprefix("<|im_start|>assistant\n")
        .removesuffix("<|im_end|>\n")
    )
    assert message.content == "I add."
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [
        ("increment_counter", {"count": 7})
    ] * 2


@pytest.mark.parametrize(
    ("content", "text"),
    [("hi", "hi"), (None, ""), ([], ""), ([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], "hi")],
    ids=["text", "nothing", "no parts", "text parts"],
)
def test_content_may_be_text_or_parts_or_nothing(content, text):
    assert render({"role": "user", "content": content}) == f"<|im_start|>user\n{text}<|im_end|>\n"


def test_tools_change_nothing_and_empty_tool_calls_are_no_calls():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "tool_calls": []}]
    assert render(*messages, tools=[INCREMENT]) == render(*messages)
    assert "tool_call" not in render(*messages)


def test_a_conversation_renders_as_the_sum_of_its_messages():
    messages = [
        {"role": "user", "content": "add 7"},
        {"role": "assistant", "content": None, "tool_calls": [INCREMENT]},
        {"role": "tool", "content": '{"success":true}', "tool_call_id": "1"},
    ]
    assert render(*messages) == "".join(render(message) for message in messages)
    assert render(*messages, add_generation_prompt=True) == render(*messages) + "<|im_start|>assistant\n"


def test_the_default_model_has_about_a_million_parameters_in_fp32_and_its_seed_decides_them():
    import torch

    before = torch.get_rng_state()
    model, same, other = tiny_model(TOKENIZER), tiny_model(TOKENIZER), tiny_model(TOKENIZER, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.8e6 <= model.num_parameters() <= 3e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(model.state_dict()[name], other.state_dict()[name])


def test_the_embeddings_can_be_untied():
    model = tiny_model(TOKENIZER, tie_word_embeddings=False, num_layers=1, hidden_size=64)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_saved_model_loads_as_any_checkpoint_does(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(TOKENIZER, num_layers=1, hidden_size=64)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    text = render({"role": "user", "content": "add 1 then reverse a b c, später"}, add_generation_prompt=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.encode(text) == TOKENIZER.encode(text)
    assert tokenizer.chat_template == TOKENIZER.chat_template
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype="auto").eval()
    input_ids = torch.tensor([tokenizer.encode(text)])
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_importing_the_module_imports_no_torch():
    code = "import sys, lightning_gym.testing; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
