"""The splice: later prompts are the emitted ids where a request provably goes on, and an honest re-rendering elsewhere.

Each test plays a first call by hand and asks what prompt a second request gets.
"""

import json

import pytest

from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.splice import Beginnings
from lightning_gym.testing import tiny_tokenizer
from tests.game import END, START, Game, spelled, tool, user, words

ADD = '<tool_call>\n{"name": "add", "arguments": {"n":   7, "who": "\\u00e9"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

# Drops the reasoning of every turn before the last user message, as Qwen3's template does.
STRIPPING = """\
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}{%- if message.role == "user" -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {{- "<|im_start|>" + message.role + "\\n" -}}
  {%- if message.reasoning_content and loop.index0 > last.user -%}
    {{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" -}}
  {%- endif -%}
  {{- message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


@pytest.fixture
def game(policy_dir):
    return Game(ChatFormat(policy_dir))


# -- it goes on


def test_a_first_request_is_rendered_whole_and_breaks_nothing(game):
    spliced = game.splice(START)
    assert spliced.prompt_ids == game.whole(START)
    assert (spliced.num_encoded, spliced.broke) == (len(spliced.prompt_ids), None)


def test_the_next_attempt_of_a_group_begins_with_the_same_ids_and_nothing_is_encoded(game):
    first, second = game.splice(START), game.splice(START)
    assert second.prompt_ids == first.prompt_ids == game.whole(START)
    assert (second.num_encoded, second.broke) == (0, None)
    second.prompt_ids.append(END)
    assert game.splice(START).prompt_ids == first.prompt_ids


def test_a_beginning_with_other_tools_or_template_arguments_is_another_one(game):
    game.splice(START)
    assert game.splice(START, tools=TOOLS).num_encoded > 0
    assert game.splice(START, chat_template_kwargs={"enable_thinking": False}).num_encoded > 0
    assert game.splice([*START[:-1], START[-1] | {"name": "ada"}]).num_encoded > 0


def test_beginnings_are_forgotten_oldest_first_when_they_hold_too_many_tokens():
    beginnings = Beginnings(max_tokens=5)
    old, new, newest = ((name, b"", b"") for name in (b"old", b"new", b"newest"))
    beginnings.add(old, [1, 2, 3])
    beginnings.add(new, [4, 5])
    assert beginnings.get(old) == [1, 2, 3]
    beginnings.add(newest, [6])
    assert (beginnings.get(old), beginnings.get(new), beginnings.get(newest)) == (None, [4, 5], [6])


@pytest.mark.parametrize("answer", ["1", "<|im_end|>", "", "größe 東京", "a<|im_start|>b"])
def test_a_request_that_goes_on_gets_the_emitted_ids_and_only_the_new_text_is_encoded(game, answer):
    sampled = [*spelled(game, "assistant\n"), END]
    reply = game.play(START, sampled)
    spliced = game.splice([*START, reply, user(answer)])
    tail = game.chat.encode("\n" + game.chat.render([user(answer)]))
    assert spliced.prompt_ids == [*game.emitted(), *tail]
    assert (spliced.num_encoded, spliced.broke) == (len(tail), None)
    assert game.chat.encode(game.chat.decode(sampled)) != sampled


def test_a_turn_cut_by_its_token_limit_is_ended_by_the_templates_own_turn_end(game):
    reply = game.play(START, game.chat.encode("Hi there"))
    spliced = game.splice([*START, reply, user("more")])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode("<|im_end|>" + words(user("more")))]
    assert spliced.broke is None


def test_a_turn_that_ended_with_the_other_stop_id_is_still_closed_by_the_turn_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    game = Game(ChatFormat(tmp_path))
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    reply = game.play(START, [*game.chat.encode("Hi"), end_of_text])
    assert reply["content"] == "Hi"
    spliced = game.splice([*START, reply, user("more")])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode("<|im_end|>" + words(user("more")))]


def test_three_turns_grow_one_sequence(game):
    messages = START
    for text in ("one", "two", "three"):
        before = game.emitted() if game.served else []
        reply = game.play(messages, [*game.chat.encode(text), 12, END])
        messages = [*messages, reply, user(f"after {text}")]
        assert game.emitted()[: len(before)] == before
    assert game.splice(messages).broke is None


def test_a_client_that_sends_no_ids_back_goes_on_all_the_same(game):
    reply = game.play(START, [10, 11, END])
    plain = {key: value for key, value in reply.items() if key not in wire.TOKEN_BUNDLE}
    spliced = game.splice([*START, plain, user("more")])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(user("more")))]


def test_what_gym_adds_or_trims_on_an_assistant_message_makes_no_difference(game):
    reply = game.play(START, [*game.chat.encode(" Hi \n"), END])
    assert reply["content"] == " Hi \n"
    for changed in (
        reply | {"content": "Hi"},
        reply | {"content": [{"type": "text", "text": "Hi"}], "tool_calls": []},
        reply | {"refusal": None, "tool_calls": None},
    ):
        assert game.splice([*START, changed, user("more")]).broke is None


def test_a_prompt_as_parts_is_the_prompt_as_text(game):
    reply = game.play(START, [10, END])
    parts = [START[0], user([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}])]
    assert game.splice([*parts, reply, user("more")]).broke is None


def test_a_tool_call_in_words_that_the_template_would_not_write_keeps_its_ids(game):
    reply = game.play(START, ADD + "<|im_end|>", tools=TOOLS)
    messages = [*START, reply, tool("7")]
    spliced = game.splice(messages, tools=TOOLS)
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(tool("7")))]
    assert spliced.broke is None
    assert spliced.prompt_ids != game.whole(messages)


@pytest.mark.parametrize(
    "rewrite",
    [
        json.dumps,
        lambda a: json.dumps(a, separators=(",", ":")),
        lambda a: json.dumps(a, ensure_ascii=False),
        lambda a: json.dumps(dict(reversed(a.items()))),
        lambda a: a,
    ],
    ids=["the same", "no spaces", "letters", "other order", "an object"],
)
def test_tool_call_arguments_that_the_client_wrote_anew_do_not_matter_to_the_ids(game, rewrite):
    reply = game.play(START, ADD + "<|im_end|>")
    call = reply["tool_calls"][0]
    arguments = rewrite(json.loads(call["function"]["arguments"]))
    again = reply | {"tool_calls": [call | {"function": {"name": "add", "arguments": arguments}}]}
    spliced = game.splice([*START, again, tool("7")])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(tool("7")))]
    assert spliced.broke is None


def test_tool_call_arguments_that_say_something_else_open_a_new_segment(game):
    reply = game.play(START, ADD + "<|im_end|>")
    for arguments in ('{"n": 8, "who": "é"}', '{"n": 7}', "not JSON"):
        call = reply["tool_calls"][0] | {"function": {"name": "add", "arguments": arguments}}
        messages = [*START, reply | {"tool_calls": [call]}, tool("7")]
        opened(game, game.splice(messages), "edited_history", messages)


def test_arguments_that_are_no_json_are_compared_as_they_are(game):
    words_of_call = '<tool_call>{"name": "add", "arguments": "n = 7"}</tool_call><|im_end|>'
    reply = game.play(START, words_of_call)
    assert reply["tool_calls"][0]["function"]["arguments"] == "n = 7"
    assert game.splice([*START, reply, tool("7")]).broke is None


def test_two_tool_results_follow_each_other(game):
    reply = game.play(START, ADD + ADD + "<|im_end|>")
    results = [tool("7", "call-0"), tool("8", "call-1")]
    spliced = game.splice([*START, reply, *results])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(*results))]


def test_reasoning_that_the_template_drops_from_earlier_turns_stays_in_the_ids(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRIPPING
    tokenizer.save_pretrained(tmp_path)
    game = Game(ChatFormat(tmp_path))
    reply = game.play(START, "<think>\nhm\n</think>\n\nHi<|im_end|>")
    assert (reply["reasoning_content"], reply["content"]) == ("hm", "Hi")
    messages = [*START, reply, user("more")]
    assert "hm" not in game.chat.render(messages)
    spliced = game.splice(messages)
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(user("more")))]
    assert spliced.broke is None
    second = game.play(messages, "<think>\nho\n</think>\n\nHo<|im_end|>")
    third = game.splice([*messages, second, user("on")])
    assert third.prompt_ids == [*game.emitted(), *game.chat.encode(words(user("on")))]


# -- it does not


def opened(game, spliced, kind, messages, **request):
    assert spliced.prompt_ids == game.whole(messages, **request)
    assert spliced.num_encoded == len(spliced.prompt_ids)
    assert (spliced.broke.kind, spliced.broke.call_index) == (kind, len(game.served))


def test_an_edited_history_is_rendered_anew_and_says_where_it_differs(game):
    reply = game.play(START, [*game.chat.encode("Hi"), END])
    messages = [START[0], user("Hello!"), reply, user("more")]
    spliced = game.splice(messages)
    opened(game, spliced, "edited_history", messages)
    assert spliced.broke.detail.startswith("message 1: the earlier turn had ('user', 'Hello'")
    assert "'Hello!'" in spliced.broke.detail


@pytest.mark.parametrize(
    "edit",
    [
        lambda start, reply: [*start, reply | {"content": "Ho"}, user("more")],
        lambda start, reply: [start[1], reply, user("more")],
        lambda start, reply: [*start, user("more")],
        lambda start, reply: [start[0], user("summary of all that")],
        lambda start, reply: [*start, {"role": "assistant", "content": "injected"}, reply, user("more")],
        lambda start, reply: [
            *start,
            reply | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            tool("1"),
        ],
    ],
    ids=["its words", "no system", "turn dropped", "compacted", "assistant text injected", "a call added"],
)
def test_every_edit_opens_a_new_segment(game, edit):
    reply = game.play(START, [*game.chat.encode("Hi"), END])
    messages = edit(START, reply)
    opened(game, game.splice(messages), "edited_history", messages)


def test_other_tools_or_template_arguments_open_a_new_segment(game):
    reply = game.play(START, [*game.chat.encode("Hi"), END], tools=TOOLS)
    messages = [*START, reply, user("more")]
    assert game.splice(messages, tools=TOOLS).broke is None
    opened(game, game.splice(messages), "changed_tools", messages)
    spliced = game.splice(messages, tools=TOOLS, chat_template_kwargs={"enable_thinking": False})
    opened(game, spliced, "changed_tools", messages, tools=TOOLS)


def test_ids_that_were_never_given_open_a_new_segment(game):
    reply = game.play(START, [*game.chat.encode("Hi"), END])
    for fabricated in (
        reply | {wire.GENERATION_TOKEN_IDS: [9, 9, END]},
        reply | {wire.PROMPT_TOKEN_IDS: [1, 2, 3]},
        {key: value for key, value in reply.items() if key != wire.GENERATION_TOKEN_IDS},
    ):
        messages = [*START, fabricated, user("more")]
        opened(game, game.splice(messages), "unknown_ids", messages)


def test_stale_ids_on_text_that_the_client_wrote_itself_do_not_shift_the_cut(game):
    """0.4.0 puts the ids of the last sampled turn on a later assistant message that has none."""
    reply = game.play(START, [*game.chat.encode("Hi"), 12, END])
    stale = {"role": "assistant", "content": "I was not sampled."} | {key: reply[key] for key in wire.TOKEN_BUNDLE}
    messages = [*START, reply, user("more"), stale, user("and more")]
    spliced = game.splice(messages)
    tail = words(user("more")) + "I was not sampled.<|im_end|>" + words(user("and more"))
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(tail)]
    assert spliced.broke is None


def test_injected_assistant_text_after_a_sampled_turn_is_template_text(game):
    reply = game.play(START, [*game.chat.encode("Hi"), 12, END])
    injected = {"role": "assistant", "content": "By the way."}
    spliced = game.splice([*START, reply, user("more"), injected, user("on")])
    tail = words(user("more")) + "By the way.<|im_end|>" + words(user("on"))
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(tail)]


def test_an_empty_turn_that_gym_drops_goes_on_from_the_turn_before_as_a_branch(game):
    first = game.play(START, [*game.chat.encode("Hi"), 12, END])
    messages = [*START, first, user("more")]
    assert game.play(messages, [END])["content"] is None
    spliced = game.splice([*messages, user("still there?")])
    tail = game.chat.encode(words(user("more"), user("still there?")))
    assert spliced.prompt_ids == [*game.emitted(0), *tail]
    assert (spliced.broke.kind, spliced.broke.call_index) == ("branch", 2)
    assert spliced.broke.detail == "continues call 0, not the latest call 1"


def test_an_empty_turn_that_is_kept_goes_on(game):
    reply = game.play(START, [END])
    spliced = game.splice([*START, reply, user("more")])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(user("more")))]
    assert spliced.broke is None


def test_the_same_request_again_is_a_prompt_of_its_own(game):
    game.play(START, [*game.chat.encode("Hi"), END])
    spliced = game.splice(START)
    opened(game, spliced, "edited_history", START)
    assert (
        spliced.broke.detail
        == "message 2: the earlier turn had ('assistant', 'Hi', '', (), None), this request has None"
    )


def test_two_branches_from_one_turn_both_keep_its_ids(game):
    first = game.play(START, [*game.chat.encode("Hi"), 12, END])
    game.play([*START, first, user("left")], [*game.chat.encode("L"), END])
    spliced = game.splice([*START, first, user("right")])
    assert spliced.prompt_ids == [*game.emitted(0), *game.chat.encode(words(user("right")))]
    assert spliced.broke.kind == "branch"


def test_a_branch_of_a_branch_goes_on_from_its_own_turn(game):
    first = game.play(START, [*game.chat.encode("Hi"), 12, END])
    left = [*START, first, user("left")]
    on_the_left = game.play(left, [*game.chat.encode("L"), 13, END])
    game.play([*START, first, user("right")], [*game.chat.encode("R"), END])
    spliced = game.splice([*left, on_the_left, user("on")])
    assert spliced.prompt_ids == [*game.emitted(1), *game.chat.encode(words(user("on")))]


def test_of_two_equal_answers_the_ids_tell_which_one_goes_on(game):
    first = game.play(START, [*spelled(game, "assistant\n"), END])
    second = game.play(START, [*game.chat.encode("assistant\n"), END])
    assert first["content"] == second["content"]
    assert first[wire.GENERATION_TOKEN_IDS] != second[wire.GENERATION_TOKEN_IDS]
    assert game.splice([*START, first, user("more")]).prompt_ids[: len(game.emitted(0))] == game.emitted(0)
    assert game.splice([*START, second, user("more")]).prompt_ids[: len(game.emitted(1))] == game.emitted(1)


def test_a_template_that_writes_no_turn_end_after_this_turn_opens_a_new_segment(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if messages | length < 3 else '\\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    game = Game(ChatFormat(tmp_path))
    reply = game.play([user("Hello")], [*game.chat.encode("Hi"), END])
    messages = [user("Hello"), reply, user("more")]
    spliced = game.splice(messages)
    opened(game, spliced, "template", messages)
    assert "expected '<|im_end|>' first" in spliced.broke.detail


def test_a_request_that_ends_with_the_assistants_turn_starts_a_new_one(game):
    reply = game.play(START, [*game.chat.encode("Hi"), END])
    spliced = game.splice([*START, reply])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode("\n<|im_start|>assistant\n")]
