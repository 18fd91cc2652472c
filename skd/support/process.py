"""The process ``skd``, from its first import to its last: Ctrl-C at any moment ends it in one line.

Nothing is imported here but what Python itself has imported already, so that it takes hold at once.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130  # what a shell reports of a process that Ctrl-C ended


def program() -> int:
    """`skd.cli.main` with the arguments of the process.

    While modules are imported, and after the work, there is nothing to put away: the process ends on the spot. In
    between Ctrl-C is a KeyboardInterrupt, which removes what was being written; a second one ends on the spot. Where
    SIGINT is ignored (``nohup``, a script's background job) it stays so.
    """
    heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() == process:  # not one of its workers
            os.write(2, f"{rank()}error: interrupted\n".encode())
        os._exit(INTERRUPTED)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    def listen(handler: Callable[[int, object], None]) -> None:
        if heard:
            signal.signal(signal.SIGINT, handler)

    listen(end)
    try:
        from skd.cli import answered

        return answered(None, lambda: listen(interrupt))
    finally:
        listen(end)
        _flush()


def rank() -> str:
    """What a line on standard error begins with: under torchrun, whose it is."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ
    return "" if alone else f"rank {os.environ['RANK']}: "


def world_size() -> int:
    """The number of processes, as torchrun tells it; 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise ValueError(f"WORLD_SIZE is {text!r}; it must be the number of processes, as torchrun sets it")
    return int(text)


def _flush() -> None:
    """Nobody may be reading any more, as after ``skd --help | head -1``; the interpreter would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
