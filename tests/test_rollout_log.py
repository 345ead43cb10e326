"""The rollout log: what is written is what is read, line by line."""

import json

import numpy as np
import pytest

from lightning_gym.errors import ConfigError, LogError
from lightning_gym.rollout import Failure, FailureKind, Rollout, SpliceBreak
from lightning_gym.rollout_log import FORMAT, RolloutLog, read_rollout_log
from lightning_gym.testing import tiny_trajectory

BREAK = {
    "kind": "branch",
    "call_index": 1,
    "detail": "continues call 0",
    "token_offset": 12,
    "expected_text": "was",
    "got_text": "is",
    "likely_rule": "parallel branch",
}


def rollout(rollout_id="a", **changes):
    values = {
        "rollout_id": rollout_id,
        "task_index": 3,
        "group_id": 7,
        "attempt": 1,
        "agent": "counter",
        "reward": 0.5,
        "seconds": 1.23456,
        "output": [{"type": "message", "content": "größe"}],
        "prompt": [{"role": "user", "content": "count"}],
        "metrics": {"steps": 2.0},
        "breaks": (SpliceBreak(**BREAK),),
    }
    return Rollout(**values | changes)


def written(path, *collections, resume=False):
    log = RolloutLog(path, path.parent / "model", resume=resume)
    for arguments in collections:
        log.write(*arguments)
    log.close()
    model, lines = read_rollout_log(path)
    return model, list(lines)


def test_a_rollout_comes_back_as_it_was_written(tmp_path):
    segments = [tiny_trajectory(weight_version=4), tiny_trajectory(num_prompt=1, num_trained=1)]
    model, (line,) = written(tmp_path / "log.jsonl", (4, [rollout()], {"a": segments}, {"a": -0.25}))
    assert model == tmp_path / "model"
    assert {key: value for key, value in line.items() if key != "segments"} == {
        "step": 4,
        "rollout_id": "a",
        "task_index": 3,
        "group_id": 7,
        "attempt": 1,
        "agent": "counter",
        "reward": 0.5,
        "advantage": -0.25,
        "truncated": False,
        "seconds": 1.2346,
        "failure": None,
        "breaks": [BREAK],
        "metrics": {"steps": 2.0},
        "prompt": [{"role": "user", "content": "count"}],
        "output": [{"type": "message", "content": "größe"}],
        "reward_components": {},
        "masked": False,
        "context_overflow": False,
        "invalid_tool_calls": 0,
        "unconfirmed_calls": 0,
        "ids_lost": False,
    }
    first, second = line["segments"]
    assert first["token_ids"] == [1, 2, 3, 4]
    assert [bool(flag) for flag in first["loss_mask"]] == [False, False, True, True]
    assert first["logprobs"] == [0.0, 0.0, -1.0, -1.0]
    assert first["weight_version"] == 4
    assert second["token_ids"] == [1, 2]


def test_a_failed_rollout_is_written_with_its_cause_and_no_advantage(tmp_path):
    failure = Failure(kind=FailureKind.TIMEOUT, message="no answer")
    _, (line,) = written(tmp_path / "log.jsonl", (0, [rollout(reward=None, failure=failure)], {}, {}))
    assert line["failure"] == {"kind": "timeout", "message": "no answer"}
    assert (line["reward"], line["advantage"], line["segments"]) == (None, None, [])


def test_directories_are_made_and_a_resumed_log_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "run" / "deep" / "log.jsonl"
    written(path, (0, [rollout("a")], {}, {}), resume=True)
    _, lines = written(path, (1, [rollout("b"), rollout("c")], {}, {}), resume=True)
    assert [(line["step"], line["rollout_id"]) for line in lines] == [(0, "a"), (1, "b"), (1, "c")]
    assert sum("format" in json.loads(line) for line in path.read_text().splitlines()) == 1


def test_what_was_written_can_be_read_while_the_run_goes_on(tmp_path):
    log = RolloutLog(tmp_path / "log.jsonl", tmp_path)
    log.write(0, [rollout()], {}, {})
    assert len(list(read_rollout_log(tmp_path / "log.jsonl")[1])) == 1
    log.close()


def test_logprobs_come_back_as_the_same_floats(tmp_path):
    values = np.concatenate([-np.random.default_rng(0).exponential(size=500), [-7e-9, -1e-30, -87.3]])
    trajectory = tiny_trajectory(num_prompt=1, num_trained=len(values))
    trajectory.rollout_logprobs[1:] = values
    _, (line,) = written(tmp_path / "log.jsonl", (0, [rollout()], {"a": [trajectory]}, {}))
    assert np.array_equal(np.float32(line["segments"][0]["logprobs"]), trajectory.rollout_logprobs)


@pytest.mark.parametrize("text", ["", "\n", "[]\n", '{"format": "other/1"}\n', "not JSON\n", '{"reward": 1}\n'])
def test_another_file_is_refused_by_its_first_line(tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"other\.jsonl is not a rollout log.*'{FORMAT}'"):
        read_rollout_log(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        read_rollout_log(tmp_path / "gone.jsonl")


def test_rollouts_before_a_line_that_was_cut_off_are_read_and_the_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    written(path, (0, [rollout("a"), rollout("b")], {}, {}))
    path.write_bytes(path.read_bytes()[:-9])
    _, lines = read_rollout_log(path)
    assert next(lines)["rollout_id"] == "a"
    with pytest.raises(ConfigError, match=r"log\.jsonl, line 3: .*lightning-gym report"):
        next(lines)


def test_a_resumed_log_replaces_what_is_played_again_and_a_line_that_was_cut(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    log = RolloutLog(path, tmp_path)
    for step in range(3):
        log.write(step, [rollout(f"before-{step}")], {}, {})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "rollo')
    log = RolloutLog(path, tmp_path, resume=True)
    for step in (2, 3):
        log.write(step, [rollout(f"after-{step}")], {}, {})
    log.close()
    _, lines = read_rollout_log(path)
    assert [line["rollout_id"] for line in lines] == ["before-0", "before-1", "after-2", "after-3"]


def test_a_log_on_a_full_disk_says_so_and_what_to_do(tmp_path):
    (tmp_path / "rollouts.jsonl").symlink_to("/dev/full")
    with pytest.raises(LogError, match=r"rollouts\.jsonl cannot be written to: No space left on device\. Make room"):
        RolloutLog(tmp_path / "rollouts.jsonl", tmp_path)
