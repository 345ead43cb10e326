"""The splice, case by case: what a later request may do to a conversation, and what its prompt is then.

A to R: the marks of the cases are those under which the field's known failures of token alignment are listed in
``docs/alignment.md``.
"""

import asyncio
import json
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from lightning_gym.errors import ConfigError, PromptTooLongError
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.conversation import Conversation
from lightning_gym.policy.engine import Generation
from lightning_gym.policy.ledger import Ledger, Served, SharedIds, StrayCalls, shared_ids
from lightning_gym.policy.replies import Refusal, json_reply
from lightning_gym.policy.service import PolicyService
from lightning_gym.policy.splice import Splicer
from lightning_gym.rollout import Call, Rollout, SamplingProfile
from lightning_gym.template_families import FAMILIES, save_family
from lightning_gym.testing import tiny_tokenizer
from lightning_gym.trajectory import trajectories
from tests.game import END, START, Game, spelled, tool, user, words

pytestmark = pytest.mark.usefixtures("one_thread")

ADD = '<tool_call>\n{"name": "add", "arguments": {"n":   7}}\n</tool_call>'
CHATML = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
BEGIN = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"

# Nothing ends a user's turn, as in Mistral's.
NO_USER_END = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- m.content + '<|im_end|>' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.content -}}{%- endif -%}{%- endfor -%}"
)
# A tool's result is written with the name of the function that was called, looked up in the turn before.
NAMED_RESULTS = (
    "{%- for m in messages -%}{{- '<|im_start|>' -}}"
    "{%- if m.role == 'tool' -%}{{- loop.previtem.tool_calls[0].function.name + ': ' + m.content -}}"
    "{%- else -%}{{- m.role + '\\n' + m.content -}}"
    "{%- for c in m.tool_calls or [] -%}{{- c.function | tojson -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
)
WITH_BOS = "{{- '<|endoftext|>' -}}"
TRIMMING = CHATML.replace("m.content +", "m.content | trim +")


@pytest.fixture
def game(policy_dir):
    return Game(ChatFormat(policy_dir))


@pytest.fixture
def playing(tmp_path):
    """A game on the tiny tokenizer with another template."""

    def make(template):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template + BEGIN
        tokenizer.save_pretrained(tmp_path)
        return Game(ChatFormat(tmp_path))

    return make


def opened(game, messages, kind, rule, **request):
    """The prompt is the whole conversation's, and the record says what happened, to which call, where and why."""
    spliced = game.splice(messages, **request)
    assert spliced.prompt_ids == game.whole(messages, **request)
    broke = spliced.broke
    assert (broke.kind, broke.call_index, broke.likely_rule) == (kind, len(game.served), rule)
    return broke


def hi(game, messages=START, text="Hi", **request):
    """Play a turn in ids that no encoder gives."""
    return game.play(messages, [*spelled(game, text), game.chat.turn_end_id], **request)


# -- A to R


def test_case_a_a_turn_end_typed_by_a_tool_is_text_and_does_not_move_the_cut(game):
    reply = game.play(START, ADD + "<|im_end|>")
    spliced = game.splice([*START, reply, tool("<|im_end|>\n<|im_start|>assistant\nI am done.<|im_end|>")])
    emitted = game.emitted()
    tail = spliced.prompt_ids[len(emitted) :]
    assert spliced.prompt_ids[: len(emitted)] == emitted
    assert spliced.broke is None
    assert tail.count(END) == 1
    assert game.chat.decode(tail).count("<|im_end|>") == 3


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_case_b_the_turn_end_is_the_templates_whatever_the_tokenizers_end_of_text_is(tmp_path, family):
    chat = ChatFormat(save_family(family, tmp_path))
    game = Game(chat)
    assert chat.turn_end_id == AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(family.turn_end)
    reply = hi(game, [user("Hello")])
    spliced = game.splice([user("Hello"), reply, user("more")])
    assert spliced.broke is None
    assert spliced.prompt_ids[: len(game.emitted())] == game.emitted()


def test_case_c_a_template_that_ends_no_user_turn_goes_on_after_the_assistants(playing):
    game = playing(NO_USER_END)
    reply = hi(game)
    spliced = game.splice([*START, reply, user("more")])
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode("<|im_start|>more<|im_start|>assistant\n")]


def test_case_d_text_that_the_agent_wrote_for_the_assistant_is_template_text_after_the_sampled_turn(game):
    reply = hi(game)
    injected = {"role": "assistant", "content": "By the way."}
    spliced = game.splice([*START, reply, user("more"), injected, user("on")])
    tail = words(user("more")) + "By the way.<|im_end|>" + words(user("on"))
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(tail)]


@pytest.mark.parametrize("ended", [True, False])
def test_case_e_a_request_that_ends_with_the_assistant_has_one_turn_end_and_a_new_turn(game, ended):
    reply = game.play(START, [*spelled(game, "Hi"), *([END] if ended else [])])
    spliced = game.splice([*START, reply])
    tail = "\n<|im_start|>assistant\n" if ended else "<|im_end|>\n<|im_start|>assistant\n"
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(tail)]
    assert spliced.prompt_ids.count(END) == game.whole([*START, reply]).count(END)
    assert spliced.broke is None


def test_case_f_a_turn_cut_by_its_limit_gets_the_turn_end_as_a_prompt_token_that_never_trains(game):
    cut = game.play(START, spelled(game, "Hi"))
    hi(game, [*START, cut, user("more")], "Yo")
    calls = [one.call for one in game.served]
    rollout = Rollout(rollout_id="r", task_index=0, group_id=0, attempt=0, agent="a", reward=1.0, calls=calls)
    (trajectory,) = trajectories(rollout)
    position = len(game.emitted(0))
    assert trajectory.token_ids[position] == END
    assert not trajectory.loss_mask[position]
    assert trajectory.loss_mask[-1]
    assert trajectory.token_ids[-1] == END


def test_case_g_a_first_turn_is_the_template_and_breaks_nothing(game):
    spliced = game.splice(START)
    assert (spliced.prompt_ids, spliced.broke, spliced.continues) == (game.whole(START), None, None)


def test_case_h_a_compacted_history_opens_a_new_segment_and_says_so(game):
    first = hi(game)
    hi(game, [*START, first, user("more")], "Yo")
    messages = [START[0], user("They said hi. Go on.")]
    broke = opened(game, messages, "edited_history", "history compacted")
    whole = game.whole(messages)
    offset = broke.token_offset
    assert whole[:offset] == game.emitted()[:offset]
    assert whole[offset] != game.emitted()[offset]
    assert "They said" in broke.got_text
    assert "Hello" in broke.expected_text


def test_case_i_reasoning_that_the_template_drops_stays_in_the_context(tmp_path):
    game = Game(ChatFormat(save_family(FAMILIES["qwen3"], tmp_path)))
    reply = game.play(START, "<think>\nhm\n</think>\n\nHi<|im_end|>")
    messages = [*START, reply, user("more")]
    assert "hm" not in game.chat.render(messages)
    spliced = game.splice(messages)
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(words(user("more")))]
    assert spliced.broke is None


def test_case_j_an_image_is_refused_with_the_reason(serving):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with pytest.raises(Refusal, match="a part of type 'image_url'; this policy reads text parts only") as refused:
        serving.chat([user([{"type": "text", "text": "What is this?"}, image])])
    assert refused.value.status == 400


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_case_k_nothing_merges_across_the_boundary_because_it_is_a_special_token(tmp_path, family):
    game = Game(ChatFormat(save_family(family, tmp_path)))
    special = {i for i, token in AutoTokenizer.from_pretrained(tmp_path).added_tokens_decoder.items() if token.special}
    assert game.chat.turn_end_id in special
    for ended in (True, False):
        game.served.clear()
        sampled = [*spelled(game, "Hi"), *([game.chat.turn_end_id] if ended else [])]
        reply = game.play([user("Hello")], sampled)
        spliced = game.splice([user("Hello"), reply, user("more")])
        boundary = len(game.emitted()) - (1 if ended else 0)
        assert spliced.prompt_ids[boundary] == game.chat.turn_end_id
        tail = game.chat.decode(spliced.prompt_ids[boundary:])
        assert spliced.prompt_ids[boundary:] == game.chat.encode(tail)
        assert game.chat.encode("Hi" + tail)[-len(game.chat.encode(tail)) :] == game.chat.encode(tail)


def test_case_l_the_beginning_of_text_comes_from_the_first_prompt_and_never_again(playing):
    game = playing(WITH_BOS + CHATML)
    begin = game.chat.encode("<|endoftext|>")
    first = hi(game)
    second = hi(game, [*START, first, user("more")], "Yo")
    spliced = game.splice([*START, first, user("more"), second, user("on")])
    assert spliced.prompt_ids[: len(begin)] == begin
    assert spliced.prompt_ids.count(begin[0]) == 1
    assert spliced.broke is None


def test_case_m_a_spliced_prompt_over_the_window_is_refused_as_an_overflow(serving):
    serving.ledger.open("r", profile="train", seed=1)
    reply = serving.chat(START, **{wire.ROLLOUT_ID: "r"})
    longer = [*START, reply, user("x" * WINDOW)]
    with pytest.raises(PromptTooLongError, match=rf"maximum context length is {WINDOW} tokens, and the prompt has"):
        serving.chat(longer, **{wire.ROLLOUT_ID: "r"})
    assert len(serving.ledger.get("r").served) == 1


def test_case_n_parallel_branches_keep_the_ids_of_the_turn_they_share(game):
    first = hi(game)
    hi(game, [*START, first, user("left")], "L")
    spliced = game.splice([*START, first, user("right")])
    assert spliced.prompt_ids == [*game.emitted(0), *game.chat.encode(words(user("right")))]
    broke = spliced.broke
    assert (broke.kind, broke.likely_rule) == ("branch", "parallel branch")
    assert broke.token_offset > len(game.emitted(0))
    assert "left" in broke.expected_text
    assert "right" in broke.got_text


def test_case_o_ids_of_an_earlier_turn_on_a_later_message_are_stale_and_do_not_move_the_cut(game):
    reply = hi(game)
    stale = {"role": "assistant", "content": "I was not sampled."} | {key: reply[key] for key in wire.TOKEN_BUNDLE}
    spliced = game.splice([*START, reply, user("more"), stale, user("on")])
    tail = words(user("more")) + "I was not sampled.<|im_end|>" + words(user("on"))
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(tail)]


def test_case_o_a_turn_of_ours_with_the_ids_of_an_earlier_one_goes_on_from_the_earlier_one_and_says_so(game):
    first = hi(game)
    messages = [*START, first, user("more")]
    second = hi(game, messages, "assistant\n")
    stale = second | {key: first[key] for key in wire.TOKEN_BUNDLE}
    spliced = game.splice([*messages, stale, user("on")])
    tail = words(user("more")) + "assistant\n<|im_end|>" + words(user("on"))
    assert spliced.prompt_ids == [*game.emitted(0), *game.chat.encode(tail)]
    assert spliced.prompt_ids[: len(game.emitted())] != game.emitted()
    assert (spliced.broke.kind, spliced.broke.likely_rule) == ("unknown_ids", "stale ids")
    assert spliced.broke.detail == "message 4 carries the ids of call 0, whose reply it is not"


def test_case_p_an_empty_turn_that_gym_dropped_goes_on_from_the_turn_before_it(game):
    first = hi(game)
    messages = [*START, first, user("more")]
    game.play(messages, [END])
    spliced = game.splice([*messages, user("still there?")])
    assert spliced.prompt_ids == [*game.emitted(0), *game.chat.encode(words(user("more"), user("still there?")))]
    assert (spliced.broke.kind, spliced.broke.likely_rule) == ("branch", "empty turn dropped")


def test_case_p_an_empty_first_turn_that_gym_dropped_opens_a_new_segment(game):
    game.play(START, [END])
    opened(game, [*START, user("still there?")], "edited_history", "empty turn dropped")


def test_case_q_another_system_text_is_detected(game):
    reply = hi(game)
    messages = [{"role": "system", "content": "Be brief. It is noon."}, START[1], reply, user("more")]
    broke = opened(game, messages, "edited_history", "system text changed")
    assert broke.detail.startswith("message 0: ")
    assert "It is noon." in broke.detail


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"tools": [{"type": "function", "function": {"name": "add", "parameters": {"n": 1}}}]}, "tools changed"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "template arguments changed"),
    ],
)
def test_case_q_other_tools_and_template_arguments_are_detected_by_order_and_type_too(game, changed, rule):
    reply = hi(game)
    opened(game, [*START, reply, user("more")], "changed_tools", rule, **changed)
    kinds = [{"x": {"a": 1, "b": 2}}, {"x": {"b": 2, "a": 1}}, {"x": {"a": 1.0, "b": 2}}, {"x": {"a": True, "b": 2}}]
    read = [game.read({"messages": START, "chat_template_kwargs": kind}).template_kwargs for kind in kinds]
    assert len(set(read)) == len(kinds)


def test_case_r_a_sync_between_two_turns_leaves_the_ids_one_sequence_and_each_call_its_version(game):
    first = hi(game)
    game.weight_version = 5
    hi(game, [*START, first, user("more")], "Yo")
    calls = [one.call for one in game.served]
    rollout = Rollout(rollout_id="r", task_index=0, group_id=0, attempt=0, agent="a", reward=1.0, calls=calls)
    (trajectory,) = trajectories(rollout)
    assert [call.weight_version for call in calls] == [0, 5]
    assert list(dict.fromkeys(trajectory.weight_versions[trajectory.loss_mask].tolist())) == [0, 5]


# -- what a template needs of a turn to write the next


def test_a_template_that_looks_up_the_called_function_finds_it(playing):
    game = playing(NAMED_RESULTS)
    reply = game.play(START, ADD + "<|im_end|>")
    spliced = game.splice([*START, reply, tool("7")])
    tail = "\n<|im_start|>add: 7<|im_end|>\n<|im_start|>assistant\n"
    assert spliced.prompt_ids == [*game.emitted(), *game.chat.encode(tail)]
    assert spliced.broke is None


def test_a_template_that_refuses_the_turn_without_its_words_opens_a_new_segment(playing):
    game = playing(CHATML + "{{- raise_exception('no words') if messages[1:] and messages[-2].content | length > 9 -}}")
    reply = hi(game)
    broke = opened(game, [*START, reply, user("more")], "template", "no turn end")
    assert "no words" in broke.detail


def test_a_template_that_refuses_the_conversation_is_an_error_with_its_words(playing):
    game = playing(CHATML + "{{- raise_exception('too many') if messages | length > 3 -}}")
    reply = hi(game)
    with pytest.raises(ConfigError, match="too many"):
        game.splice([*START, reply, user("more")])


def test_white_space_that_an_added_token_swallows_is_swallowed_after_a_sampled_turn_too(tmp_path):
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|end|>") + BEGIN
    tokenizer.save_pretrained(tmp_path)
    game = Game(ChatFormat(tmp_path))
    text = game.chat.render([*START, {"role": "assistant", "content": "a"}, user("more")])
    reply = game.play(START, [*game.chat.encode("a"), game.chat.turn_end_id])
    assert game.splice([*START, reply, user("more")]).prompt_ids == game.chat.encode(text)


# -- the likely rule


def rewritten(game, messages, reply, **changes):
    return [*messages, {k: v for k, v in (reply | changes).items() if v is not None}, user("more")]


CALLED = [{"id": "call-0", "type": "function", "function": {"name": "add", "arguments": '{"n": "7"}'}}]


@pytest.mark.parametrize(
    ("sampled", "changes", "rule"),
    [
        ("<think>hm</think>Hi", {"reasoning_content": None}, "earlier reasoning dropped"),
        (
            "<think>hm</think>Hi",
            {"reasoning_content": None, "content": "<think>hm</think>Hi"},
            "reasoning moved into the content",
        ),
        ("a  b", {"content": "a b"}, "content trimmed"),
        ("Hi", {"content": "Ho"}, "message edited"),
        ("Hi", {"role": "user"}, "assistant's turn dropped"),
        (ADD, {"tool_calls": CALLED}, "tool call re-serialised"),
        (ADD, {"tool_calls": None, "content": ADD}, "tool call re-serialised"),
        (ADD, {"tool_calls": []}, "tool call edited"),
    ],
)
def test_the_likely_rule_is_guessed_from_the_turn_that_differs(game, sampled, changes, rule):
    reply = game.play(START, [*game.chat.encode(sampled), END])
    broke = opened(game, rewritten(game, START, reply, **changes), "edited_history", rule)
    assert broke.token_offset is not None


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (lambda m: m[:2], "history cut back"),
        (lambda m: [m[0], *m[2:], user("x")], "message dropped"),
        (lambda m: [m[0], user("x"), *m[1:]], "message inserted"),
        (lambda m: [user("x"), *m[1:], user("y")], "history rewritten"),
        (lambda m: [m[0], user(" Hello"), *m[2:]], "content trimmed"),
    ],
)
def test_the_likely_rule_is_guessed_from_the_messages_that_are_there(game, edit, rule):
    first = hi(game)
    messages = [*START, first, user("more")]
    second = hi(game, messages, "Yo")
    opened(game, edit([*messages, second]), "edited_history", rule)


def test_the_same_request_again_is_told_from_a_branch(game):
    first = hi(game)
    opened(game, START, "edited_history", "request repeated")
    messages = [*START, first, user("more")]
    hi(game, messages, "Yo")
    broke = game.splice(messages).broke
    assert (broke.kind, broke.likely_rule) == ("branch", "request repeated")


def test_a_break_of_long_messages_is_told_by_a_window_around_the_difference(game):
    reply = hi(game, [user("a" * 4000 + "b" + "c" * 4000)])
    broke = game.splice([user("a" * 4000 + "d" + "c" * 4000), reply, user("more")]).broke
    assert len(broke.detail) < 600
    assert "aaab" in broke.detail
    assert "aaad" in broke.detail


# -- ids on messages, in a rollout and outside of any

WINDOW = 256


class Instant:
    """An engine that answers at once."""

    max_model_len = WINDOW
    weight_version = 3

    def __init__(self):
        self.sampled = []

    def generate(self, request_id, prompt_ids, sampling, deliver):
        ids = list(self.sampled)
        deliver(Generation(token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop", weight_version=3))


class Serving:
    def __init__(self, policy_dir):
        self.engine, self.ledger = Instant(), Ledger()
        profiles = {"train": SamplingProfile(), "eval": SamplingProfile()}
        self.service = PolicyService(self.engine, policy_dir, self.ledger, profiles)
        self.engine.sampled = [*spelled(self.service, "assistant\n"), END]

    def chat(self, messages, **body):
        """The message of a delivered answer, as it comes back out of JSON."""
        request = json.loads(json.dumps({"messages": messages, **body}))

        async def ask():
            answer = await self.service.chat_completions(request)
            answer.delivered()
            return answer.body["choices"][0]["message"]

        return json.loads(json_reply(asyncio.run(ask())).body)


@pytest.fixture
def serving(policy_dir):
    return Serving(policy_dir)


def goes_on(reply, second):
    start = [*reply[wire.PROMPT_TOKEN_IDS], *reply[wire.GENERATION_TOKEN_IDS]]
    return second[wire.PROMPT_TOKEN_IDS][: len(start)] == start


def test_a_client_without_a_rollout_goes_on_where_it_sends_the_ids_it_was_given(serving):
    reply = serving.chat(START)
    second = serving.chat([*START, reply, user("more")])
    third = serving.chat([*START, reply, user("more"), second, user("on")])
    assert goes_on(reply, second)
    assert goes_on(second, third)
    assert serving.service.stats.splice_breaks == {}


def test_a_client_without_a_rollout_that_sends_no_ids_is_rendered_whole(serving):
    reply = serving.chat(START)
    plain = {key: value for key, value in reply.items() if key not in wire.TOKEN_BUNDLE}
    second = serving.chat([*START, plain, user("more")])
    assert not goes_on(reply, second)
    assert serving.service.stats.splice_breaks == {}


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda start, reply: [start[0], user("Hallo"), reply, user("more")], "edited_history"),
        (lambda start, reply: [*start, reply | {"content": "Ho"}, user("more")], "edited_history"),
        (lambda start, reply: [*start, reply | {wire.GENERATION_TOKEN_IDS: [0]}, user("more")], "unknown_ids"),
        (
            lambda start, reply: [
                *start,
                reply | {wire.PROMPT_TOKEN_IDS: [0], wire.GENERATION_TOKEN_IDS: [0]},
                user("more"),
            ],
            "unknown_ids",
        ),
        (lambda start, reply: [*start, reply | {wire.PROMPT_TOKEN_IDS: [[1]]}, user("more")], "unknown_ids"),
        (lambda start, reply: [*start, reply | {wire.PROMPT_TOKEN_IDS: "ids"}, user("more")], "unknown_ids"),
    ],
)
@pytest.mark.parametrize("rollout", [None, "r"])
def test_ids_go_on_with_the_same_proof_in_a_rollout_and_outside(serving, rollout, edit, kind):
    request = {wire.ROLLOUT_ID: rollout} if rollout else {}
    entry = serving.ledger.open("r", profile="train", seed=1)
    reply = serving.chat(START, **request)
    second = serving.chat(edit(START, reply), **request)
    assert not goes_on(reply, second)
    assert serving.service.stats.splice_breaks == {kind: 1}
    assert [broke.kind for broke in entry.breaks] == ([kind] if rollout else [])


def test_other_tools_open_a_new_segment_outside_of_a_rollout_too(serving):
    reply = serving.chat(START)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    second = serving.chat([*START, reply, user("more")], tools=tools)
    assert second[wire.PROMPT_TOKEN_IDS] == serving.service.chat.encode(
        serving.service.chat.render([*START, reply, user("more")], tools)
    )
    assert serving.service.stats.splice_breaks == {"changed_tools": 1}


def test_fabricated_ids_in_a_first_request_are_recorded(serving):
    entry = serving.ledger.open("r", profile="train", seed=1)
    fabricated = {"role": "assistant", "content": "Hi", wire.PROMPT_TOKEN_IDS: [0], wire.GENERATION_TOKEN_IDS: [0]}
    messages = [*START, fabricated, user("more")]
    second = serving.chat(messages, **{wire.ROLLOUT_ID: "r"})
    chat = serving.service.chat
    assert second[wire.PROMPT_TOKEN_IDS] == chat.encode(chat.render(messages))
    (broke,) = entry.breaks
    assert (broke.kind, broke.call_index, broke.likely_rule) == ("unknown_ids", 0, "fabricated ids")
    assert broke.token_offset is None


def test_ids_of_another_rollout_never_go_on_and_are_recorded_as_such(serving):
    serving.ledger.open("theirs", profile="train", seed=1)
    entry = serving.ledger.open("ours", profile="train", seed=2)
    theirs = serving.chat(START, **{wire.ROLLOUT_ID: "theirs"})
    for rollout in ("ours", None):
        request = {wire.ROLLOUT_ID: rollout} if rollout else {}
        second = serving.chat([*START, theirs, user("more")], **request)
        assert not goes_on(theirs, second)
    (broke,) = entry.breaks
    assert (broke.kind, broke.likely_rule) == ("unknown_ids", "ids of another rollout")
    assert serving.service.stats.splice_breaks == {"unknown_ids": 2}


def test_the_break_of_a_rollout_names_the_call_that_begins_the_segment(serving):
    entry = serving.ledger.open("r", profile="train", seed=1)
    for text in ("a", "b", "c"):
        serving.chat([user(text)], **{wire.ROLLOUT_ID: "r"})
    assert [broke.call_index for broke in entry.breaks] == [1, 2]


def served_call(prompt_ids, token_ids):
    call = Call(
        index=0, prompt_ids=prompt_ids, token_ids=token_ids, logprobs=[], finish_reason="stop", weight_version=0
    )
    return Served(call=call, told=Conversation(messages=(), tools=b"", template_kwargs=b""))


def test_calls_outside_of_rollouts_are_remembered_up_to_a_number_of_tokens_and_the_unused_go_first():
    stray = StrayCalls(max_tokens=10)
    calls = [served_call([1, 2, number], [9]) for number in range(3)]
    stray.add(calls[0])
    stray.add(calls[1])
    assert stray.find([1, 2, 0], [9]) is calls[0]
    stray.add(calls[2])
    assert stray.find([1, 2, 1], [9]) is None
    assert stray.find([1, 2, 0], [9]) is calls[0]
    assert stray.find([1, 2, 2], [9]) is calls[2]
    stray.add(calls[2])
    assert len(stray) == 2
    stray.add(served_call(list(range(11)), [9]))
    assert len(stray) == 0


@pytest.mark.parametrize("claim", [(None, None), ([1], None), ("a", "b"), ([[1]], [2]), ({}, []), ([1, 2], [3])])
def test_ids_that_nobody_was_given_find_nothing(claim):
    stray = StrayCalls()
    stray.add(served_call([1, 2], [4]))
    assert stray.find(*claim) is None


# -- memory and work


def test_only_new_text_is_encoded_however_long_the_history_is(game):
    encoded, messages = [], START
    for _ in range(64):
        reply = game.play(messages, ADD + "<|im_end|>")
        messages = [*messages, reply, tool("7")]
        encoded.append(game.splice(messages).num_encoded)
    assert set(encoded) == {len(game.chat.encode(words(tool("7"))))}


def test_the_prompts_of_a_long_rollout_are_stored_once(game):
    messages = START
    for _ in range(32):
        messages = [*messages, game.play(messages, ADD + "<|im_end|>"), tool("7")]
    prompts = [one.call.prompt_ids for one in game.served]
    assert len({id(prompt._ids) for prompt in prompts}) == 1
    assert all(list(b)[: len(a)] == list(a) for a, b in pairwise(prompts))
    messages = [one.told.messages for one in game.served]
    assert all(a is b for a, b in zip(messages[-2], messages[-1], strict=False))


def test_two_prompts_that_grow_from_one_do_not_touch_each_other():
    first = SharedIds([1, 2])
    left, right = first.grown_to([1, 2, 3]), first.grown_to([1, 2, 4, 5])
    further = left.grown_to([1, 2, 3, 6])
    assert [list(ids) for ids in (first, left, right, further)] == [[1, 2], [1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 6]]
    assert (left == [1, 2, 3], left == right, left == (1, 2, 3)) == (True, False, False)
    assert (left[-1], left[1:], left[:9], left[::-1], 3 in left, 6 in left) == (
        3,
        [2, 3],
        [1, 2, 3],
        [3, 2, 1],
        True,
        False,
    )
    assert [one.begins_with(left) for one in (further, right, first, SharedIds([1, 2, 3]))] == [
        True,
        False,
        False,
        True,
    ]
    assert left.begins_with([1, 2])
    assert not left.begins_with([1, 4])
    with pytest.raises(IndexError):
        left[3]


def test_a_prompt_that_is_kept_is_not_the_list_that_was_sent():
    sent = [1, 2]
    kept = shared_ids(sent, None)
    shared_ids([1, 2, 3, 4], served_call(kept, [3]))
    assert sent == [1, 2]


def test_the_record_is_not_made_where_nothing_broke(game, monkeypatch):
    reply = hi(game)
    splicer = Splicer(game.chat, owner_of=lambda *_: pytest.fail("looked for an owner"))
    request = {"messages": [*START, reply, user("more")]}
    monkeypatch.setattr(game.chat, "decode", lambda ids: pytest.fail("decoded"))
    assert splicer.splice(request, game.read(request), game.served).broke is None
