"""Special tokens that people and tools spell out stay text; those that the template writes are control tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from lightning_gym.errors import ConfigError
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.control_tokens import ControlTokens
from lightning_gym.template_families import FAMILIES, family_tokenizer, save_family
from lightning_gym.testing import tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory):
    return save_family(family, tmp_path_factory.mktemp(family.name))


@pytest.fixture(scope="module")
def chat(directory):
    return ChatFormat(directory)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def ids_of(chat, messages, tools=None):
    return chat.encode(chat.render(messages, tools))


def control_tokens(chat, ids):
    """The special tokens among `ids`, in order."""
    return [token_id for token_id in ids if token_id in chat._control.ids]


def conversation_of(family, text):
    """A conversation in which everybody says `text`, as far as the family's template has a place for them."""
    call = {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": {"n": text, text: 1}}}
    told = [{"role": "system", "content": text}] if family.system else []
    called = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": "123456789"},
    ]
    answered = {"role": "assistant", "content": text}
    asked = {"role": "user", "content": text}
    return [*told, asked, *(called if family.tools else []), answered, asked]


def tools_of(family, text):
    if not family.tools:
        return None
    properties = {"n": {"type": "string", "enum": [text], "description": f"of {text}"}}
    return [{"type": "function", "function": {"name": "add", "description": text, "parameters": properties}}]


# -- what is typed


def test_no_special_token_that_anybody_types_becomes_a_control_token(family, chat, tokenizer):
    for token in (family.turn_end, family.special[0], "<|endoftext|>"):
        said = f"a{token}b"
        typed = ids_of(chat, conversation_of(family, said), tools_of(family, said))
        plain = ids_of(chat, conversation_of(family, "axb"), tools_of(family, "axb"))
        assert control_tokens(chat, typed) == control_tokens(chat, plain)
        rendered = tokenizer.apply_chat_template(
            [chat._control.mark(m) | m for m in conversation_of(family, said)],
            tools=tools_of(family, said),
            tokenize=False,
            add_generation_prompt=True,
        )
        assert chat.decode(typed) == rendered


def test_every_special_token_is_kept_text(family, chat):
    typed = "".join(AutoTokenizer.from_pretrained(chat._tokenizer.name_or_path).all_special_tokens) * 2
    ids = ids_of(chat, [{"role": "user", "content": typed}])
    assert control_tokens(chat, ids) == control_tokens(chat, ids_of(chat, [{"role": "user", "content": "x"}]))
    assert typed in chat.decode(ids)


def test_typed_special_tokens_are_spelled_in_the_tokens_of_ordinary_text(tokenizer, chat, family):
    typed = f"x {family.turn_end} y"
    marked = chat._control.mark(typed)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    ordinary = tokenizer.backend_tokenizer.encode(typed, add_special_tokens=False).ids
    assert chat.encode(marked) == ordinary
    assert chat.encode(f"x {family.turn_end} y") != ordinary  # a text of the client's own means what it says


def test_a_special_token_cannot_be_spelled_in_parts(tmp_path):
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.replace(
        "{% for p in m.content %}", "{% for p in ([{'text': m.content}] if m.content is string else m.content) %}"
    )
    tokenizer.save_pretrained(tmp_path)
    chat = ChatFormat(tmp_path)
    parts = [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>b"}]
    ids = ids_of(chat, [{"role": "user", "content": parts}])
    assert control_tokens(chat, ids) == [chat.turn_end_id]
    assert chat.decode(ids) == "a<|im_end|>b<|im_end|>"


def test_a_template_may_split_what_was_said_at_a_special_token_and_write_the_token_itself(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% set p = m.content.split('</think>') %}"
        "{{ p[0] + '\\n</think>\\n' + p[1] if p | length > 1 else m.content }}{{ '<|im_end|>' }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    chat = ChatFormat(tmp_path)
    ids = ids_of(chat, [{"role": "assistant", "content": "hm</think>4<|im_end|>"}])
    assert chat.decode(ids) == "hm\n</think>\n4<|im_end|><|im_end|>"
    assert control_tokens(chat, ids) == [tokenizer.convert_tokens_to_ids("</think>"), chat.turn_end_id]


def test_added_tokens_that_are_not_special_are_recognised_wherever_they_stand(chat, tokenizer):
    call = tokenizer.convert_tokens_to_ids("<tool_call>")
    said = [{"role": "user", "content": f"<tool_call> and {chat.turn_end_text}"}]
    assert call in ids_of(chat, said)
    assert call in ids_of(chat, [{"role": "user", "content": "<tool_call>"}])


def test_the_arguments_of_a_template_are_its_own(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ end or '<|im_end|>' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    chat = ChatFormat(tmp_path)
    text = chat.render([{"role": "user", "content": "x"}], template_kwargs={"end": "<|endoftext|>"})
    assert control_tokens(chat, chat.encode(text)) == [tokenizer.convert_tokens_to_ids("<|endoftext|>")]


# -- what is not typed


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=30)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_without_typed_special_tokens_the_ids_are_those_of_the_tokenizers_own_template(data, family, chat, tokenizer):
    said = data.draw(TEXTS.filter(lambda text: text.strip() and not chat._control._typed.search(text)))
    messages, tools = conversation_of(family, said), tools_of(family, said)
    expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert ids_of(chat, messages, tools) == expected


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_where_something_was_typed_the_rest_is_tokenized_as_ever(data, family, chat):
    """The careful way of encoding gives what the fast one gives, on every text that the template may write."""
    special = st.sampled_from([token.content for token in chat._control._special.values()])
    text = "".join(data.draw(st.lists(TEXTS | special, max_size=6)))
    fast = chat._tokenizer.encode(text, add_special_tokens=False)
    assert chat.encode(text + chat._control._close + chat._control._open) == fast


def test_texts_in_which_nothing_was_typed_are_passed_on_as_they_are(chat):
    message = {"role": "user", "content": "a < b, and [1] {2}", "n": [1, None, {"k": True}]}
    assert chat._control.mark(message) == message


# -- tokens that swallow or need their surroundings


def tokenizer_with(*tokens, normalizer=None):
    tokenizer = tiny_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<e>", special=True, normalized=False, rstrip=True),
        AddedToken("<e>", special=True, normalized=False, lstrip=True),
        AddedToken("<e>", special=True, normalized=False, single_word=True),
        AddedToken("<e>", special=True, normalized=True),
    ],
    ids=["swallows what follows", "swallows what precedes", "stands alone", "is looked for after normalisation"],
)
@pytest.mark.parametrize("text", ["a <e> b", "a<e>b", " <e><e> ", "<e>", "a<|im_end|><e>"])
def test_tokens_with_ways_of_their_own_keep_them_where_the_template_writes_them(token, text):
    tokenizer = tokenizer_with(token, normalizer=normalizers.NFKC())
    control = ControlTokens(tokenizer)
    typed = control.mark("<|endoftext|>")
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert control.encode(text + typed)[: len(expected)] == expected
    assert len(control.encode(text + typed)) > len(expected)


def test_text_that_only_normalisation_turns_into_a_special_token_stays_text():
    tokenizer = tokenizer_with(AddedToken("<s>", special=True, normalized=True), normalizer=normalizers.NFKC())
    (special,) = tokenizer.encode("\uff1cs\uff1e", add_special_tokens=False)
    control = ControlTokens(tokenizer)
    ids = control.encode(control.mark("\uff1cs\uff1e") + "<|im_end|>")
    assert special not in ids
    assert tokenizer.decode(ids) == "<s><|im_end|>"


def test_overlapping_special_tokens_do_not_hide_in_each_other():
    tokenizer = tokenizer_with("<a|b>", "b>c", "|b")
    control = ControlTokens(tokenizer)
    typed = "<a|b>c |b <a|b>b>c"
    ids = control.encode(control.mark(typed))
    assert tokenizer.decode(ids) == typed
    assert control.ids.isdisjoint(ids)


@pytest.mark.parametrize("token", ['"end"', "\\end", "\nend\n", "\uff5cend\uff5c"])
def test_a_special_token_is_seen_however_json_writes_its_first_character(token):
    tokenizer = tokenizer_with(token)
    control = ControlTokens(tokenizer)
    (message,) = control.mark([{"role": "user", "content": f"a{token}b"}])
    ids = control.encode(message["content"])
    assert tokenizer.decode(ids) == f"a{token}b"
    assert control.ids.isdisjoint(ids)


def test_a_mark_cannot_be_typed():
    one, other = ControlTokens(tiny_tokenizer()), ControlTokens(tiny_tokenizer())
    assert one.mark("<|im_end|>") != other.mark("<|im_end|>")
    assert one.encode(other.mark("x<|im_end|>"))[-1] != one.encode("<|im_end|>")[0]


# -- what is no text


def test_a_lone_surrogate_is_refused_with_its_place(chat):
    text = chat.render([{"role": "user", "content": "ab\ud800c"}])
    with pytest.raises(ConfigError, match=r"lone surrogate, '\\ud800' at character \d+") as refused:
        chat.encode(text)
    assert str(refused.value).encode()
    with pytest.raises(ConfigError, match="lone surrogate"):
        chat.encode(chat.render([{"role": "user", "content": f"\udfff{chat.turn_end_text}"}]))


def test_a_pair_of_surrogates_sent_as_two_characters_is_refused_too(chat):
    with pytest.raises(ConfigError, match="lone surrogate"):
        chat.encode("\ud83d\ude00")


def test_the_familys_tokenizer_would_begin_a_text_with_a_token_that_the_template_writes_too(family):
    tokenizer = family_tokenizer(family)
    begins = tokenizer.encode("x")[0] == tokenizer.bos_token_id if family.bos else False
    assert begins == (family.bos is not None)
