"""SIGTERM under a Trainer: rollouts that are waited for are given up, and no collective is cut in half.

Lightning 2.6 answers the signal with a broadcast inside its handler. A rank that is signalled alone waits there for
partners that are elsewhere, until the process group's timeout. So on several ranks the handler here takes its place: it
takes note, hands the signal on to the processes that Lightning's launcher started, and the run ends where the trainer
asks for its next window or waits for its rollouts. The other ranks then find that this one has gone.
"""

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

_log = logging.getLogger(__name__)


class Sigterm:
    """Belongs to one fit of a Trainer, and to the main thread.

    Args:
        trainer: before it registers a handler of its own: what the program had registered is called as well.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        earlier = signal.getsignal(signal.SIGTERM)
        self._earlier: Callable[[int, FrameType | None], Any] | None = earlier if callable(earlier) else None
        self._came = False

    def take_over(self) -> None:
        """After Lightning has registered its own, which it takes back at the end of the fit."""
        if self._trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._note)

    def check(self) -> None:
        """Called where the run can end.

        Raises:
            SIGTERMException: the signal came.
        """
        if self._came or self._trainer.received_sigterm:
            raise SIGTERMException

    def _note(self, number: int, frame: FrameType | None) -> None:
        _log.warning("rank %d received SIGTERM: the run ends", self._trainer.global_rank)
        launcher: Any = self._trainer.strategy.launcher
        if launcher is not None and not self._came:
            launcher.kill(number)
        self._came = True
        if self._earlier is not None:
            self._earlier(number, frame)
