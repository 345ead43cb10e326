"""Dataset rows: every bad one is refused by file, line and key; and the cursor that deals the good ones."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gym.errors import ConfigError, TaskError
from lightning_gym.tasks import TaskCursor, blend_turns, check_agents, read_tasks, shard

AGENT = {"type": "responses_api_agents", "name": "counter"}
ROW = {"responses_create_params": {"input": "count"}, "agent_ref": AGENT, "target": 3}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def tasks(count):
    return read_tasks([ROW | {"target": i} for i in range(count)])


# -- reading


def test_rows_are_read_in_order_from_one_file_several_or_memory(tmp_path):
    first = write(tmp_path / "a.jsonl", ROW, "", "   ", ROW | {"target": 4})
    second = write(tmp_path / "b.jsonl", ROW | {"target": 5})
    assert [task.row["target"] for task in read_tasks(first)] == [3, 4]
    read = read_tasks([str(first), second, ROW | {"target": 6}])
    assert [(task.index, task.agent, task.row["target"]) for task in read] == [
        (0, "counter", 3),
        (1, "counter", 4),
        (2, "counter", 5),
        (3, "counter", 6),
    ]


def test_nulls_are_left_out_at_every_depth_and_false_values_stay():
    row = ROW | {
        "responses_create_params": {"input": [{"role": "user", "content": "x", "name": None}], "metadata": None},
        "zero": 0,
        "empty": "",
        "no": False,
        "nothing": None,
        "list": [None, {"a": None}],
    }
    (task,) = read_tasks([row])
    assert task.row["responses_create_params"] == {"input": [{"role": "user", "content": "x"}]}
    assert {key: task.row[key] for key in ("zero", "empty", "no", "list")} == {
        "zero": 0,
        "empty": "",
        "no": False,
        "list": [None, {}],
    }
    assert "nothing" not in task.row


def test_a_row_without_an_agent_takes_the_default_one():
    row = {key: value for key, value in ROW.items() if key != "agent_ref"}
    assert read_tasks([row], agent="mine")[0].agent == "mine"
    assert read_tasks([row | {"agent_ref": None}], agent="mine")[0].agent == "mine"
    assert read_tasks([ROW], agent="mine")[0].agent == "counter"


def test_each_file_can_have_a_default_agent_of_its_own(tmp_path):
    row = {key: value for key, value in ROW.items() if key != "agent_ref"}
    first = write(tmp_path / "a.jsonl", row, row)
    second = write(tmp_path / "b.jsonl", row, ROW)
    read = read_tasks([first, second], agent=["mine", "yours"])
    assert [task.agent for task in read] == ["mine", "mine", "yours", "counter"]
    assert read_tasks(first, agent=["mine"])[0].agent == "mine"


def test_agents_that_are_not_as_many_as_the_files_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(
        ConfigError, match=r"agent names 2 agents \(mine, yours\), and .*a\.jsonl is 1; name one for all"
    ):
        read_tasks(path, agent=["mine", "yours"])


BAD = {
    "not JSON": ("{", "not JSON"),
    "half a line": ('{"a": 1} {', "not JSON"),
    "a list": ("[1]", "expected a JSON object, got list"),
    "a text": ('"x"', "expected a JSON object, got str"),
    "null": ("null", "expected a JSON object, got NoneType"),
    "no params": ({"agent_ref": AGENT}, "`responses_create_params` with a non-empty `input`.*got None"),
    "params a list": (ROW | {"responses_create_params": []}, "`responses_create_params`"),
    "no input": (ROW | {"responses_create_params": {"tools": []}}, "non-empty `input`.*tools"),
    "empty input": (ROW | {"responses_create_params": {"input": []}}, "non-empty `input`"),
    "no agent": ({"responses_create_params": {"input": "x"}}, "`agent_ref`.*got None; pass `agent="),
    "agent a text": (ROW | {"agent_ref": "counter"}, "`agent_ref`.*got 'counter'"),
    "agent without name": (ROW | {"agent_ref": {"type": "x"}}, "`agent_ref`"),
    "agent name null": (ROW | {"agent_ref": {"name": None}}, "`agent_ref`"),
}


@pytest.mark.parametrize(("line", "said"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_by_file_line_and_key(tmp_path, line, said):
    path = write(tmp_path / "rows.jsonl", ROW, "", line, ROW)
    with pytest.raises(TaskError, match=rf"rows\.jsonl:3: .*{said}"):
        read_tasks(path)


def test_a_bad_row_in_memory_is_refused_by_its_number():
    with pytest.raises(TaskError, match=r"^row 1: .*`agent_ref`"):
        read_tasks([ROW, ROW | {"agent_ref": 7}])


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(TaskError) as caught:
        read_tasks([ROW | {"agent_ref": "x" * 1000}])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("wrong", [{}, "counter", 7, []])
def test_a_default_agent_does_not_excuse_a_wrong_one(wrong):
    with pytest.raises(TaskError, match="agent_ref"):
        read_tasks([ROW | {"agent_ref": wrong}], agent="mine")


def test_a_missing_file_and_an_empty_one_are_said(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        read_tasks(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match="no tasks"):
        read_tasks(write(tmp_path / "empty.jsonl", "", ""))
    with pytest.raises(ConfigError, match="no tasks"):
        read_tasks([])


def test_an_agent_that_this_gym_does_not_run_is_named_with_those_it_runs():
    check_agents(tasks(2), ["other", "counter"])
    with pytest.raises(ConfigError, match=r"task 0 is for agent 'counter', but this Gym runs a, b"):
        check_agents(tasks(2), ["b", "a"])
    with pytest.raises(ConfigError, match="runs no agents"):
        check_agents(tasks(1), [])


# -- dealing


def deal(cursor, count):
    dealt = cursor.peek(count)
    cursor.position += count
    return [(d.group_id, d.task.index) for d in dealt]


def test_without_shuffle_tasks_are_dealt_in_order_and_wrap():
    cursor = TaskCursor(tasks(3), shuffle=False)
    assert deal(cursor, 2) == [(0, 0), (1, 1)]
    assert deal(cursor, 5) == [(2, 2), (3, 0), (4, 1), (5, 2), (6, 0)]


def test_looking_does_not_deal():
    cursor = TaskCursor(tasks(5))
    assert cursor.peek(3) == cursor.peek(3)
    assert cursor.position == 0


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_every_pass_deals_every_task_once_however_it_is_cut(count, seed, cuts):
    cursor = TaskCursor(tasks(count), seed=seed)
    dealt = [pair for cut in cuts for pair in deal(cursor, cut)]
    assert [group for group, _ in dealt] == list(range(sum(cuts)))
    for start in range(0, len(dealt) - count + 1, count):
        assert sorted(index for _, index in dealt[start : start + count]) == list(range(count))
    at_once = TaskCursor(tasks(count), seed=seed)
    assert deal(at_once, sum(cuts)) == dealt


def test_passes_and_seeds_are_permuted_differently_and_repeatably():
    def passes(seed):
        cursor = TaskCursor(tasks(20), seed=seed)
        return [[index for _, index in deal(cursor, 20)] for _ in range(2)]

    assert passes(0)[0] != passes(0)[1]
    assert passes(0) != passes(1)
    assert passes(0) == passes(0)
    assert passes(0)[0] != list(range(20))


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 10))
def test_a_cursor_set_to_a_position_goes_on_as_one_that_came_there(position, count):
    walked, resumed = TaskCursor(tasks(7), seed=3), TaskCursor(tasks(7), seed=3)
    deal(walked, position)
    resumed.position = position
    assert deal(walked, count) == deal(resumed, count)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5))
def test_ranks_share_one_deal_each_task_whole_to_one_of_them(num_ranks, per_rank):
    count = num_ranks * per_rank
    shares = [shard(TaskCursor(tasks(5), seed=1).peek(count), rank, num_ranks) for rank in range(num_ranks)]
    assert all(len(share) == per_rank for share in shares)
    together = sorted((d.group_id, d.task.index) for share in shares for d in share)
    assert together == deal(TaskCursor(tasks(5), seed=1), count)


# -- several environments in one run


def tasks_of(**counts):
    rows = [task_row(agent) for agent, count in counts.items() for _ in range(count)]
    return read_tasks(rows)


def task_row(agent):
    return {"responses_create_params": {"input": "x"}, "agent_ref": {"type": "responses_api_agents", "name": agent}}


def test_agents_are_dealt_in_proportion_to_their_weights_at_every_position():
    cursor = TaskCursor(tasks_of(math=3, tools=50), agent_weights={"math": 3, "tools": 1})
    dealt = [one.task.agent for one in cursor.peek(400)]
    for position in range(1, 401):
        assert abs(dealt[:position].count("math") - 0.75 * position) <= 1


@given(
    weights=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 100), min_size=1),
    start=st.integers(0, 300),
    count=st.integers(1, 40),
)
def test_a_blend_is_the_same_wherever_it_is_entered(weights, start, count):
    assert blend_turns(weights, start, count) == blend_turns(weights, 0, start + count)[start:]


def test_every_task_of_an_agent_is_dealt_once_before_any_comes_again():
    tasks = tasks_of(math=3, tools=5)
    dealt = TaskCursor(tasks, agent_weights={"math": 1, "tools": 1}).peek(30)
    of_math = [one.task.index for one in dealt if one.task.agent == "math"]
    assert [sorted(of_math[i : i + 3]) for i in range(0, 15, 3)] == [[0, 1, 2]] * 5


def test_a_blend_resumes_from_its_position_alone():
    tasks = tasks_of(math=3, tools=5)
    whole = TaskCursor(tasks, agent_weights={"math": 1, "tools": 2.5}).peek(50)
    resumed = TaskCursor(tasks, agent_weights={"math": 1, "tools": 2.5})
    resumed.position = 20
    assert resumed.peek(30) == whole[20:]


def test_an_agent_without_a_weight_is_not_dealt():
    cursor = TaskCursor(tasks_of(math=3, tools=5), agent_weights={"tools": 1})
    assert {one.task.agent for one in cursor.peek(20)} == {"tools"}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"maths": 1}, "'maths', but the tasks are for math, tools"),
        ({"math": 0}, "'math' is 0; expected a positive number"),
        ({"math": float("nan")}, "expected a positive number"),
        ({}, "name at least one agent"),
    ],
)
def test_weights_that_deal_nothing_are_refused(weights, words):
    with pytest.raises(ConfigError, match=words):
        TaskCursor(tasks_of(math=1, tools=1), agent_weights=weights)
