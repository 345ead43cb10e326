"""What a template writes after a message is the same text whether or not the conversation before it is written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.policy.tail import TailTemplate, _compile_jinja_template, tail_template
from lightning_gym.template_families import FAMILIES
from lightning_gym.testing import CHAT_TEMPLATE

MARK = "<the mark>"
TEMPLATES = {"tiny": CHAT_TEMPLATE} | {name: family.template for name, family in FAMILIES.items()}
WORDS_ONLY = {name for name, family in FAMILIES.items() if not family.tools}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def whole(template, messages, **variables):
    """The text after the mark of everything that a template writes."""
    text = _compile_jinja_template(template).render(messages=messages, **VARIABLES, **variables)
    _, mark, after = text.partition(MARK)
    return after if mark and MARK not in after else None


def after(template, messages, index, **variables):
    return tail_template(template).after(MARK, messages, index, **VARIABLES, **variables)


@st.composite
def conversations(draw, words_only):
    """Questions, answers, calls and results in an order that every family takes; one of the answers is the mark."""
    text = st.sampled_from(["", "a", " b\n", "<think>hm</think>c", MARK[:4], "\u2063", "東京"])
    messages = [{"role": "system", "content": draw(text)}] if not words_only and draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(text)})
        for number in range(draw(st.integers(0, 0 if words_only else 3))):
            call = {"id": f"call{turn:03}{number:02}", "type": "function"}
            function = {"name": "add", "arguments": {"n": draw(st.integers(0, 9))}}
            said = {"role": "assistant", "content": draw(text), "tool_calls": [call | {"function": function}]}
            messages += [said, {"role": "tool", "content": json.dumps(number), "tool_call_id": call["id"]}]
        messages.append({"role": "assistant", "content": draw(text)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(text)})
    index = draw(st.sampled_from([i for i, m in enumerate(messages) if m["role"] == "assistant"]))
    return [*messages[:index], messages[index] | {"content": MARK}, *messages[index + 1 :]], index


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_text_after_a_mark_is_that_of_the_whole_conversation(name, data):
    template = TEMPLATES[name]
    messages, index = data.draw(conversations(name in WORDS_ONLY))
    tools = data.draw(st.sampled_from([TOOLS, None]))
    assert tail_template(template).passes_over
    assert after(template, messages, index, tools=tools) == whole(template, messages, tools=tools)


def test_bodies_of_earlier_messages_are_passed_over():
    template = "{% for m in messages %}{{ m.content }}{{ raise_exception('seen') if m.role == 'user' }}{% endfor %}."
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    assert TailTemplate(template).after(MARK, messages, 1) == "."
    with pytest.raises(Exception, match="seen"):
        TailTemplate(template).after(MARK, messages, 0)


def test_what_only_writes_before_the_messages_is_dropped_unless_it_may_refuse_them():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    header = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{{ messages[0].content }}"
    unprintable = [object()]
    assert TailTemplate(header + LOOP).after(MARK, messages, 1, tools=unprintable) == ""
    kept = "{% set n = tools | length %}" + LOOP.replace("BODY", "{{ n }}")
    assert TailTemplate(header + kept).after(MARK, [*messages, messages[0]], 1, tools=[1, 2]) == "2a"
    refusing = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + LOOP
    with pytest.raises(Exception, match="no"):
        TailTemplate(refusing).after(MARK, messages, 1)


LOOP = "{% for m in messages %}BODY{{ m.content }}{% endfor %}"
CARRYING = {
    "a namespace": "{% set n = namespace(k=0) %}" + LOOP.replace("BODY", "{% set n.k = n.k + 1 %}{{ n.k }}"),
    "a namespace of the same name in the loop": "{% set n = namespace(k=0) %}"
    + LOOP.replace("BODY", "{% if loop.first %}{% set n = namespace(k=9) %}{% endif %}{% set n.k = 1 %}{{ n.k }}"),
    "a namespace changed by a macro": "{% set n = namespace(k=0) %}"
    "{% macro count() %}{% set n.k = n.k + 1 %}{{ n.k }}{% endmacro %}" + LOOP.replace("BODY", "{{ count() }}"),
    "a joiner": "{% set comma = joiner() %}" + LOOP.replace("BODY", "{{ comma() }}"),
    "a cycler": "{% set turn = cycler('a', 'b') %}" + LOOP.replace("BODY", "{{ turn.next() }}"),
    "loop.changed": LOOP.replace("BODY", "{{ '<new>' if loop.changed(m.role) }}"),
    "the loop itself": "{% macro at(l) %}{{ l.changed(1) }}{% endmacro %}" + LOOP.replace("BODY", "{{ at(loop) }}"),
    "a lazy filter": "{% set roles = messages | map(attribute='role') %}"
    + LOOP.replace("BODY", "{% for r in roles %}{{ r }}{% endfor %}"),
    "a break": LOOP.replace("BODY", "{% if m.content == 'b' %}{% break %}{% endif %}"),
    "the last message first": LOOP.replace("BODY", "").replace("messages", "messages | reverse"),
    "the last message first, by a slice": LOOP.replace("BODY", "").replace("messages", "messages[::-1]"),
    "the last message first, by a name": "{% set turned = messages[::-1] %}"
    + LOOP.replace("BODY", "").replace("messages", "turned"),
    "a text of its own": "{% set text %}" + LOOP.replace("BODY", "") + "{% endset %}{{ text | length }}{{ text }}",
    "a filter block": "{% filter upper %}" + LOOP.replace("BODY", "") + "{% endfilter %}",
    "a macro": "{% macro all() %}" + LOOP.replace("BODY", "") + "{% endmacro %}{{ all() }}",
    "a recursive loop": "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
    "several at once": "{% for a in messages | batch(2) %}{% for m in a %}{{ m.content }}{% endfor %}{% endfor %}",
    "a block": "{% block b %}" + LOOP.replace("BODY", "") + "{% endblock %}",
}


@pytest.mark.parametrize("template", CARRYING.values(), ids=CARRYING)
def test_a_template_that_may_carry_something_from_message_to_message_is_rendered_whole(template):
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", MARK), ("user", "c"))]
    assert not TailTemplate(template).passes_over
    assert after(template, messages, 1) == whole(template, messages)


def test_a_loop_that_writes_the_mark_before_the_last_loop_is_rendered_whole():
    template = LOOP.replace("BODY", "") + "|{% for m in messages %}{{ m.role }}{% endfor %}"
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", MARK), ("user", "c"))]
    assert TailTemplate(template).passes_over
    assert after(template, messages, 1) == whole(template, messages) == "c|userassistantuser"


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", LOOP.replace("BODY", "{{ m.content }}")])
def test_a_mark_that_is_not_written_once_has_no_text_after_it(template):
    assert after(template, [{"role": "assistant", "content": MARK}], 0) is None
