"""Keeps a server process from outliving the trainer.

Two halves. `Supervised` is the trainer's: it starts this file, by path, as the leader of a new session. `main` is that
leader: it runs the server as its child and stops it when the trainer says so or is gone, SIGKILL included.

The standard library only, and nothing of this package: the leader starts in a few milliseconds and under any Python.
Linux only (``/proc``). Not covered: a server's descendant that starts a session of its own is left alone.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_POLL_S = 0.1
_SWEEP_S = 0.5
_STOP = b"stop\n"


class Supervised:
    """A command under supervision; `close` it, or die: either way nothing of it stays.

    Args:
        command: what to run, without a shell, its output appended to `log_path`.
        grace_s: how long the command may take to end after SIGINT before its whole session is killed.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log_path: Path, grace_s: float
    ) -> None:
        self.grace_s = grace_s
        # -I -S: neither the command's environment nor site-packages concern the leader.
        leader = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace_s), *command]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                leader,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The leader's process id, which is also the id of the session."""
        return self._process.pid

    def poll(self) -> int | None:
        """The command's exit code, 128 + N after signal N, or ``None`` while it runs."""
        if self._process.returncode is None:
            # Look before reaping: the session's id cannot be given to a stranger as long as its leader is a zombie.
            # Another thread may have reaped it in between.
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and ended.si_code != os.CLD_EXITED:
                    _kill_session(self.pid)
        return self._process.poll()

    def close(self) -> None:
        """Stop the command and wait for it, `grace_s` and 1.5 seconds at the most. Closing twice is fine."""
        assert self._process.stdin is not None
        if self.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                # A forked child of ours (a data loader's worker) may hold the pipe open: do not rely on its end.
                self._process.stdin.write(_STOP)
                self._process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        deadline = time.monotonic() + self.grace_s + 2 * _SWEEP_S
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.poll() is None:
            _kill_session(self.pid)
            self._process.kill()
            self._process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the command ``arguments[2:]`` for the trainer ``arguments[0]``, with ``arguments[1]`` seconds of grace."""
    trainer, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    asked = _Asked()
    # A handler, unlike SIG_IGN, is not inherited by the child; neither should be a mask of the trainer's thread.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, asked)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # A process group of its own: a server that signals its group must not hit its supervisor.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    while child.poll() is None and not asked.stop:
        # The trainer's death is seen twice: a child that it forked can hold the pipe open.
        if select.select([sys.stdin], [], [], _POLL_S)[0] or os.getppid() != trainer:
            break
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"supervisor: {command[0]} did not end within {grace_s} s of SIGINT\n")
    _kill_session(os.getsid(0))
    code = child.wait()
    return code if code >= 0 else 128 - code


class _Asked:
    """A signal handler that takes note: somebody wants us to stop."""

    def __init__(self) -> None:
        self.stop = False

    def __call__(self, *_: object) -> None:
        self.stop = True


def _kill_session(session: int) -> None:
    """SIGKILL every process of `session` except its leader, until none is left."""
    deadline = time.monotonic() + _SWEEP_S
    while (members := _members(session)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _members(session: int) -> list[int]:
    members: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == session:
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue
        # "pid (name) state ppid pgrp session ...", where the name may hold spaces and parentheses.
        state, _, _, member_of = stat.rpartition(")")[2].split()[:4]
        if int(member_of) == session and state not in "ZX":
            members.append(int(entry.name))
    return members


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
