"""What a sampled turn says to the agent. Nothing here can change what is trained on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.policy.parsers import ParsedMessage, ToolCall, TurnParser, parse_hermes, read_calls, read_thought

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


# -- parsers one by one


def test_what_no_parser_is_named_for_stays_in_the_content():
    text = f"<think>hm</think>{ADD}"
    assert TurnParser(None, None).parse(text, {}) == ParsedMessage(content=text)
    assert TurnParser(None, None).parse("", {}) == ParsedMessage(content=None)
    assert TurnParser(read_thought, None).parse(text, {}) == ParsedMessage(content=ADD, reasoning="hm")
    assert TurnParser(None, read_calls).parse(text, {}).content == "<think>hm</think>"


def test_a_turn_that_a_parser_gives_up_on_is_content_as_a_whole_counted_and_told_once(caplog):
    def gives_up(text, _request):
        raise IndexError("no such group")

    for parser in (TurnParser(gives_up, read_calls), TurnParser(read_thought, gives_up)):
        caplog.clear()
        for turn in (1, 2):
            assert parser.parse("<think>hm</think>4", {}) == ParsedMessage(content="<think>hm</think>4")
            assert parser.num_unparsed == turn
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            "a parser failed on a sampled turn, which goes to the agent as it is: IndexError('no such group')"
        ]


def test_a_parser_is_told_what_was_asked():
    asked = []
    TurnParser(None, lambda text, request: (asked.append(request), (text, []))[1]).parse("x", {"tools": [1]})
    assert asked == [{"tools": [1]}]
