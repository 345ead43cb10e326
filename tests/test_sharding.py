"""Two ranks that hold a part of the policy each: what they gather, sync and compute is the whole model's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("sharded_cases.py")
CASES = [name.replace("_", " ") for name in re.findall(r"@case\ndef (\w+)", SCRIPT.read_text())]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case raised, by its sentence; both ranks tried all of them, because their start takes longest."""
    directory = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, SCRIPT, directory],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize("sentence", CASES)
def test_of_two_ranks_with_a_part_each(found, sentence):
    assert found[sentence] == ""


def test_every_case_was_tried(found):
    assert CASES
    assert list(found) == CASES
