"""The batches of an epoch, from any loader, from any place in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from skd.data.counted import seeded


def start_epoch(loader: Any, seed: int, epoch: int, start: int) -> Iterator[Any]:
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
        advance: Any = getattr(part, "set_epoch", None)
        if advance is not None:
            advance(epoch)
    iterator, index = iter(loader), 0
    while True:
        with seeded(seed, "loader", epoch, index):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        index += 1
        if index > start:
            yield batch
