"""ReadyFile: how a server process tells the trainer that it is up; and, when it never was, what its log said last."""

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from lightning_gym.errors import GymStartError
from lightning_gym.gym.supervisor import Supervised

_LOG_TAIL_BYTES = 8000
_POLL_S = 0.01


class ReadyFile:
    """A file that the server writes, whole, once its ports listen: it chooses them itself, so none is raced for.

    Args:
        folder: where the file will be; it is gone when the context ends.
        log_path: the server's log; only what is appended from now on is quoted.
    """

    def __init__(self, folder: Path, log_path: Path) -> None:
        self.path = folder.absolute() / f"ready.{os.getpid()}.{id(self)}.json"
        self._log_path = log_path
        self._log_start = log_path.stat().st_size if log_path.exists() else 0

    def wait(self, server: Supervised, *, name: str, timeout_s: float) -> dict[str, Any]:
        """What the server wrote.

        Raises:
            GymStartError: it ended, or wrote nothing in time; the message ends with its log's last lines.
        """
        deadline = time.monotonic() + timeout_s
        while not self.path.exists():
            code = server.poll()
            if code is None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                continue
            what = f"is not ready after {timeout_s:g} s" if code is None else f"ended with code {code}"
            tail = self._log_path.read_bytes()[self._log_start :][-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
            raise GymStartError(f"{name} {what}; the end of {self._log_path}:\n{tail or '(empty)'}")
        return msgspec.json.decode(self.path.read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
