"""What a chat template writes, where its turns end, and which templates cannot be trained on."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lightning_gym.errors import ConfigError
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.testing import tiny_tokenizer

LLAMA = (
    "{{- '<|begin_of_text|>' -}}{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
GEMMA = (
    "{{- '<bos>' -}}{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- set role = 'model' if message.role == 'assistant' else message.role -%}"
    "{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)
LLAMA_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
HELLO = [{"role": "user", "content": "Hello"}]


def saved(directory, *, template, special=(), eos=None):
    """A directory with the tiny tokenizer, that template and these special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def chat(policy_dir):
    return ChatFormat(policy_dir)


# -- where turns end


@pytest.mark.parametrize(
    ("template", "special", "eos", "turn_end"),
    [
        (tiny_tokenizer().chat_template, [], None, "<|im_end|>"),
        (tiny_tokenizer().chat_template, [], "<|endoftext|>", "<|im_end|>"),
        (LLAMA, LLAMA_TOKENS, "<|endoftext|>", "<|eot_id|>"),
        (GEMMA, GEMMA_TOKENS, "<|endoftext|>", "<end_of_turn>"),
    ],
    ids=["ChatML", "ChatML on a base tokenizer", "Llama 3", "Gemma"],
)
def test_the_turn_end_is_what_the_template_writes_and_not_the_tokenizers_eos(
    tmp_path, template, special, eos, turn_end
):
    chat = ChatFormat(saved(tmp_path, template=template, special=special, eos=eos))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (chat.turn_end_text, chat.turn_end_id) == (turn_end, tokenizer.convert_tokens_to_ids(turn_end))
    assert set(chat.stop_ids) == {chat.turn_end_id, tokenizer.eos_token_id}
    assert len(chat.stop_ids) == (1 if eos is None else 2)


def test_a_tokenizer_without_an_end_of_text_stops_at_turn_ends_alone(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    chat = ChatFormat(tmp_path)
    assert chat.stop_ids == (chat.turn_end_id,)


def test_a_model_without_a_chat_template_is_refused_with_what_to_do(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no chat template.*add `chat_template.jinja`"):
        ChatFormat(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
    ],
    ids=["a line end", "nothing", "no assistant"],
)
def test_a_template_that_does_not_end_the_assistants_turn_with_a_special_token_is_refused(tmp_path, template):
    with pytest.raises(ConfigError, match="expected a special token"):
        ChatFormat(saved(tmp_path, template=template))


# -- rendering


def test_messages_are_rendered_by_the_template(chat):
    assert chat.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"n":  7}', '{"n": 7}'), ({"n": 7}, '{"n": 7}'), ("not json", "{}"), ("", "{}")],
    ids=["JSON text", "an object", "no JSON", "nothing"],
)
def test_tool_call_arguments_reach_the_template_as_objects(chat, arguments, text):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    rendered = chat.render([{"role": "assistant", "content": None, "tool_calls": [call]}], add_generation_prompt=False)
    body = f'<tool_call>\n{{"name": "add", "arguments": {text}}}\n</tool_call>'
    assert rendered == f"<|im_start|>assistant\n{body}<|im_end|>\n"


def test_nulls_empty_calls_and_foreign_keys_do_not_reach_the_template(tmp_path):
    template = (
        "{% for m in messages %}{{ m.items() | map('first') | sort | join(',') }}:{{ m.content }}"
        "{{ '<|im_end|>' }}{% endfor %}"
    )
    chat = ChatFormat(saved(tmp_path, template=template))
    message = {"role": "assistant", "content": None, "tool_calls": [], "prompt_token_ids": [1], "refusal": None}
    assert chat.render([message]) == "content,role:<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_a_config_error_with_its_words(tmp_path):
    chat = ChatFormat(saved(tmp_path, template=GEMMA, special=GEMMA_TOKENS))
    with pytest.raises(ConfigError, match="refused the conversation: System role not supported"):
        chat.render([{"role": "system", "content": "x"}])


def test_tools_and_template_arguments_are_passed_on(tmp_path):
    template = "{{ tools | length if tools else 'none' }} {{ style }}{{ messages[-1].content }}<|im_end|>"
    chat = ChatFormat(saved(tmp_path, template=template))
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert chat.render(HELLO, [tool], {"style": "short "}) == "1 short Hello<|im_end|>"
    assert chat.render(HELLO, []) == "none Hello<|im_end|>"


# -- what comes after a turn


@pytest.mark.parametrize(
    ("template", "special", "after"),
    [
        (
            tiny_tokenizer().chat_template,
            [],
            "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA,
            LLAMA_TOKENS,
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>" + LLAMA_PROMPT,
        ),
        (GEMMA, GEMMA_TOKENS, "<end_of_turn>\n<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n"),
    ],
    ids=["ChatML", "Llama 3", "Gemma"],
)
def test_the_text_after_a_turn_is_cut_from_the_template(tmp_path, template, special, after):
    chat = ChatFormat(saved(tmp_path, template=template, special=special))
    messages = [*HELLO, {"role": "assistant", "content": "  Hi <b>  "}, {"role": "user", "content": "more"}]
    assert chat.render_after(messages, 1) == after


def test_a_template_that_writes_the_words_twice_or_never_has_no_text_after_them(tmp_path):
    twice = "{% for m in messages %}{{ m.content }}<|im_end|>{{ m.content if loop.index == 2 and loop.length > 2 }}"
    chat = ChatFormat(saved(tmp_path / "twice", template=twice + "{% endfor %}"))
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "more"}]
    assert chat.render_after(messages, 1) is None
    last = "{{ messages[-1].content }}<|im_end|>"
    assert ChatFormat(saved(tmp_path / "never", template=last)).render_after(messages, 1) is None


# -- ids and words


@pytest.mark.parametrize("text", ["", "Hello", "<|im_end|>\n", "größe 東京 42", "<tool_call>"])
def test_text_is_encoded_without_added_tokens_and_decodes_to_itself(chat, text):
    assert chat.decode(chat.encode(text)) == text


def test_a_tokenizer_that_begins_texts_with_a_token_of_its_own_adds_none_to_template_text(tmp_path):
    tokenizer = tiny_tokenizer()
    begin = [("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=begin)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("x")[0] == begin[0][1]
    chat = ChatFormat(tmp_path)
    assert chat.decode(chat.encode("x")) == "x"


def test_special_tokens_in_text_are_their_ids(chat):
    assert chat.encode("<|im_end|>") == [chat.turn_end_id]


def test_a_sampled_turn_is_parsed_without_its_end_and_with_every_other_special_token(chat):
    ids = chat.encode("a<|im_start|>b")
    assert chat.parse([*ids, chat.turn_end_id]).content == "a<|im_start|>b"
    assert chat.parse(ids).content == "a<|im_start|>b"
    assert chat.parse([*ids, chat.turn_end_id, chat.turn_end_id]).content == "a<|im_start|>b<|im_end|>"
    assert chat.parse([chat.turn_end_id]).content is None
    assert chat.parse([]).content is None
