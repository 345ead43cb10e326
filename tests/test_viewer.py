"""The report's data: what is read of a run in any state, what is chosen, and what the page is given."""

import base64
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_gym.errors import ConfigError
from lightning_gym.rollout import Rollout
from lightning_gym.rollout_log import FORMAT
from lightning_gym.testing import tiny_tokenizer
from lightning_gym.viewer.contents import contents
from lightning_gym.viewer.report import write_report
from lightning_gym.viewer.run_dir import Entry, Metrics, read_run_dir
from lightning_gym.viewer.selection import select, spread
from lightning_gym.viewer.token_texts import TokenTexts
from tests.viewer_runs import HOSTILE, RunWriter

PAGE = Path(write_report.__code__.co_filename).parent / "page"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with everything in its directory; tests copy what they damage."""
    run = RunWriter(tmp_path_factory.mktemp("runs") / "finished")
    run.steps(3, prompts=4, group_size=4)
    run.close()
    (run.path / "summary.json").write_text(json.dumps({"steps": 3, "rollouts": 48}))
    return run.path


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of the run, to be damaged."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


def shown(path, **changes):
    run = read_run_dir(path)
    return contents(run, select(run.entries, **changes))


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


# -- a whole run


def test_a_whole_run_has_no_problems_and_all_its_rollouts(finished):
    data = shown(finished)
    assert data["problems"] == []
    assert data["note"] is None
    assert len(data["rollouts"]) == data["num_rollouts"] == 48
    assert data["summary"] == {"steps": 3, "rollouts": 48}
    assert data["metrics"]["steps"] == list(range(30))


def test_tokens_mask_and_logprobs_come_through_exactly(finished):
    data = shown(finished)
    trainer = {}
    for line in (finished / "trainer_logprobs.jsonl").read_text().splitlines():
        logged = json.loads(line)
        trainer[logged["rollout_id"], logged["segment"]] = logged["logprobs"]
    lines = [json.loads(line) for line in (finished / "rollouts.jsonl").read_text().splitlines()[1:]]
    by_id = {rollout["id"]: rollout for rollout in data["rollouts"]}
    num_segments = 0
    for line in lines:
        rollout = by_id[line["rollout_id"]]
        assert data["prompts"][rollout["prompt"]] == line["prompt"]
        assert rollout["output"] == line["output"]
        for index, (segment, logged) in enumerate(zip(rollout["segments"], line["segments"], strict=True)):
            num_segments += 1
            assert [data["tokens"]["ids"][i] for i in unpacked(segment["ids"], "<u4")] == logged["token_ids"]
            mask = [run % 2 for run, length in enumerate(segment["runs"]) for _ in range(length)]
            assert mask == logged["loss_mask"]
            engine = [value for value, trains in zip(logged["logprobs"], mask, strict=True) if trains]
            assert unpacked(segment["engine"], "<f4").tolist() == pytest.approx(engine, abs=1e-6)
            expected = trainer[line["rollout_id"], index]
            assert unpacked(segment["trainer"], "<f4").tolist() == pytest.approx(expected, abs=1e-6)
            assert segment["version"] == line["step"]
            spans = [(call["start"], call["stop"]) for call in logged["calls"]]
            assert [(start, stop) for start, stop, *_ in segment["calls"]] == spans
        gaps = [
            abs(a - b)
            for index, segment in enumerate(rollout["segments"])
            for a, b in zip(unpacked(segment["engine"], "<f4"), trainer[line["rollout_id"], index], strict=True)
        ]
        assert rollout["gap"] == pytest.approx(max(gaps), abs=1e-6) if gaps else rollout["gap"] is None
    assert num_segments > 40


def test_what_is_worth_a_word_is_said_of_the_rollouts_it_holds_for(finished):
    remarks = {one["id"]: " ".join(one["remarks"]) for one in shown(finished)["rollouts"]}
    lines = [json.loads(line) for line in (finished / "rollouts.jsonl").read_text().splitlines()[1:]]
    for word, key in {"masked": "masked", "truncated": "truncated"}.items():
        assert {one["rollout_id"] for one in lines if one[key]} == {
            name for name, said in remarks.items() if word in said
        }
    assert any("masked" in said for said in remarks.values())
    assert any(one["components"] for one in shown(finished)["rollouts"])


def test_each_distinct_id_is_decoded_once_and_prompts_are_held_once(finished):
    data = shown(finished)
    ids = data["tokens"]["ids"]
    assert len(ids) == len(set(ids)) == len(data["tokens"]["texts"])
    assert len(data["prompts"]) < len(data["rollouts"])


def test_the_page_holds_no_markup_of_the_runs_and_asks_for_nothing(finished, tmp_path):
    page = write_report(finished, tmp_path / "deep" / "report.html").read_text()
    assert page.lower().count("<script") == 2
    assert page.lower().count("</script") == 2
    assert "<!--" not in page
    assert HOSTILE not in page
    assert re.search(r"(?:src|href)\s*=\s*[\"'](?!x )|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page) is None
    data = json.loads(re.search(r'id="contents">(.*?)</script>', page, flags=re.DOTALL)[1])
    assert HOSTILE in json.dumps(data, ensure_ascii=False).replace('\\"', '"')


@pytest.mark.parametrize("script", sorted(PAGE.glob("*.js")), ids=lambda path: path.name)
def test_no_script_can_turn_text_into_markup(script):
    text = script.read_text()
    assert (
        re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|</script", text)
        is None
    )


def test_a_directory_whose_name_is_a_placeholder_or_markup_is_a_name(damaged, tmp_path):
    run = damaged.rename(tmp_path / "{{contents}} <b>")
    page = write_report(run).read_text()
    assert "<title>{{contents}} &lt;b&gt;" in page


# -- runs in every other state


def test_a_last_line_that_was_cut_off_is_named_and_the_others_are_shown(damaged):
    path = damaged / "rollouts.jsonl"
    path.write_bytes(path.read_bytes()[:-50])
    data = shown(damaged)
    assert len(data["rollouts"]) == 47
    assert data["problems"] == ["rollouts.jsonl, line 49: cut off; the run was ended while it wrote."]


def test_damaged_lines_are_counted_and_the_others_are_shown(damaged):
    path = damaged / "rollouts.jsonl"
    lines = path.read_text().splitlines()
    lines[3:11] = ["not JSON", "{}", "[]", "null", '{"rollout_id": 3, "step": 0}', "\x00\x00", '{"step": 1}', "5"]
    path.write_text("\n".join(lines) + "\n")
    data = shown(damaged)
    assert len(data["rollouts"]) == 40
    assert len(data["problems"]) == 6
    assert data["problems"][0].startswith("rollouts.jsonl, line 4: left out, ")
    assert data["problems"][-1] == "rollouts.jsonl: 3 more lines cannot be read."


def test_a_rollout_whose_lists_differ_in_length_is_left_out_by_name(damaged):
    path = damaged / "rollouts.jsonl"
    lines = path.read_text().splitlines()
    rollout = json.loads(lines[1])
    rollout["segments"][0]["logprobs"].pop()
    path.write_text("\n".join([lines[0], json.dumps(rollout), *lines[2:]]) + "\n")
    data = shown(damaged)
    assert len(data["rollouts"]) == 47
    (problem,) = data["problems"]
    assert problem.startswith(f"Rollout {rollout['rollout_id']} of step 0 cannot be shown: ")


def test_without_metrics_the_curves_are_counted_from_the_rollouts(damaged):
    (damaged / "csv" / "metrics.csv").unlink()
    data = shown(damaged)
    assert data["problems"][0].startswith("csv/metrics.csv is missing")
    series = data["metrics"]["series"]
    assert data["metrics"]["steps"] == [0, 1, 2]
    assert series["rollout/count"] == [16, 16, 16]
    of_step = [one for one in data["rollouts"] if one["step"] == 1]
    rewards = [one["reward"] for one in of_step if one["reward"] is not None]
    assert series["rollout/reward_mean"][1] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    assert sum(series["rollout/splice_breaks"]) == sum(len(one["breaks"]) for one in data["rollouts"])
    failed = sum(one["failure"] is not None for one in data["rollouts"])
    assert sum(sum(values) for name, values in series.items() if name.startswith("rollout/failed_")) == failed > 0


@pytest.mark.parametrize(
    ("text", "steps", "problem"),
    [
        ("", None, "csv/metrics.csv has no line of numbers."),
        ("step,a\n", None, "csv/metrics.csv has no line of numbers."),
        ("what\nis this\n", None, "csv/metrics.csv: 2 lines are not whole and left out."),
        ("step,a\n0,1.5\n1,nan\n2", [0, 1], "csv/metrics.csv: 1 lines are not whole and left out."),
        ("step,a,b\n0,1.5,\n0,,2\n1,2,inf\n", [0, 1], None),
    ],
)
def test_numbers_in_any_state_are_read_as_far_as_they_go(damaged, text, steps, problem):
    (damaged / "csv" / "metrics.csv").write_text(text)
    (damaged / "rollouts.jsonl").write_text(json.dumps({"format": FORMAT, "model": "gone"}) + "\n")
    run = read_run_dir(damaged)
    assert (None if run.metrics is None else run.metrics.steps) == steps
    assert problem is None or problem in run.problems
    if steps and "b" in text:
        assert run.metrics.series == {"a": [1.5, 2.0], "b": [2.0, None]}


def test_a_run_that_ended_before_its_first_rollout_says_so(damaged):
    for name in ("csv/metrics.csv", "trainer_logprobs.jsonl", "summary.json"):
        (damaged / name).unlink()
    (damaged / "rollouts.jsonl").write_text(json.dumps({"format": FORMAT, "model": "gone"}) + "\n")
    data = shown(damaged)
    assert (data["rollouts"], data["metrics"]) == ([], None)
    assert (
        "rollouts.jsonl has no rollout that can be read: the run ended before its first step was played."
        in (data["problems"])
    )
    assert write_report(damaged).stat().st_size > 20_000


def test_a_log_without_its_first_line_is_read_all_the_same(damaged):
    path = damaged / "rollouts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    data = shown(damaged)
    assert len(data["rollouts"]) == 48
    assert "does not begin as a rollout log does" in data["problems"][0]
    assert data["tokens"]["texts"] is None


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_summary_that_cannot_be_read_is_a_problem_and_no_error(damaged, text):
    (damaged / "summary.json").write_text(text)
    data = shown(damaged)
    assert data["summary"] is None
    assert data["problems"][0].startswith("summary.json ")


def test_without_a_tokenizer_the_ids_are_shown_and_another_model_can_be_named(damaged):
    model = (damaged / "model").rename(damaged / "moved")
    path = damaged / "rollouts.jsonl"
    path.write_text(path.read_text().replace(str(model.parent.parent), "elsewhere", 1))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"format": FORMAT, "model": "gone"}), *lines[1:]]) + "\n")
    data = shown(damaged)
    assert data["tokens"]["texts"] is None
    assert data["problems"] == [
        "There is no tokenizer at gone, so tokens are shown by their ids; name one with --model."
    ]
    run = read_run_dir(damaged)
    assert contents(run, select(run.entries), model=damaged / "moved")["tokens"]["texts"] is not None


def test_absent_trainer_logprobs_are_told_with_what_to_do(damaged):
    (damaged / "trainer_logprobs.jsonl").unlink()
    data = shown(damaged)
    assert '"logprobs": logprobs' in data["problems"][0]
    assert {segment["trainer"] for rollout in data["rollouts"] for segment in rollout["segments"]} == {None}


def test_a_log_of_the_first_format_without_later_keys_is_read(damaged):
    segment = {"token_ids": [5, 6], "loss_mask": [0, 1], "logprobs": [0.0, -0.5]}
    line = {"rollout_id": "a", "step": 0, "reward": 1.0, "segments": [segment]}
    head = json.dumps({"format": FORMAT, "model": str(damaged / "model")})
    (damaged / "rollouts.jsonl").write_text(f"{head}\n{json.dumps(line)}\n")
    (rollout,) = shown(damaged)["rollouts"]
    assert (rollout["id"], rollout["reward"], rollout["advantage"], rollout["breaks"]) == ("a", 1.0, None, [])


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_directory_of_no_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"expected the output directory of a run"):
        write_report(tmp_path / name)


def test_a_report_that_cannot_be_written_says_where_and_what_to_do(finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written to .*file/report\.html.*--out"):
        write_report(finished, tmp_path / "file" / "report.html")


def test_rollouts_of_all_ranks_are_shown_with_their_rank(damaged):
    other = RunWriter(damaged / "rank_1")
    other.log.write(
        0, [Rollout(rollout_id="far", task_index=0, group_id=99, attempt=0, agent="counter", reward=1.0)], {}, {}
    )
    other.close(metrics=False)
    data = shown(damaged)
    assert {one["rank"] for one in data["rollouts"]} == {0, 1}
    assert [one["id"] for one in data["rollouts"] if one["rank"] == 1] == ["far"]
    assert [one["step"] for one in data["rollouts"]] == sorted(one["step"] for one in data["rollouts"])


# -- what is chosen


def entries(*, steps, groups, attempts=2, notable=()):
    return [
        Entry(
            path=Path("log"),
            offset=0,
            num_bytes=10,
            rank=0,
            rollout_id=f"{step}.{group}.{attempt}",
            step=step,
            group_id=group,
            agent="counter",
            reward=1.0,
            truncated=False,
            failure="timeout" if (step, group) in notable and attempt == 0 else None,
            num_breaks=0,
            num_tokens=4,
            sampled_tokens=2,
        )
        for step in range(steps)
        for group in range(groups)
        for attempt in range(attempts)
    ]


def test_a_long_run_is_shown_by_whole_groups_evenly_over_its_steps():
    found = select(entries(steps=100, groups=10), max_rollouts=40)
    assert len(found.entries) == 40
    groups = {(entry.step, entry.group_id) for entry in found.entries}
    assert len(groups) == 20
    steps = sorted(step for step, _ in groups)
    assert (steps[0], steps[-1]) == (0, 99)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 13
    assert found.note is not None
    assert found.note.startswith("40 of 2,000 rollouts are in this file: whole groups")


def test_groups_with_failures_come_first_but_take_a_quarter_of_the_room_at_most():
    everywhere = {(step, 3) for step in range(100)}
    found = select(entries(steps=100, groups=10, notable=everywhere), max_rollouts=80)
    notable = {entry.step for entry in found.entries if entry.failure}
    assert 10 <= len(notable) <= 20
    one = select(entries(steps=100, groups=10, notable={(57, 3)}), max_rollouts=20)
    assert any(entry.failure for entry in one.entries)


def test_the_size_of_the_log_is_bounded_too_but_one_group_is_always_shown():
    assert len(select(entries(steps=9, groups=4), max_bytes=45).entries) == 4
    assert len(select(entries(steps=9, groups=4, attempts=8), max_bytes=5).entries) == 8
    assert select([], max_rollouts=5).entries == []


def test_one_step_can_be_asked_for():
    found = select(entries(steps=9, groups=4), step=7)
    assert {entry.step for entry in found.entries} == {7}
    assert found.note == "8 of 72 rollouts are in this file: those of step 7."


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 37])
def test_spreading_loses_nothing(count):
    assert sorted(spread(list(range(count)))) == list(range(count))


def test_long_curves_are_thinned_to_what_can_be_seen():
    from lightning_gym.viewer.contents import _thinned

    steps = list(range(2500))
    thin = _thinned(Metrics(steps, {"a": [1.0] * 2500, "a_max": [float(step) for step in steps]}))
    assert (len(thin["steps"]), thin["width"]) == (834, 3)
    assert set(thin["series"]["a"]) == {1.0}
    assert thin["series"]["a_max"][:2] == [2.0, 5.0]


# -- the texts of tokens


def joined(pieces):
    return b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in pieces).decode()


@pytest.mark.parametrize("text", ["add 1 then  add 2\n", "größe 日本 🙂", HOSTILE, "<|im_start|>user\nhi<|im_end|>"])
def test_texts_of_single_tokens_join_to_the_text(tmp_path, text):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert joined(TokenTexts(tmp_path).of(ids)) == tokenizer.decode(ids) == text


def sentencepiece(path):
    """A tokenizer of Llama 2's kind: spaces are written ``▁``, unknown characters byte by byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁add", "▁", "a", "d", "x"]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return words


def test_a_sentencepiece_token_keeps_its_space_and_a_byte_is_a_byte(tmp_path):
    words = sentencepiece(tmp_path)
    ids = [words.index(word) for word in ("▁add", "x", "<0xE2>", "<0x82>", "<0xAC>", "▁")]
    assert TokenTexts(tmp_path).of(ids) == [" add", "x", [0xE2], [0x82], [0xAC], " "]


def test_an_id_that_no_tokenizer_has_is_a_question_mark(tmp_path):
    sentencepiece(tmp_path)
    assert TokenTexts(tmp_path).of([10**6]) == ["?"]


# -- the command


def test_the_command_names_the_file_and_needs_no_torch(finished, tmp_path):
    out = tmp_path / "report.html"
    script = (
        "import sys; from lightning_gym.cli import main; main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'lightning'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "report", finished, "--out", out, "--limit", "16"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out} (")
    data = json.loads(re.search(r'id="contents">(.*?)</script>', out.read_text(), flags=re.DOTALL)[1])
    assert len(data["rollouts"]) == 16


def test_the_wheel_has_the_pages_files():
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "lightning_gym" in wheel["only-include"], "everything below it ships, the page's files too"
    assert "exclude" not in wheel
    assert {path.suffix for path in PAGE.iterdir()} == {".html", ".css", ".js"}
