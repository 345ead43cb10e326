import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_gym.gym import supervisor
from lightning_gym.gym.supervisor import Supervised

# Sleeps until SIGINT, then says so and ends.
POLITE = """
import signal, sys, time
def leave(*_):
    print("left", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, leave)
print("ready", flush=True)
time.sleep(60)
"""

# Ignores SIGINT, and so does its grandchild in a process group of its own.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
print("ready", child.pid, flush=True)
time.sleep(60)
"""

# A trainer: starts the command (argument 2) and forks a worker that inherits everything, its end of the pipe included.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from lightning_gym.gym.supervisor import Supervised
signal.signal(signal.SIGINT, signal.SIG_IGN)
log = Path(sys.argv[1])
server = Supervised([sys.executable, "-c", sys.argv[2]], env=os.environ, cwd=Path.cwd(), log_path=log, grace_s=0.5)
worker = os.fork()
if not worker:
    time.sleep(60)
print(server.pid, worker, flush=True)
time.sleep(60)
"""


@contextmanager
def supervised(code, tmp_path, *, grace_s=5.0):
    log = tmp_path / "log"
    server = Supervised([sys.executable, "-c", code], env=os.environ, cwd=tmp_path, log_path=log, grace_s=grace_s)
    try:
        yield server, log
    finally:
        server.close()


def until(condition, *, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        time.sleep(0.01)


def ready(log):
    """The words that the command printed after "ready"."""
    until(lambda: log.exists() and "ready" in log.read_text() and log.read_text().endswith("\n"))
    return log.read_text().split()[1:]


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_supervisor_ends_with_the_commands_code(code, expected, tmp_path):
    with supervised(code, tmp_path) as (server, _):
        until(lambda: server.poll() is not None)
        assert server.poll() == expected


def test_the_commands_output_and_its_failure_to_start_are_logged(tmp_path):
    with supervised("print('hello')", tmp_path) as (server, log):
        until(lambda: server.poll() is not None)
    assert log.read_text() == "hello\n"
    missing = Supervised(["/no/such/command"], env={}, cwd=tmp_path, log_path=log, grace_s=1.0)
    until(lambda: missing.poll() is not None)
    missing.close()
    assert "/no/such/command" in log.read_text()


def test_close_lets_the_command_end_by_itself(tmp_path):
    with supervised(POLITE, tmp_path) as (server, log):
        ready(log)
        server.close()
        assert server.poll() == 0
        assert log.read_text().split() == ["ready", "left"]
        server.close()


def test_close_kills_the_whole_session_after_the_grace_time(tmp_path):
    with supervised(STUBBORN, tmp_path, grace_s=0.3) as (server, log):
        (grandchild,) = ready(log)
        assert alive(grandchild)
        start = time.monotonic()
        server.close()
        assert 0.3 <= time.monotonic() - start < 2.0
        assert server.poll() == 137
        assert not alive(grandchild)


def test_close_does_not_wait_for_a_fork_that_holds_the_pipe(tmp_path):
    with supervised(POLITE, tmp_path) as (server, log):
        ready(log)
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
        try:
            start = time.monotonic()
            server.close()
            assert time.monotonic() - start < 2.0
        finally:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)


def test_what_a_dead_command_leaves_behind_is_killed(tmp_path):
    code = STUBBORN.replace("time.sleep(60)\n", "sys.exit(3)\n")
    with supervised(code, tmp_path) as (server, log):
        until(lambda: server.poll() is not None)
        (orphan,) = ready(log)
        assert server.poll() == 3
        assert not alive(orphan)


def test_a_process_that_left_the_session_is_left_alone(tmp_path):
    code = STUBBORN.replace("process_group=0", "start_new_session=True")
    with supervised(code, tmp_path, grace_s=0.2) as (server, log):
        stranger = int(ready(log)[0])
        try:
            server.close()
            assert alive(stranger)
        finally:
            os.kill(stranger, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_supervisor_stops_the_command_in_order(number, tmp_path):
    with supervised(POLITE, tmp_path) as (server, log):
        ready(log)
        os.kill(server.pid, number)
        until(lambda: server.poll() is not None)
        assert server.poll() == 0
        assert log.read_text().split() == ["ready", "left"]


def test_killing_the_supervisor_itself_is_noticed_and_leaves_nothing(tmp_path):
    with supervised(STUBBORN, tmp_path) as (server, log):
        (grandchild,) = ready(log)
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: server.poll() is not None)
        assert server.poll() == -signal.SIGKILL
        assert not alive(grandchild)
        assert supervisor._members(server.pid) == []


@contextmanager
def trainer(code, tmp_path):
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(log), code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        session, worker = map(int, process.stdout.readline().split())
        yield process, session, worker, log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_nothing_is_left_5_s_after_the_trainer_was_killed(tmp_path):
    with trainer(STUBBORN, tmp_path) as (process, session, worker, log):
        ready(log)
        members = supervisor._members(session)
        assert len(members) == 2
        process.kill()
        until(lambda: not any(map(alive, [session, *members])))
        assert alive(worker)


def test_a_ctrl_c_meant_for_the_trainer_does_not_reach_the_command(tmp_path):
    with trainer(POLITE, tmp_path) as (process, session, _, log):
        ready(log)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert log.read_text().split() == ["ready"]
        assert alive(session)


def test_the_command_is_interruptible_even_if_the_trainer_ignores_or_blocks_sigint(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        code = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt: pass"
        with supervised(code, tmp_path) as (server, log):
            ready(log)
            server.close()
            assert server.poll() == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, before)


def test_neither_the_supervisor_nor_the_command_gets_a_file_descriptor_of_the_trainer(tmp_path):
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    try:
        with supervised(POLITE, tmp_path) as (server, log):
            ready(log)
            for pid in (server.pid, *supervisor._members(server.pid)):
                assert sorted(fd.name for fd in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]
    finally:
        os.close(read_end)
        os.close(write_end)
