"""What a run leaves for its reader: numbers that add up, and rollouts taken apart at the mask."""

import pytest

from lightning_gym import metrics, report

IDS, MASK = [10, 11, 20, 21, 30, 40], [0, 0, 1, 1, 0, 1]


def step(number, reward, **changes):
    values = {"step": number, metrics.REWARD: reward, metrics.ROLLOUTS: 8, "time/sync_s": 0.5, "time/train_cpu_s": 0.25}
    return values | changes


def summary(history, **changes):
    arguments = {"seed": 3, "train_seconds": 12.345, "start_seconds": {"engine": 1.239}, "reward_predicted": 0.4}
    return report.summarize(history, **arguments | changes)


def test_a_summary_adds_up_the_steps():
    history = [
        step(0, 0.25, **{metrics.LOGPROB_DIFF_MAX: 1e-5, metrics.DROPPED: 1, metrics.MISALIGNED: 1}),
        step(1, 0.5, **{metrics.LOGPROB_DIFF_MAX: 3e-5, metrics.TOKEN_MULT_PROB_ERROR: 1.01, "time/collect_s": 2.0}),
        step(2, 0.75, **{metrics.DROPPED: 2}),
    ]
    got = summary(history)
    assert got.pop("versions").keys() >= {"python", "torch", "lightning"}
    assert got == {
        "reward_predicted": 0.4,
        "reward_first": 0.25,
        "reward_last10": 0.5,
        "steps": 3,
        "rollouts": 24,
        "train_seconds": 12.35,
        "max_logprob_diff": 3e-5,
        "token_mult_prob_error": 1.01,
        "misaligned": 1,
        "dropped": 3,
        "seed": 3,
        "seconds": {"engine": 1.24, "sync": 1.5, "collect": 2.0, "prepare": 0.0, "train": 0.0},
        "cpu_seconds": {"sync": 0.0, "collect": 0.0, "prepare": 0.0, "train": 0.75},
    }


def test_the_last_reward_is_the_mean_of_the_last_ten_steps():
    assert summary([step(i, float(i)) for i in range(25)])["reward_last10"] == pytest.approx(19.5)


def test_a_run_without_a_step_has_a_summary_and_a_line():
    got = summary([])
    assert (got["steps"], got["reward_first"], got["reward_last10"], got["max_logprob_diff"]) == (0, None, None, None)
    assert report.summary_line(got) == "no optimizer step was finished"


def test_the_line_says_what_was_reached():
    history = [step(0, 0.25, **{metrics.LOGPROB_DIFF_MAX: 2e-5, metrics.DROPPED: 2}), step(1, 0.75)]
    assert report.summary_line(summary(history)) == (
        "reward 0.25 (predicted 0.40) -> 0.50 over the last 2 of 2 steps, 16 rollouts in 12 s; 0 misaligned, "
        "2 dropped, trainer and engine logprobs within 2.0e-05 nats"
    )
    bare = report.summary_line(summary([step(0, 0.25)], reward_predicted=None))
    assert bare.startswith("reward 0.25 -> 0.25 over the last 1 of 1 steps")
    assert "predicted" not in bare
    assert "nats" not in bare


@pytest.mark.parametrize("reward_predicted", [None, 0.4])
@pytest.mark.parametrize("count", [1, 25])
def test_the_curve_is_a_picture(tmp_path, reward_predicted, count):
    path = tmp_path / "reward.png"
    report.plot_reward([step(i, i / 25) for i in range(count)], path, reward_predicted=reward_predicted)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000


# -- rollouts in words


def logged(**changes):
    segment = {"token_ids": IDS, "loss_mask": MASK, "logprobs": [0, 0, -0.5, -0.25, 0, -1.0], "weight_version": 4}
    values = {
        "step": 4,
        "rollout_id": "run.0.train.7.1.0",
        "task_index": 3,
        "group_id": 7,
        "attempt": 1,
        "agent": "counter",
        "reward": 1.0,
        "advantage": -0.5,
        "truncated": False,
        "failure": None,
        "breaks": [],
        "segments": [segment],
    }
    return values | changes


def decode(ids):
    return ",".join(map(str, ids))


def test_spans_are_the_runs_of_the_mask_and_lose_no_token():
    described = report.describe_rollout(logged(), decode)
    (segment,) = described["segments"]
    assert segment["weight_version"] == 4
    assert segment["spans"] == [
        {"trained": False, "token_ids": [10, 11], "text": "10,11", "logprobs": []},
        {"trained": True, "token_ids": [20, 21], "text": "20,21", "logprobs": [-0.5, -0.25]},
        {"trained": False, "token_ids": [30], "text": "30", "logprobs": []},
        {"trained": True, "token_ids": [40], "text": "40", "logprobs": [-1.0]},
    ]
    assert [token for span in segment["spans"] for token in span["token_ids"]] == IDS
    assert described["reward"] == 1.0


@pytest.mark.parametrize(("mask", "lengths"), [([0] * 6, [6]), ([1] * 6, [6]), ([0, 1, 0, 1, 0, 1], [1] * 6)])
def test_a_mask_of_one_kind_is_one_span(mask, lengths):
    segment = logged()["segments"][0] | {"loss_mask": mask}
    spans = report.describe_rollout(logged(segments=[segment]), decode)["segments"][0]["spans"]
    assert [len(span["token_ids"]) for span in spans] == lengths


def test_a_segment_without_tokens_has_no_spans():
    segment = {"token_ids": [], "loss_mask": [], "logprobs": [], "weight_version": -1}
    assert report.describe_rollout(logged(segments=[segment]), decode)["segments"][0]["spans"] == []


def test_a_rollout_reads_as_prompt_and_sampled_lines():
    text = report.rollout_text(report.describe_rollout(logged(), decode))
    lines = text.splitlines()
    assert "run.0.train.7.1.0" in lines[0]
    assert "reward +1.000" in text
    assert "advantage -0.500" in text
    assert [line.strip() for line in lines if line.strip().startswith((">", "|"))] == [
        '| "10,11"',
        '> "20,21"',
        '| "30"',
        '> "40"',
    ]
    assert "logprobs [-0.5, -0.25]" in text
    assert "truncated" not in text


def test_a_broken_history_is_told_with_its_call_and_reason():
    broke = {"kind": "edited_history", "call_index": 1, "detail": "message 1: differs"}
    text = report.rollout_text(report.describe_rollout(logged(breaks=[broke]), decode))
    assert "call 1 opened a new segment (edited_history): message 1: differs" in text


def test_a_break_with_its_place_in_tokens_shows_both_sides_and_the_likely_rule():
    broke = {
        "kind": "edited_history",
        "call_index": 1,
        "detail": "message 2: differs",
        "token_offset": 17,
        "expected_text": "<think>\n hm",
        "got_text": "größe",
        "likely_rule": "earlier reasoning dropped",
    }
    text = report.rollout_text(report.describe_rollout(logged(breaks=[broke]), decode))
    assert "opened a new segment (edited_history, likely: earlier reasoning dropped): message 2: differs\n" in text
    assert '    from token 17 on: was "<think>\\n hm", is "größe"\n' in text


def test_a_failed_rollout_says_why():
    failed = logged(
        failure={"kind": "timeout", "message": "no answer"}, reward=None, advantage=None, truncated=True, segments=[]
    )
    text = report.rollout_text(report.describe_rollout(failed, decode))
    assert "FAILED timeout: no answer" in text
    assert "reward none  advantage none" in text
    assert "truncated" in text
