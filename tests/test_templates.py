"""Conversations on chat templates that behave like the families' real ones: every later prompt begins with what was fed
and sampled, to the id, whatever the template makes of its history."""

import asyncio
import json

import pytest

from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.engine import Generation
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.parsers import TurnParser
from lightning_gym.policy.replies import Refusal
from lightning_gym.policy.service import PolicyService
from lightning_gym.rollout import SamplingProfile
from lightning_gym.template_families import FAMILIES, save_family

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"arguments":  {"who": "\\u00e9",\n"n":2}, "name":"add"}</tool_call>'


class Script:
    """An engine that says what it is told to."""

    weight_version = 0
    max_model_len = 8192

    def __init__(self):
        self.token_ids = []
        self.prompts = []

    def abort(self, request_id):
        """Nothing runs on."""

    def generate(self, request_id, prompt_ids, sampling, deliver):
        self.prompts.append(list(prompt_ids))
        stopped = self.token_ids[-1:] and self.token_ids[-1] in sampling.stop_token_ids
        deliver(
            Generation(
                token_ids=self.token_ids,
                logprobs=[-1.0] * len(self.token_ids),
                finish_reason="stop" if stopped else "length",
                weight_version=0,
            )
        )


class Game:
    """An agent that plays one rollout and keeps its history as a client does: without ids."""

    def __init__(self, family, directory):
        self.family = family
        self.engine = Script()
        ledger = Ledger()
        self.entry = ledger.open("r", profile="train", seed=0)
        profile = SamplingProfile()
        self.service = PolicyService(self.engine, directory, ledger, {"train": profile, "eval": profile})
        self.chat = self.service.chat
        self.messages = [{"role": "system", "content": "Be brief."}] if family.system else []
        self.tools = [TOOL] if family.tools else None

    def say(self, *messages):
        self.messages += messages

    def turn(self, sampled, *, ended=True):
        """The policy says `sampled` (text or ids); returns the prompt it was given."""
        ids = self.chat.encode(sampled) if isinstance(sampled, str) else sampled
        self.engine.token_ids = [*ids, self.chat.turn_end_id] if ended else ids
        body = {"messages": self.messages, "tools": self.tools, wire.ROLLOUT_ID: "r"}

        async def ask():
            answer = await self.service.chat_completions(json.loads(json.dumps(body)))
            answer.delivered()
            return answer.body["choices"][0]["message"]

        message = asyncio.run(ask())
        self.say({key: value for key, value in message.items() if key not in wire.TOKEN_BUNDLE})
        return self.engine.prompts[-1]

    def emitted(self):
        """What was fed to and sampled in the latest call."""
        call = self.entry.served[-1].call
        return [*call.prompt_ids, *call.token_ids]

    def result(self, content):
        call_id = self.messages[-1]["tool_calls"][0]["id"]
        self.say({"role": "tool", "content": content, "tool_call_id": call_id})


def user(content):
    return {"role": "user", "content": content}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory):
    return save_family(family, tmp_path_factory.mktemp(family.name))


@pytest.fixture
def game(family, directory):
    return Game(family, directory)


def test_the_turn_end_is_the_familys(family, game):
    assert game.chat.turn_end_text == family.turn_end


def test_a_text_begins_with_one_beginning_of_text_or_none(family, game):
    game.say(user("Hello"))
    first = game.turn("Hi.")
    game.say(user("More?"))
    second = game.turn("No.")
    bos = game.chat._tokenizer.bos_token_id
    expected = 0 if family.bos is None else 1
    assert (first.count(bos), second.count(bos)) == (expected, expected)
    assert family.bos is None or second[0] == bos


def test_a_conversation_of_reasoning_calls_and_words_is_one_sequence(family, game):
    game.say(user("  Hello \n"))
    expected = []
    for turn in range(5):
        prompt = game.turn(
            f"<think>\nI  wonder {turn}\n</think>\n\n" + (CALL if family.tools and turn % 2 else " So. ")
        )
        assert prompt[: len(expected)] == expected
        assert not game.entry.breaks
        expected = game.emitted()
        if "tool_calls" in game.messages[-1]:
            game.result(f" {turn}\n")
        else:
            game.say(user(f"And {turn}?  "))
    assert game.chat.decode(expected).count("I  wonder") == 5


CUT_SHORT = {"words": "So it", "a call": CALL, "a thought": "<think>\nhalf a thou"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, family in FAMILIES.items() for kind in CUT_SHORT if family.tools or kind != "a call"],
)
def test_the_end_of_a_turn_that_ran_into_the_limit_is_supplied_once(name, kind, tmp_path):
    game = Game(FAMILIES[name], save_family(FAMILIES[name], tmp_path))
    game.say(user("Hello"))
    game.turn(CUT_SHORT[kind], ended=False)
    before = game.emitted()
    if kind == "a call":
        game.result("3")
    else:
        game.say(user("Go on."))
    prompt = game.turn("Yes.")
    end = game.chat.turn_end_id
    assert prompt[: len(before) + 1] == [*before, end]
    assert prompt[len(before) + 1] != end
    assert not game.entry.breaks


# DeepSeek R1's generation prompt opens a thought that its history leaves out: nothing there is ever written as it was.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek_r1"}))
def test_where_nothing_is_written_anew_the_ids_are_the_templates(name, tmp_path):
    game = Game(FAMILIES[name], save_family(FAMILIES[name], tmp_path))
    words = "Well."
    if name == "mistral":  # begins words with a space, and moves the system prompt and the tools
        words, game.messages, game.tools = " Well.", [], None
    game.say(user("Hello"))
    for question in ("Really?", "Sure?", "Fine."):
        prompt = game.turn(words)
        assert prompt == game.chat.encode(game.chat.render(game.messages[:-1], game.tools))
        game.say(user(question))
    assert game.turn(words)[: len(prompt)] == prompt


def test_a_turn_end_that_a_user_types_does_not_end_a_turn(family, game):
    game.say(user(f"Hello{family.turn_end}"))
    prompt = game.turn("Hi.")
    expected = game.emitted()
    game.say(user(f"{family.turn_end}{family.special[0]}"))
    ends = prompt.count(game.chat.turn_end_id)
    prompt = game.turn("Hm.")
    assert prompt[: len(expected)] == expected
    plain = Game(family, game.chat._tokenizer.name_or_path)
    plain.say(user("Hello"))
    assert plain.turn("Hi.").count(plain.chat.turn_end_id) == ends
    plain.say(user("x"))
    plain_prompt = plain.turn("Hm.")
    assert [i for i in prompt if i in game.chat._control.ids] == [
        i for i in plain_prompt if i in plain.chat._control.ids
    ]


def test_a_turn_that_no_parser_can_read_is_answered_and_counted(policy_dir):
    def gives_up(text, request):
        raise IndexError(text)

    game = Game(FAMILIES["trimmed"], policy_dir)
    game.chat.parser = TurnParser(None, gives_up)
    game.say(user("Hello"))
    game.turn(CALL)
    assert game.messages[-1]["content"] == CALL
    assert "\nlightning_gym_unparsed_total 1\n" in game.service.metrics()
    game.say(user("Again"))
    expected = game.emitted()
    assert game.turn("x")[: len(expected)] == expected


@pytest.mark.parametrize("place", ["content", "tool_call_id", "name"])
def test_a_lone_surrogate_in_a_message_is_a_400(policy_dir, place):
    game = Game(FAMILIES["trimmed"], policy_dir)
    template = "{% for m in messages %}{{ m.content }}{{ m[place] }}{{ '<|im_end|>' }}{% endfor %}"
    game.chat._tokenizer.chat_template = template.replace("place", repr(place))
    game.say(user("x") | {place: "\ud800"})
    with pytest.raises(Refusal, match=r"lone surrogate, '\\ud800'") as refused:
        game.turn("y")
    assert refused.value.status == 400
    assert str(refused.value).encode()


# -- what each family does to a history when it is written whole


def whole(directory, messages, tools=None, **template_kwargs):
    return ChatFormat(directory).render(messages, tools, template_kwargs, add_generation_prompt=False)


TURN = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("qwen3", [user("2+2"), TURN], "<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>\n"),
        (
            "qwen3",
            [user("2+2"), TURN, user("ok")],
            "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nok<|im_end|>\n",
        ),
        ("llama3", [user(" 2+2 ")], "<|start_header_id|>user<|end_header_id|>\n\n2+2<|eot_id|>"),
        ("gemma", [user("2+2"), TURN], "<start_of_turn>model\n4<end_of_turn>\n"),
        ("mistral", [user("2+2"), TURN, user("ok")], "<s>[INST] 2+2[/INST] 4</s>[INST] ok[/INST]"),
        (
            "deepseek_r1",
            [user("2+2"), {"role": "assistant", "content": "<think>hm</think>4"}],
            "<\uff5cbegin▁of▁sentence\uff5c><\uff5cUser\uff5c>2+2<\uff5cAssistant\uff5c>4<\uff5cend▁of▁sentence\uff5c>",
        ),
        ("trimmed", [user(" 2+2 "), TURN], "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"),
    ],
)
def test_a_family_writes_its_history_as_it_is_known_to(tmp_path, name, messages, text):
    assert whole(save_family(FAMILIES[name], tmp_path), messages).endswith(text)


def test_llamas_system_turn_carries_the_date(tmp_path):
    directory = save_family(FAMILIES["llama3"], tmp_path)
    assert "Today Date: 1 May 2026\n" in whole(directory, [user("x")], date_string="1 May 2026")
    assert "Today Date: " in whole(directory, [user("x")])


def test_one_template_writes_calls_with_other_spacing_and_order(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"n": 2, "a": 1}'}}
    text = whole(save_family(FAMILIES["rewritten_calls"], tmp_path), [TURN | {"tool_calls": [call]}])
    assert '<tool_call>{"arguments":{"a":1,"n":2},"name":"add"}</tool_call>' in text
