"""The batches of an epoch, from any loader, from any place in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from skd.data.counted import seeded
from skd.training.types import Batches


def start_epoch(loader: Batches, seed: int, epoch: int, start: int) -> Iterator[object]:
    """The batches of an epoch from number `start` on.

    A loader with ``set_epoch(epoch, start_batch)``, as skd's have, begins there. Of any other the first `start` are
    read and dropped; its random numbers follow (seed, epoch, batch), so a shuffling DataLoader repeats itself too.
    """
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None and "start_batch" in inspect.signature(set_epoch).parameters:
        set_epoch(epoch, start_batch=start)
        yield from loader
        return
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        advance = getattr(part, "set_epoch", None)
        if advance is not None:
            advance(epoch)
    for index, batch in enumerate(repeatable(loader, seed, "loader", epoch)):
        if index >= start:
            yield batch


def repeatable(loader: Batches, seed: int, *counters: int | str) -> Iterator[object]:
    """The batches of `loader`; the global generators that it may draw from follow the seed, and stay as they were.

    PyTorch's DataLoader draws a number at every iteration, even in order and without workers.
    """
    with seeded(seed, *counters):
        iterator = iter(loader)
    index = 0
    while True:
        with seeded(seed, *counters, index):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch
        index += 1


class Anew:
    """The batches that `read` gives, from the first one again at every iteration."""

    def __init__(self, read: Callable[[], Iterator[object]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[object]:
        return self.read()
