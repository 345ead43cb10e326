"""The list of faults is true of the tree: each place is there, each test is there, and the tests catch them."""

import ast
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.mutants import MUTANTS, ROOT, faulty, node, source, table

IN_THE_FULL_TIER = ["alignment:", "advantages:", "loss: the mean", "batch:", "splice:", "sync: one tensor"]


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(mutant, id=mutant.name, marks=[pytest.mark.full] * mutant.needs_vllm) for mutant in MUTANTS],
)
def test_a_fault_has_its_place_and_its_test(mutant):
    text = (ROOT / source(mutant)).read_text()
    ast.parse(faulty(mutant, text))
    file, _, function = node(mutant).partition("::")
    assert f"def {function.partition('[')[0]}(" in (ROOT / file).read_text()


def test_a_place_that_is_gone_or_there_twice_is_refused_by_name():
    with pytest.raises(ValueError, match=f"{MUTANTS[0].name}.* found 0 times"):
        faulty(MUTANTS[0], "nothing")
    with pytest.raises(ValueError, match="found 2 times"):
        faulty(MUTANTS[0], MUTANTS[0].old * 2)


def test_the_documentation_lists_every_fault_and_the_test_that_catches_it():
    assert table(MUTANTS) in (ROOT / "docs" / "mutants.md").read_text()


def test_names_are_told_apart():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def run(*names, code="from tests.mutants import main; import sys; sys.exit(main(sys.argv[1:]))"):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *names], check=False, cwd=ROOT, env=environ, capture_output=True, text=True
    )


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_cheap_faults_are_caught():
    done = run(*IN_THE_FULL_TIER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout


@pytest.mark.full
def test_control_a_change_that_is_no_fault_survives_and_is_told():
    harmless = replace(MUTANTS[0], name="nothing is wrong", new=MUTANTS[0].old + "        pass\n", test=SMALL)
    code = f"from tests import mutants; mutants.MUTANTS[:] = [mutants.{harmless!r}]; raise SystemExit(mutants.main([]))"
    done = run(code=code)
    assert done.returncode == 1
    assert "MISSED" in done.stdout
    assert "0 of 1 faults were caught" in done.stdout


SMALL = "trajectory::the_example_of_two_calls_is_one_trajectory"
