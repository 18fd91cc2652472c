"""The batches of an epoch, of any loader, from any position in the epoch on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from skd.data.counted import seeded
from skd.training.types import Batches


def start_epoch(loader: Batches, seed: int, epoch: int, start: int) -> Iterator[object]:
    """The batches of an epoch from number `start` on.

    A loader with ``set_epoch(epoch, start_batch)``, such as skd's, begins there. For any other loader the first
    `start` batches are read and dropped. The global generators are seeded by (seed, epoch, batch), so that a
    shuffling DataLoader gives the same batches again too.
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
    """The batches of `loader`, read with seeded global generators, whose states are restored afterwards.

    PyTorch's DataLoader draws a random number at every iteration, even without shuffling and workers.
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
    """An iterable over the batches of `read()`, which is called anew at every iteration."""

    def __init__(self, read: Callable[[], Iterator[object]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[object]:
        return self.read()
