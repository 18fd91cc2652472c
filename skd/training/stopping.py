"""The ways a run ends early, each with the checkpoint to go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


class Stopped(RuntimeError):
    """A signal asked the run to stop; a checkpoint of the last finished step is on disk.

    Attributes:
        signal: its number (SIGTERM, SIGINT).
        interrupted: it was SIGINT, that is Ctrl-C.
        checkpoint: path of the checkpoint.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        self.signal, self.checkpoint = number, checkpoint
        name = signal.Signals(number).name
        self.interrupted = number == signal.SIGINT
        super().__init__(f"stopped by {name}; go on from {checkpoint} with --resume auto")


class StopSignal:
    """Remembers the first SIGTERM or SIGINT, so that a step can be finished."""

    number: int | None = None

    def remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self.number = number


@contextmanager
def stop_signals(enabled: bool) -> Iterator[StopSignal]:
    """Inside the block SIGTERM and SIGINT are remembered; the handlers of before return after it.

    A signal that is ignored stays ignored: a script that runs a program in the background asks for that.
    """
    stop = StopSignal()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop.remember) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
