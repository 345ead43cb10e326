"""The teachers of the warm starts on NeMo Gym's environments: what they say, turn by turn."""

import json
import random

import pytest

from lightning_gym.gym.environments import Counter
from lightning_gym.gym_policy.environments import GYM_ENVIRONMENTS

SUM = "Get me the values for ((1.0 + 2.0) * 3.0), and sin(5.0) using only the given tools."
MATH = {"responses_create_params": {"input": [{"role": "user", "content": SUM}]}}
OFFICE = {
    "ground_truth": [{"name": "reply", "arguments": '{"id": "00000057"}'}, {"name": "delete", "arguments": '{"id": 1}'}]
}


class Draws(random.Random):
    """Always draws the same number."""

    def __init__(self, number):
        super().__init__(0)
        self.number = number

    def random(self):
        return self.number

    def choice(self, options):
        return options[-1]


def play(name, row, rng, result, turns=10):
    """The calls that a teacher makes, each answered with what `result` says of it."""
    messages, made = [], []
    for _ in range(turns):
        said = GYM_ENVIRONMENTS[name].turn(row, messages, rng)
        if "tool_calls" not in said:
            return made
        (one,) = said["tool_calls"]
        function = one["function"]
        made.append((function["name"], json.loads(function["arguments"])))
        messages += [said, {"role": "tool", "tool_call_id": one["id"], "content": result(*made[-1])}]
    raise AssertionError("the teacher does not end")


def calculated(_name, arguments):
    return json.dumps({"solution": sum(arguments.values())})


def test_the_teacher_of_calculators_makes_one_call_a_turn_with_the_results_of_those_before():
    made = play("math_advanced_calculations", MATH, Draws(0.0), calculated)
    assert made == [("add", {"a": 1.0, "b": 2.0}), ("multiply", {"a": 3.0, "b": 3.0}), ("sin", {"radians": 5.0})]


def test_a_mistake_of_the_teacher_of_calculators_is_not_made_good():
    assert play("math_advanced_calculations", MATH, Draws(0.9), calculated) == [("negate", {"a": 1.0, "b": 2.0})]


def test_the_teacher_of_the_office_makes_the_right_changes_one_a_turn():
    made = play("workplace_assistant", OFFICE, Draws(0.9), lambda *_: "done")
    assert made == [("reply", {"id": "00000057"}), ("delete", {"id": 1})]


def test_its_mistake_is_another_document():
    made = play("workplace_assistant", OFFICE, Draws(0.0), lambda *_: "not found")
    assert made == [("reply", {"id": "00001057"}), ("delete", {"id": 1})]


@pytest.mark.parametrize("seed", range(3))
def test_the_teacher_of_the_counter_is_right_about_half_of_the_time_and_never_off_the_mark(seed):
    environment, rng = GYM_ENVIRONMENTS["example_session_state_mgmt"], random.Random(seed)
    row = Counter.row(rng)
    numbers = [int(word) for word in row["responses_create_params"]["input"][0]["content"].split() if word.isdigit()]
    right = 0
    for _ in range(400):
        calls = environment.turn(row, row["responses_create_params"]["input"], rng)["tool_calls"]
        said = [json.loads(call["function"]["arguments"])["count"] for call in calls]
        assert {call["function"]["name"] for call in calls} == {"increment_counter"}
        right += said == numbers
    assert 0.4 < right / 400 < 0.7


def test_the_teacher_of_the_calculators_goes_from_the_inside_out_and_keeps_its_mistakes():
    environment = GYM_ENVIRONMENTS["math_advanced_calculations"]
    prompt = "Get me the value for (4.0 ** 6.0 / pi) using only the given tools."
    row = {"responses_create_params": {"input": [{"role": "user", "content": prompt}]}, "depth": 2}
    results = {"power": 65536.0, "pi": 2.718281828459045, "divide": 12054.673528305822}

    def play(seed):
        rng, messages, names = random.Random(seed), list(row["responses_create_params"]["input"]), []
        while (said := environment.turn(row, messages, rng)).get("tool_calls"):
            (function,) = [call["function"] for call in said["tool_calls"]]
            name = function["name"]
            names.append(name)
            reply = {"solution": results[name]} if name in results else {"detail": "no"}
            messages += [said, {"role": "tool", "content": json.dumps(reply)}]
        assert said["content"] == "done"
        return names

    played = [play(seed) for seed in range(40)]
    right = ["power", "pi", "divide"]
    assert right in played
    mistaken = [names for names in played if names != right]
    assert mistaken
    for names in mistaken:
        assert names[:-1] == right[: len(names) - 1]
        assert names[-1] in ("add", "multiply", "negate"), "the mistake is the last call"
