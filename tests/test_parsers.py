"""What a sampled turn says to the agent. Nothing here can change what is trained on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.policy.parsers import ParsedMessage, ToolCall, parse_hermes

ADD = '<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", None, []),
        ("Hello", "Hello", []),
        ("  Hello \n", "  Hello \n", []),
        (ADD, None, [("add", '{"n": 2}')]),
        (f"I add.\n{ADD}", "I add.", [("add", '{"n": 2}')]),
        (f"a {ADD} b", "a  b", [("add", '{"n": 2}')]),
        (ADD + "\n" + ADD.replace("2", "3"), None, [("add", '{"n": 2}'), ("add", '{"n": 3}')]),
        ('<tool_call>{"name":"f"}</tool_call>', None, [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"n\\":  1}"}</tool_call>', None, [("f", '{"n":  1}')]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', None, [("f", "null")]),
        ('<tool_call>{"arguments": {"n": [1, "é"]}, "name": "f"}</tool_call>', None, [("f", '{"n": [1, "\\u00e9"]}')]),
    ],
)
def test_calls_are_taken_out_and_words_stay(text, content, calls):
    message = parse_hermes(text)
    assert message.content == content
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls
    assert message.reasoning is None


@pytest.mark.parametrize(
    "block",
    [
        "<tool_call>not JSON</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 7}</tool_call>',
        '<tool_call>{"name": "f"',
        "</tool_call>",
        "<tool_call></tool_call>",
    ],
)
def test_a_block_that_is_no_call_stays_in_the_words(block):
    message = parse_hermes(f"so: {block}")
    assert (message.content, message.tool_calls) == (f"so: {block}", [])


def test_a_call_beside_a_block_that_is_none_is_still_a_call():
    message = parse_hermes(f"<tool_call>oops</tool_call>{ADD}")
    assert message.content == "<tool_call>oops</tool_call>"
    assert message.tool_calls == [ToolCall(name="add", arguments='{"n": 2}')]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>two and two</think>4", "two and two", "4"),
        ("<think>\ntwo\n\nlines\n</think>\n\n4", "two\n\nlines", "4"),
        ("the template opened it</think>4", "the template opened it", "4"),
        ("<think></think>4", None, "4"),
        ("<think>only</think>", "only", None),
        ("<think>never closed", None, "<think>never closed"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_reasoning_is_what_stands_before_the_first_end_of_thought(text, reasoning, content):
    assert parse_hermes(text) == ParsedMessage(content=content, reasoning=reasoning)


def test_reasoning_and_calls_in_one_turn():
    message = parse_hermes(f"<think>I should add</think>\n{ADD}")
    assert (message.reasoning, message.content, len(message.tool_calls)) == ("I should add", None, 1)


def test_a_call_that_is_only_thought_of_is_not_made():
    message = parse_hermes(f"<think>maybe {ADD}</think>no")
    assert (message.tool_calls, message.content) == ([], "no")


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", "{", '"name"', ":", "x", "}", " "]))
)
def test_no_text_is_too_odd_to_be_parsed(pieces):
    message = parse_hermes("".join(pieces))
    assert all(isinstance(json.loads(call.arguments), object) for call in message.tool_calls)
    assert message.content != ""
