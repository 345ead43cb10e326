"""The adversarial conversations of the benchmark: none is lost or misaligned here, and they do break other ways."""

import pytest

from benchmarks import adversarial

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found():
    return adversarial.outcomes(rollouts_per_family=6)


def test_no_turn_of_ours_is_lost_or_silently_misaligned(found):
    ours = found["ours"]
    assert ours["exact"] + ours["new segment"] == 6 * 7 * adversarial.MAX_TURNS
    assert ours["crash"] == ours["silent"] == ours["silent tokens"] == ours["rollouts lost"] == 0


def test_the_same_conversations_crash_or_mislead_every_other_way(found):
    for way, counts in found.items():
        if way != "ours":
            assert counts["crash"] + counts["silent"] > 0
    assert found["EOS-count splice"]["silent"] > 0
    assert found["no splice, not asserted"]["silent tokens"] > 0
