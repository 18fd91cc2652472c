"""How loader processes begin and end: they outlive the signals of a run that is being stopped, but not the run."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def start(loader: DataLoader[Any]) -> Iterator[Any]:
    """``iter(loader)``, whose processes end with this one at the latest."""
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    _started.update(set(multiprocessing.active_children()) - before)
    return iterator


def be_patient(worker: int) -> None:
    """Runs in each worker: it survives Ctrl-C and its first SIGTERM, and obeys the second.

    A signal to a whole job reaches the workers too. If they died of it at once, the main process could not finish
    its step and write a checkpoint. It ends them itself, if need be by one SIGTERM and then another.
    """

    def obey_the_next(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, obey_the_next)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(owner: int = os.getpid()) -> None:
    """At exit multiprocessing would send each process one SIGTERM, and wait for it."""
    alive = [process for process in list(_started) if os.getpid() == owner and process.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes every end for a failure
    for process in alive:
        process.kill()


atexit.register(_end)
