"""The process ``skd``, from its first import to its end: Ctrl-C at any moment ends it with one line.

This file imports only modules that Python itself has imported already, so that the handler is in place at once.
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

    While modules are imported, and after the work, there is nothing to clean up, so Ctrl-C ends the process at once.
    During the work it raises KeyboardInterrupt, so that temporary files are removed; a second Ctrl-C ends the process
    at once. Where SIGINT is ignored (``nohup``, a script's background job), it stays ignored.
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
    """The beginning of a line on standard error: "rank N: " under torchrun with several processes, otherwise ""."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ
    return "" if alone else f"rank {os.environ['RANK']}: "


def world_size() -> int:
    """The number of processes, as torchrun tells it; 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise ValueError(f"WORLD_SIZE is {text!r}; it must be the number of processes, as torchrun sets it")
    return int(text)


def _flush() -> None:
    """Flush standard output. Its reader may be gone (``skd --help | head -1``), and then Python would report it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
