"""What real Gym costs: seconds until it is ready, memory, and rollouts a second through our client and Gym's own."""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.table import Measurement
from lightning_gym.gym.environments import Counter
from lightning_gym.gym.servers import NemoGym

CONFIG = "resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml"
ROLLOUTS: Mapping[int, int] = {1: 30, 8: 80, 64: 128}
"""Concurrency -> rollouts a round."""
ROUNDS = 15
STARTS: Mapping[str, int] = {"light": 3, "stock": 2}
MARK = "LIGHTNING_GYM_BENCHMARK"
_FOLDER = Path(__file__).parent
_MIB = 2**20


def measure() -> Measurement:
    """Start each host several times, and play on the last one of each."""
    with _child([sys.executable, str(_FOLDER / "_instant_policy.py")]) as policy:
        assert policy.stdout is not None
        url = policy.stdout.readline().strip()
        rows = [row for host in STARTS for row in _host(host, url)]
    return Measurement(
        name="gym",
        what="NeMo Gym's own servers (example_session_state_mgmt: 3 model calls, 3 tool calls a rollout) with a "
        "policy that answers at once, policy, servers and client on the same two cores. `ready s`: from "
        "`NemoGym.start` to every server's answer, median; `CPU s`: of its processes, until then; `MiB`: their "
        "proportional set size, idle, as large as it was found. Rollouts/s: our client and Gym's own collection helper "
        f"against the same running servers, {ROUNDS} rounds each in turn of "
        f"{', '.join(f'{n} at {c}' for c, n in ROLLOUTS.items())} concurrent; medians, and the median of the rounds' "
        "ratios.",
        rows=rows,
    )


def _host(host: str, policy_url: str) -> Iterator[dict[str, Any]]:
    seconds: list[float] = []
    cpu: list[float] = []
    mib: list[float] = []
    for number in range(STARTS[host]):
        mark = uuid.uuid4().hex
        gym = NemoGym([CONFIG], ray=host == "stock")
        with tempfile.TemporaryDirectory() as folder, gym:
            os.environ[MARK] = mark
            start = time.perf_counter()
            head_url = gym.start(policy_url=policy_url, api_key="k", model="policy", run_dir=Path(folder))
            seconds.append(time.perf_counter() - start)
            del os.environ[MARK]
            pss_bytes, cpu_seconds = _used(mark)
            mib.append(pss_bytes / _MIB)
            cpu.append(cpu_seconds)
            if number == STARTS[host] - 1:
                for concurrency in ROLLOUTS:
                    yield {
                        "host": host,
                        "ready s": statistics.median(seconds),
                        "CPU s": statistics.median(cpu),
                        "MiB": max(mib),
                        **_throughput(head_url, concurrency, gym.python),
                    }


def _throughput(head_url: str, concurrency: int, gym_python: Path) -> dict[str, Any]:
    head = urlsplit(head_url)
    where = [str(head.hostname), str(head.port)]
    script = str(_FOLDER / "_rollouts.py")
    rng = random.Random(0)
    rows = [Counter.row(rng) for _ in range(ROLLOUTS[concurrency])]
    with (
        _child([sys.executable, script, "ours", *where]) as ours,
        _child([str(gym_python.absolute()), "-P", script, "gym", *where], cwd=tempfile.gettempdir()) as gyms,
    ):
        for client in (ours, gyms):
            _round(client, rows[: 2 * concurrency], concurrency)
        rates = [[len(rows) / _round(client, rows, concurrency) for client in (ours, gyms)] for _ in range(ROUNDS)]
    return {
        "concurrency": concurrency,
        "ours/s": statistics.median(rate for rate, _ in rates),
        "Gym's/s": statistics.median(rate for _, rate in rates),
        "ours / Gym's": statistics.median(one / other for one, other in rates),
    }


def _round(client: "subprocess.Popen[str]", rows: Sequence[Any], concurrency: int) -> float:
    """Seconds that a round took; the last line on stdout is the answer."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps({"rows": rows, "concurrency": concurrency}) + "\n")
    client.stdin.flush()
    line = client.stdout.readline()
    while line and not line.startswith("{"):
        line = client.stdout.readline()
    answer = json.loads(line)
    if answer["reward"] != 1.0:
        raise RuntimeError(f"a policy that is always right got {answer['reward']}")
    return answer["seconds"]


def _used(mark: str) -> tuple[int, float]:
    """Bytes (shared ones divided by those who share them) and CPU seconds of the processes that bear this mark."""
    total_bytes, ticks = 0, 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total_bytes += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
                ticks += sum(map(int, (entry / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return total_bytes, ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _child(command: list[str], **options: Any) -> Generator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
