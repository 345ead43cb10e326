"""vLLM's own parsers by their registry names, on hand-written turns of each family. No engine."""

import json
import subprocess
import sys

import pytest

from lightning_gym.errors import ConfigError
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.template_families import FAMILIES, save_family

pytestmark = pytest.mark.vllm

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "integer"}, "note": {"type": "string"}},
            },
        },
    }
]
ASKED = {"tools": TOOLS}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'
CODER = "<tool_call>\n<function=add>\n<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>"
LLAMA = '{"name": "add", "parameters": {"n": 2}}'


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: save_family(family, tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.fixture
def read(directories):
    """``read(family, text, tool_parser=..., reasoning_parser=...)``: the turn as an agent would see it."""

    def read(family, text, *, request=ASKED, tool_parser=None, reasoning_parser=None):
        chat = ChatFormat(directories[family], tool_parser=tool_parser, reasoning_parser=reasoning_parser)
        message = chat.parse([*chat.encode(text), chat.turn_end_id], request)
        assert chat.parser.num_unparsed == 0
        calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
        return message.reasoning, message.content, calls

    return read


ADD_2, ADD_3 = ("add", {"n": 2}), ("add", {"n": 3})


@pytest.mark.parametrize(
    ("family", "name", "text", "content", "calls"),
    [
        ("qwen3", "hermes", HERMES, None, [ADD_2]),
        ("qwen3", "hermes", f"I add.\n{HERMES}", "I add.\n", [ADD_2]),
        ("qwen3", "hermes", HERMES + "\n" + HERMES.replace("2", "3"), None, [ADD_2, ADD_3]),
        ("qwen3", "hermes", "<tool_call>{oops</tool_call>", "<tool_call>{oops</tool_call>", []),
        ("qwen3", "hermes", "Hello", "Hello", []),
        ("qwen3", "qwen3_coder", CODER, None, [ADD_2]),
        ("qwen3", "qwen3_coder", f"I add.\n{CODER}\n{CODER.replace('2', '3')}", "I add.", [ADD_2, ADD_3]),
        ("qwen3", "qwen3_coder", "<tool_call>\n<function=", "<tool_call>\n<function=", []),
        ("qwen3", "qwen3_coder", "2 < 3", "2 < 3", []),
        ("llama3", "llama3_json", LLAMA, None, [ADD_2]),
        ("llama3", "llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA.replace('2', '3')}", None, [ADD_2, ADD_3]),
        ("llama3", "llama3_json", f"I add. {LLAMA} So.", None, [ADD_2]),
        ("llama3", "llama3_json", '{"name": "add"', '{"name": "add"', []),
        ("llama3", "llama3_json", '{"n": 2}', '{"n": 2}', []),
        ("mistral", "mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"n": 2}}]', None, [ADD_2]),
    ],
)
def test_calls_are_read_as_vllm_reads_them(read, family, name, text, content, calls):
    assert read(family, text, tool_parser=name) == (None, content, calls)


def test_the_schema_of_a_tool_gives_arguments_without_types_theirs(read):
    text = CODER.replace("</function>", "<parameter=note>\n7\n</parameter>\n</function>")
    assert read("qwen3", text, tool_parser="qwen3_coder")[2] == [("add", {"n": 2, "note": "7"})]


@pytest.mark.parametrize("request_", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
@pytest.mark.parametrize(("family", "name", "text"), [("qwen3", "hermes", HERMES), ("qwen3", "qwen3_coder", CODER)])
def test_calls_are_made_only_where_tools_were_offered(read, family, name, text, request_):
    assert read(family, text, tool_parser=name, request=request_) == (None, text, [])


@pytest.mark.parametrize(
    ("family", "name", "text", "reasoning", "content"),
    [
        ("deepseek_r1", "deepseek_r1", "<think>two and two</think>4", "two and two", "4"),
        ("deepseek_r1", "deepseek_r1", "the prompt opened it</think>4", "the prompt opened it", "4"),
        ("deepseek_r1", "deepseek_r1", "never ends", "never ends", None),
        ("qwen3", "qwen3", "<think>\ntwo and two\n</think>\n\n4", "\ntwo and two\n", "\n\n4"),
    ],
)
def test_reasoning_is_read_as_vllm_reads_it(read, family, name, text, reasoning, content):
    assert read(family, text, reasoning_parser=name) == (reasoning, content, [])


def test_an_argument_of_the_template_that_turns_thinking_off_turns_it_off_for_the_parser(read):
    request = {"chat_template_kwargs": {"enable_thinking": False}}
    assert read("qwen3", "4", reasoning_parser="qwen3", request=request) == (None, "4", [])
    assert read("qwen3", "4", reasoning_parser="qwen3", request={}) == ("4", None, [])


@pytest.mark.parametrize("tools", [("hermes", HERMES), ("qwen3_coder", CODER), ("builtin", HERMES)])
@pytest.mark.parametrize("reasoning", ["qwen3", "deepseek_r1", "builtin"])
def test_reasoning_and_calls_of_one_turn_are_told_apart(read, tools, reasoning):
    name, text = tools
    thought, content, calls = read(
        "qwen3", f"<think>I should add</think>{text}", tool_parser=name, reasoning_parser=reasoning
    )
    assert (thought, content, calls) == ("I should add", None, [ADD_2])


def test_without_a_reasoning_parser_reasoning_is_content(read):
    text = f"<think>I should add</think>{CODER}"
    assert read("qwen3", text, tool_parser="qwen3_coder") == (None, "<think>I should add</think>", [ADD_2])


def test_a_parser_that_raises_loses_no_turn_and_is_counted(directories, caplog):
    chat = ChatFormat(directories["qwen3"], tool_parser="hermes")
    broken = {"tools": [{"type": "function", "function": "not a function"}]}
    for turn in (1, 2):
        message = chat.parse(chat.encode(HERMES), broken)
        assert (message.content, message.tool_calls, chat.parser.num_unparsed) == (HERMES, [], turn)
    (warning,) = [record for record in caplog.records if record.name.startswith("lightning_gym")]
    assert "a parser failed on a sampled turn" in warning.message


def test_an_unknown_name_is_refused_with_the_names_there_are(directories):
    with pytest.raises(ConfigError, match=r"tool_parser is 'hermes2', expected .*deepseek_v3.*hermes,.*llama3_json"):
        ChatFormat(directories["qwen3"], tool_parser="hermes2")
    with pytest.raises(ConfigError, match=r"reasoning_parser is 'think', expected .*deepseek_r1.*qwen3"):
        ChatFormat(directories["qwen3"], reasoning_parser="think")


def test_the_callbacks_parsers_are_the_endpoints(directories):
    from lightning_gym import GymCallback
    from lightning_gym.policy.ledger import Ledger
    from lightning_gym.policy.service import PolicyService
    from lightning_gym.testing import FakeEngine, FakeGym

    callback = GymCallback(engine=FakeEngine(), gym=FakeGym(), tool_parser="hermes2", reasoning_parser=None)
    settings = callback.colocation._settings
    assert (settings.tool_parser, settings.reasoning_parser) == ("hermes2", None)
    with pytest.raises(ConfigError, match="tool_parser is 'hermes2'"):
        PolicyService(
            FakeEngine(), directories["qwen3"], Ledger(), callback.colocation.profiles, tool_parser=settings.tool_parser
        )


def test_a_parser_whose_tokens_the_tokenizer_lacks_is_refused_at_the_start(directories):
    with pytest.raises(ConfigError, match=r"tool_parser 'llama3_json' does not fit this model's tokenizer.*python_tag"):
        ChatFormat(directories["qwen3"], tool_parser="llama3_json")
    with pytest.raises(ConfigError, match=r"reasoning_parser 'deepseek_r1' does not fit"):
        ChatFormat(directories["gemma"], reasoning_parser="deepseek_r1")


def test_the_builtin_parsers_import_no_vllm_and_others_leave_the_environment_as_it_was(directories):
    script = (
        "import os, sys; from pathlib import Path; from lightning_gym.policy.chat import ChatFormat\n"
        f"path = Path({str(directories['qwen3'])!r})\n"
        "chat = ChatFormat(path); chat.parse(chat.encode('<tool_call>'))\n"
        "assert 'vllm' not in sys.modules\n"
        "before = dict(os.environ)\n"
        "ChatFormat(path, tool_parser='hermes'); assert 'vllm' in sys.modules\n"
        "assert dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
