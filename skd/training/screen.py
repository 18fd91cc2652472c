"""What a run shows while it goes on: bars in a terminal, one line per epoch everywhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from skd.support.checks import length_of
from skd.training.history import Epoch

_Item = TypeVar("_Item")


class Seconds:
    """Wall-clock seconds by name, and in all."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def all(self) -> dict[str, float]:
        return {**self.parts, "total": time.perf_counter() - self.start}


class Steps:
    """The bar of one epoch; its text shows the loss."""

    def __init__(self, progress: Progress, task: TaskID, title: str) -> None:
        self.progress, self.task, self.title = progress, task, title

    def advance(self, loss: float | None) -> None:
        if loss is not None:
            self.progress.update(self.task, description=f"{self.title}, loss {loss:.3f}")
        self.progress.advance(self.task)


class Screen:
    """A console; without `verbose` it shows bars only, and those in a terminal only. Of several ranks, rank 0's."""

    def __init__(self, console: Console | None, verbose: bool = True) -> None:
        other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        self.console = Console(stderr=True, quiet=other) if console is None else console
        self.verbose = verbose

    def line(self, text: str) -> None:
        if self.verbose:
            self.console.print(text, highlight=False, soft_wrap=True)

    def bar(self, items: Iterable[_Item], description: str) -> Iterator[_Item]:
        """`items`, with a bar that goes away when they are through."""
        total = length_of(items)
        with self._progress(BarColumn(), TimeRemainingColumn()) as progress:
            yield from progress.track(items, total=total, description=description)

    def _progress(self, *columns: ProgressColumn) -> Progress:
        # Output is not redirected: a worker that is forked while rich holds its lock would deadlock at a warning.
        return Progress(
            TextColumn("{task.description}"),
            *columns,
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @contextmanager
    def steps(self, epoch: int, epochs: int, total: int | None, done: int) -> Iterator[Steps]:
        title = f"Epoch {epoch + 1}/{epochs}"
        with self._progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            yield Steps(progress, progress.add_task(title, total=total, completed=done), title)

    def epoch(self, row: Epoch, epochs: int) -> None:
        """One line for a finished epoch."""
        speed = row.images / max(row.seconds["total"], 1e-9)
        text = f"epoch {row.epoch + 1}/{epochs}: loss {row.loss:.3f}, lr {row.lr:.2e}, {speed:.0f} images/s"
        if row.entries > 1:
            text += f", {row.entries} sub-networks down to {row.macs_fraction:.1%} of the MACs"
        if row.curve:
            points = "  ".join(f"{point['macs_fraction']:.0%}: {point['top1']:.1f}" for point in row.curve)
            text += f"\n  top-1 by MACs  {points};  area {row.area:.2f}{' (best)' if row.best else ''}"
        self.line(text)
