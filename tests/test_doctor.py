"""What doctor finds on templates whose habits are known, and what it refuses to look at."""

import json

import pytest

from lightning_gym.cli import main
from lightning_gym.doctor import diagnosis_json, diagnosis_table, examine
from lightning_gym.errors import ConfigError
from lightning_gym.template_families import FAMILIES, save_family
from lightning_gym.testing import tiny_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def diagnoses(tmp_path_factory):
    return {name: examine(save_family(family, tmp_path_factory.mktemp(name))) for name, family in FAMILIES.items()}


def saved(directory, template, **config):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


# -- the families, trait by trait


@pytest.mark.parametrize(
    ("family", "trait", "outcome", "found"),
    [
        ("qwen3", "turn end", "exact", "<|im_end|> (2), the tokenizer's eos_token"),
        ("llama3", "turn end", "exact", "<|eot_id|> (428), not the tokenizer's eos_token, <|end_of_text|>"),
        ("gemma", "turn end", "exact", "<end_of_turn> (427), not the tokenizer's eos_token, <eos>"),
        ("mistral", "continuation", "spliced", "'</s>[INST] ask[/INST]' follows a turn"),
        ("qwen3", "beginning of text", "exact", "the template writes none"),
        ("llama3", "beginning of text", "exact", "writes <|begin_of_text|>; the tokenizer adds one to every text"),
        ("qwen3", "generation prompt", "exact", r"'<|im_start|>assistant\n'"),
        ("deepseek_r1", "generation prompt", "exact", "'<\uff5cAssistant\uff5c><think>\\n'"),
        ("mistral", "generation prompt", "exact", "none: a turn begins where the user's ends"),
        ("qwen3", "system message", "exact", "a turn of its own"),
        ("mistral", "system message", "exact", "written into the user's turn"),
        ("gemma", "system message", "refused", "refused: System role not supported"),
        ("qwen3", "tools", "exact", "written"),
        ("trimmed", "tools", "exact", "definitions are left out"),
        ("gemma", "tools", "refused", "refused: Conversation roles must alternate"),
        ("qwen3", "tool calls", "spliced", "JSON as Python writes it, keys in the order of the call; the name before"),
        ("rewritten_calls", "tool calls", "spliced", "compact JSON, keys sorted; the arguments before the name"),
        ("qwen3", "reasoning of earlier turns", "spliced", "left out once the user speaks again"),
        ("deepseek_r1", "reasoning of earlier turns", "spliced", "left out"),
        ("trimmed", "reasoning of earlier turns", "spliced", "kept only inside the content"),
        ("qwen3", "white space", "exact", "kept"),
        ("trimmed", "white space", "spliced", "trimmed at the ends of what is said by: user, assistant"),
        ("mistral", "white space", "spliced", "trimmed at the ends of what is said by: assistant"),
        ("qwen3", "the assistant's words", "exact", "written verbatim"),
        ("qwen3", "earlier turns", "exact", "stay as they were written"),
        ("mistral", "earlier turns", "spliced", "written anew as the conversation goes on"),
        ("llama3", "time", "spliced", "the date is written"),
        ("qwen3", "time", "exact", "not written"),
        (
            "gemma",
            "two turns of one role",
            "refused",
            "refused, of: user, assistant (Conversation roles must alternate",
        ),
        ("qwen3", "two turns of one role", "exact", "written"),
    ],
)
def test_a_familys_habit_is_found(diagnoses, family, trait, outcome, found):
    seen = diagnoses[family][trait]
    assert seen.outcome == outcome
    assert found in seen.found
    assert seen.effect


def test_every_family_can_be_trained(diagnoses):
    assert all(diagnosis.trainable for diagnosis in diagnoses.values())


# -- templates that are worse


def test_a_template_without_a_turn_end_cannot_be_trained(tmp_path):
    diagnosis = examine(saved(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"))
    assert not diagnosis.trainable
    assert diagnosis["turn end"].outcome == "impossible"
    assert "expected a special token" in diagnosis["turn end"].found
    assert diagnosis["white space"].found == "kept"  # the rest is examined all the same
    assert "NOT trainable" in diagnosis_table(diagnosis)


def test_a_template_that_writes_words_twice_opens_new_segments(tmp_path):
    template = CHATML + "{% if messages | length > 2 %}{{ messages[1].content }}{% endif %}"
    diagnosis = examine(saved(tmp_path, template))
    assert diagnosis["continuation"].outcome == "new segment"
    assert diagnosis.trainable


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "changed or left out"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "written 2 times"),
    ],
)
def test_words_that_are_not_verbatim_are_told(tmp_path, template, found):
    trait = examine(saved(tmp_path, template))["the assistant's words"]
    assert (trait.found, trait.outcome) == (found, "spliced")


def test_calls_and_system_messages_that_are_left_out_are_told(tmp_path):
    template = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
    diagnosis = examine(saved(tmp_path, template))
    assert diagnosis["tool calls"].found == "left out"
    assert diagnosis["system message"].found == "left out"


# -- the vocabulary


@pytest.mark.parametrize(
    ("config", "outcome", "effect"),
    [
        ({"vocab_size": 426}, "exact", "nothing to align"),
        ({"text_config": {"vocab_size": 512}}, "exact", "86 rows stand for no token"),
        ({"vocab_size": 420}, "refused", "a prompt that spells one of the ids from 420 on cannot be fed"),
        ({"vocab_size": 2}, "impossible", "the model has no row for the turn end"),
        ({"hidden_size": 8}, "exact", "not checked"),
        ({}, "exact", "not checked"),
    ],
)
def test_the_vocabularies_of_tokenizer_and_model_are_compared(tmp_path, config, outcome, effect):
    diagnosis = examine(saved(tmp_path, CHATML, **config))
    trait = diagnosis["vocabulary"]
    assert (trait.outcome, effect in trait.effect) == (outcome, True)
    assert diagnosis.trainable == (outcome != "impossible")


# -- what cannot be examined


def test_a_directory_that_is_missing_or_empty_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no directory .*/nowhere; expected that of a transformers model"):
        examine(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no tokenizer that can be loaded .*expected tokenizer.json"):
        examine(tmp_path)


def test_a_model_without_a_template_is_refused_with_where_to_put_one(tmp_path):
    with pytest.raises(ConfigError, match=r"has no chat template; add `chat_template.jinja`"):
        examine(saved(tmp_path, None))


# -- the command


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    directory = str(saved(tmp_path, CHATML))
    main(["doctor", "--model", directory])
    table = capsys.readouterr().out
    assert table.startswith(directory)
    assert table.endswith("\ntrainable\n")
    assert max(map(len, table.splitlines())) <= 120
    main(["doctor", "--model", directory, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(diagnosis_json(examine(tmp_path)))
    assert (report["model"], report["trainable"]) == (directory, True)
    assert {"name", "found", "outcome", "effect"} == report["traits"][0].keys()


def test_the_command_exits_with_1_where_training_is_impossible(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--model", str(saved(tmp_path, "{{ messages }}"))])
    assert left.value.code == 1
    assert "impossible" in capsys.readouterr().out


def test_the_command_says_in_one_line_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="lightning-gym: there is no directory"):
        main(["doctor", "--model", str(tmp_path / "nowhere")])
