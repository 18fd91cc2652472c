"""Which images make which batch: decided in the main process, sent to the workers as keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from skd.data.counted import generator

Key = tuple[int, int, int]  # epoch, index of the image, which of its repetitions


class TrainPlan:
    """The order of a training epoch: a function of (seed, epoch). Iterating yields one rank's keys of each batch.

    Attributes:
        epoch: the epoch to iterate over.
        start_batch: the first batch to yield, 0..len.
    """

    def __init__(self, images: int, batch_size: int, seed: int, repeats: int, rank: int, world: int) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        """Whole batches in an epoch."""
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        order = generator(self.seed, "order", epoch).permutation(self.images)
        for batch in range(self.start_batch, len(self)):
            first = batch * self.batch_size
            # Position p holds image order[p // repeats]: repetitions are neighbours, so they go to different ranks.
            positions = np.arange(first + self.rank, first + self.batch_size, self.world)
            indices, repeats = order[positions // self.repeats].tolist(), (positions % self.repeats).tolist()
            yield [(epoch, index, repeat) for index, repeat in zip(indices, repeats, strict=True)]


class FixedPlan:
    """Given images in a given order, the same every time; the last batch may be smaller."""

    def __init__(self, indices: Sequence[int], batch_size: int, rank: int, world: int) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.epoch = 0  # makes no difference
        self.start_batch = 0

    def __len__(self) -> int:
        """Batches; a last one too small for every rank counts for all."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(self.start_batch * self.batch_size, len(self.indices), self.batch_size):
            rows = self.indices[first : first + self.batch_size][self.rank :: self.world]
            yield [(0, int(index), 0) for index in rows]
