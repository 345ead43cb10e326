"""The tiny policy starts where its teacher says it does, and lives in the token ids it will be served."""

import json
import random

import pytest

from lightning_gym.errors import ConfigError
from lightning_gym.gym.environments import load_environment
from lightning_gym.testing import tiny_tokenizer
from lightning_gym.tiny_policy.build import TinyPolicy, read_record
from lightning_gym.tiny_policy.demonstrations import TEACHERS, CounterTeacher, Encoder

TOKENIZER = tiny_tokenizer()
FEW = {
    "num_layers": 1,
    "hidden_size": 64,
    "sft_steps": 2,
    "batch_size": 2,
    "train_rows": 4,
    "validation_rows": 2,
    "measured_rollouts": 2,
}

both = pytest.mark.parametrize("environment", ["counter", "reverse_string"])


def demonstrations(environment, number, seed=0, **settings):
    rng = random.Random(seed)
    teacher = TEACHERS[environment](**settings)
    rows = [teacher.environment.row(rng) for _ in range(number)]
    return teacher, [(row, teacher.demonstrate(row, rng)) for row in rows]


def reward(row, messages, environment):
    """Play the assistant's side of a demonstration against a fresh environment and ask for the reward."""
    episode = load_environment(environment)(row)
    output = []
    for message in messages:
        for call in message.get("tool_calls") or []:
            episode.call_tool(call["function"]["name"], json.loads(call["function"]["arguments"]))
        if message["role"] == "assistant" and message["content"] is not None:
            content = [{"type": "output_text", "text": message["content"]}]
            output.append({"type": "message", "role": "assistant", "content": content})
    return episode.verify({"output": output})


def spans(encoded):
    """The runs of trained tokens."""
    found, open_span = [], False
    for token_id, trained in zip(encoded.token_ids, encoded.loss_mask, strict=True):
        if trained and not open_span:
            found.append([])
        if trained:
            found[-1].append(token_id)
        open_span = trained
    return found


@both
def test_the_predicted_reward_is_the_mean_reward_of_the_demonstrations(environment):
    teacher, played = demonstrations(environment, 4000)
    predicted = [teacher.expected_reward(row) for row, _ in played]
    measured = sum(reward(row, messages, environment) for row, messages in played) / len(played)
    variance = sum(p * (1 - p) for p in predicted) / len(played)
    assert abs(measured - sum(predicted) / len(played)) < 3 * (variance / len(played)) ** 0.5


@both
def test_a_policy_starts_where_reinforcement_learning_has_most_to_tell(environment):
    teacher, played = demonstrations(environment, 500)
    assert 0.40 < sum(teacher.expected_reward(row) for row, _ in played) / len(played) < 0.50


def test_two_wrong_numbers_may_cancel():
    """For "add 1 then add 1", only wrong numbers 0 and 2 could: 0 is no digit of 1..9, so nothing cancels."""
    teacher = CounterTeacher(error_probability=0.5)

    def row(prompt):
        return {"responses_create_params": {"input": [{"role": "user", "content": prompt}]}}

    assert teacher.expected_reward(row("add 1 then add 1 then get the count")) == 0.25
    # 2 + 2 = 1 + 3 = 3 + 1: two of the 64 pairs of wrong numbers.
    assert teacher.expected_reward(row("add 2 then add 2 then get the count")) == 0.25 + 0.25 * 2 / 64


@both
def test_a_teacher_that_never_errs_is_always_rewarded(environment):
    teacher, played = demonstrations(environment, 50, error_probability=0.0)
    assert {teacher.expected_reward(row) for row, _ in played} == {1.0}
    assert {reward(row, messages, environment) for row, messages in played} == {1.0}


@both
def test_demonstrations_start_with_the_ids_of_the_template(environment):
    for row, messages in demonstrations(environment, 20)[1]:
        prompt = row["responses_create_params"]["input"]
        ids = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        encoded = Encoder(TOKENIZER).conversation(messages)
        assert encoded.token_ids[: len(ids)] == ids
        assert encoded.loss_mask[: len(ids) + 1] == [False] * len(ids) + [True]


@both
def test_every_trained_span_is_one_assistant_turn_up_to_its_end(environment):
    for _, messages in demonstrations(environment, 20)[1]:
        turns = [message for message in messages if message["role"] == "assistant"]
        trained = spans(Encoder(TOKENIZER).conversation(messages))
        assert len(trained) == len(turns)
        for turn, span in zip(turns, trained, strict=True):
            assert [span.index(TOKENIZER.eos_token_id)] == [len(span) - 1]
            rendered = TOKENIZER.apply_chat_template([turn], tokenize=False)
            assert f"<|im_start|>assistant\n{TOKENIZER.decode(span)}\n" == rendered


@both
def test_demonstrations_say_what_the_template_says(environment):
    for _, messages in demonstrations(environment, 20)[1]:
        encoded = Encoder(TOKENIZER).conversation(messages)
        assert TOKENIZER.decode(encoded.token_ids) + "\n" == TOKENIZER.apply_chat_template(messages, tokenize=False)


def test_counter_demonstrations_make_parallel_calls_as_often_as_asked():
    turns = [
        [len(message["tool_calls"]) for message in messages if message.get("tool_calls")]
        for _, messages in demonstrations("counter", 1000)[1]
    ]
    assert {tuple(turn) for turn in turns} == {(2, 1), (1, 1, 1)}
    assert abs(turns.count([2, 1]) / 1000 - 0.7) < 3 * (0.7 * 0.3 / 1000) ** 0.5


@both
def test_a_built_policy_is_a_checkpoint_with_its_rows_and_its_record(environment, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    built = TinyPolicy(environment=environment, seed=3, **FEW).ensure(tmp_path)
    assert built == tmp_path / f"{environment}-seed3"
    assert [path.name for path in tmp_path.iterdir()] == [built.name], "the scratch directory is gone"
    record = read_record(built)
    model = AutoModelForCausalLM.from_pretrained(built, local_files_only=True)
    assert model.num_parameters() == record["parameters"]
    assert len(AutoTokenizer.from_pretrained(built, local_files_only=True)) == record["vocab_size"]
    sampling = GenerationConfig.from_pretrained(built, local_files_only=True)
    assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.top_p) == (True, 1.0, 0, 1.0)
    rows = [json.loads(line) for line in (built / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert len((built / "validation.jsonl").read_text().splitlines()) == 2
    assert all(load_environment(environment)(row) for row in rows)
    assert record["rollouts_measured"] == 2
    assert 0.0 <= record["reward_measured"] <= 1.0


def test_equal_settings_return_what_is_there_and_a_changed_one_builds_again(tmp_path):
    policy = TinyPolicy(environment="reverse_string", **FEW)
    weights = policy.ensure(tmp_path) / "model.safetensors"
    first = weights.stat().st_mtime_ns
    assert policy.ensure(tmp_path) == weights.parent
    assert weights.stat().st_mtime_ns == first
    TinyPolicy(environment="reverse_string", **FEW | {"lr": 1e-3}).ensure(tmp_path)
    assert weights.stat().st_mtime_ns > first
    assert read_record(weights.parent)["settings"]["lr"] == 1e-3


def test_greedy_generation_does_not_depend_on_the_seed(tmp_path):
    """A built checkpoint says of itself that it samples; asked for its likeliest tokens, it must not."""
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_gym.tiny_policy.measure import _generate

    built = TinyPolicy(environment="reverse_string", seed=0, **FEW).ensure(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(built, local_files_only=True).eval()

    def said(temperature, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _generate(model, TOKENIZER, [[5, 6, 7]], temperature, max_new_tokens=4)

    assert said(0.0, seed=1) == said(0.0, seed=2)
    assert said(1.0, seed=1) == said(1.0, seed=1)
    assert said(1.0, seed=1) != said(1.0, seed=2)


def test_an_unknown_environment_is_refused_by_name():
    with pytest.raises(ConfigError, match="counter, reverse_string, got 'chess'"):
        TinyPolicy(environment="chess")
