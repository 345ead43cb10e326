"""The GPU benchmark's own code, every section of it, at toy sizes on this machine's CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks._gpu import FULL, SMOKE, packed, row
from benchmarks._gpu_sections import SECTIONS
from benchmarks._gpu_training import lengths, made_up, useful_flops
from lightning_gym.memory_budget import ModelSize

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "learning"])
def test_a_section_runs_on_cpu_and_no_bound_of_it_is_missed(name):
    toy = replace(SMOKE, fake_engine=True, models={"M": SMOKE.models["M"]}, gap_dtypes=("bfloat16",))
    found = SECTIONS[name](toy)
    assert found
    assert [line for line in found if line["holds"] == "NO"] == []


@pytest.mark.full  # a minute and more: each section starts engines
@pytest.mark.vllm
@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in ("kernels", "mfu")])  # they have no engine
def test_a_section_runs_on_cpu_with_vllm_as_a_user_starts_it(tmp_path, name):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    section = json.loads(out.read_text())["sections"][name]
    assert section["error"] is None
    assert [line for line in section["rows"] if line["holds"] == "NO"] == []
    assert f"| {name} |" in done.stdout


def test_sections_of_several_calls_are_merged_into_one_file_and_a_failed_one_says_why(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    answers = {"kernels": ([row("kernels", "", "ms", 1.0)], None), "mfu": ([], "Traceback ...\nOutOfMemoryError: 3 GB")}
    monkeypatch.setattr(gpu, "_section", lambda name, **_: answers[name])

    gpu.run(["mfu"], out, smoke=True)
    merged = gpu.run(["kernels"], out, smoke=True)

    assert json.loads(out.read_text()) == merged
    table = gpu.measurement(merged)
    assert [(line["section"], line["what"], line["value"]) for line in table.rows] == [
        ("kernels", "ms", 1.0),
        ("mfu", "FAILED", "OutOfMemoryError: 3 GB"),
    ]
    assert "toy sizes" in table.what


def test_figures_of_a_smoke_run_are_never_mixed_with_a_gpus(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"smoke": False, "sections": {}}))

    with pytest.raises(SystemExit, match="holds figures of a GPU"):
        gpu.run([], out, smoke=True)


def test_a_bound_that_is_missed_says_no():
    assert row("s", "", "w", 0.5, at_least=0.6)["holds"] == "NO"
    assert row("s", "", "w", 0.6, at_least=0.6)["holds"] == "yes"
    assert row("s", "", "w", 2, at_most=1)["holds"] == "NO"
    assert row("s", "", "w", 0.5)["holds"] == ""
    assert row("s", "", "w", float("nan"), at_most=1)["holds"] == "NO"


@pytest.mark.parametrize("scale", [FULL, SMOKE], ids=["full", "smoke"])
def test_the_packed_row_is_full_of_ragged_sequences(scale):
    found = lengths(scale)

    assert sum(found) == scale.packed_tokens
    assert len(found) % 2 == 0
    assert max(found) > 1.2 * min(found)


def test_useful_flops_are_counted_by_hand():
    size = ModelSize(
        num_parameters=1000 + 30,
        num_trained=1030,
        num_layers=2,
        hidden_size=3,
        query_size=4,
        kv_size=4,
        intermediate_size=1,
        vocab_size=10,
    )
    batch = packed([made_up(0, 4), made_up(1, 8)])  # the second half of each is trained: 2 and 4 tokens

    matrices = 6 * 1000 * 12
    attention = 6 * 2 * 4 * (4**2 + 8**2)
    head = 6 * 3 * 10 * 6
    assert useful_flops(size, batch) == matrices + attention + head
