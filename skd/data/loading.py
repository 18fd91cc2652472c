"""`Loading` describes how batches are made of a source's images, and the plans say which images make which batch.

The main process iterates over a plan and sends the workers the keys of each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from skd.data.counted import generator
from skd.support.settings import AUGMENT_ON, Augmentation

Key = tuple[int, int, int]  # epoch, index of the image, which of its repetitions


@dataclass(frozen=True)
class Loading:
    """How batches are made of images. Plans, loaders and workers all read it from here.

    Attributes:
        batch_size: images in a batch of all ranks together.
        augmentation: of timm's training transform; None: its evaluation transform, and nothing is random.
        augment_on: where all of it but the crop is done: "device", "cpu" (in the workers, by timm's transform), or
            "auto": on the device if it can do it.
        seed: of the order and the augmentation, 0..2**64 - 1.
        aug_repeats: how often an image occurs in its epoch, differently augmented; 0 and 1: once.
        calibration_images: how many images are chosen to calibrate with; None: all of them, for another purpose.
        num_classes: labels are 0..num_classes - 1; 0: they are not checked.
        bad_images: an image that cannot be read: "skip" or "fail".
        workers: processes that load; 0: this one does.
        rank, world: this process takes rows rank, rank + world, ... of each batch.
        pin_memory: page-locked batches, for faster copies to a GPU.
        device: where images are normalised and left; None: on the CPU.

    Raises:
        ValueError: one of them is out of range.
    """

    batch_size: int
    augmentation: Augmentation | None = None
    seed: int = 0
    aug_repeats: int = 1
    calibration_images: int | None = None
    num_classes: int = 0
    bad_images: str = "skip"
    workers: int = 0
    rank: int = 0
    world: int = 1
    pin_memory: bool = False
    device: torch.device | str | None = None
    augment_on: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be at least 0")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is {self.rank} of {self.world}; it must be 0..world - 1")
        if self.batch_size < self.world:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be at least the number of ranks, {self.world}"
            )
        if self.bad_images not in ("skip", "fail"):
            raise ValueError(f"bad_images is {self.bad_images!r}; it may be 'skip' or 'fail'")
        if self.augment_on not in AUGMENT_ON:
            raise ValueError(f"augment_on is {self.augment_on!r}; it may be one of {AUGMENT_ON}")
        if self.training and self.batch_size % self.world:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of the number of ranks, {self.world}"
            )
        if self.aug_repeats < 0 or self.aug_repeats != int(self.aug_repeats):
            raise ValueError(
                f"aug_repeats is {self.aug_repeats}; it must be a whole number, 0 or 1 for no repetition"
            )
        if self.calibration_images is not None and self.calibration_images < 1:
            raise ValueError(f"images is {self.calibration_images}; it must be at least 1")
        generator(self.seed)

    @property
    def training(self) -> bool:
        """Whether images are shuffled and augmented, and only whole batches are given."""
        return self.augmentation is not None

    @property
    def repeats(self) -> int:
        """How often an image occurs in its epoch, at least once."""
        return max(1, int(self.aug_repeats))

    @property
    def rows(self) -> int:
        """The number of images in a rank's part of a batch."""
        return max(1, self.batch_size // self.world)

    @property
    def fails(self) -> bool:
        """Whether an image that cannot be read is an error."""
        return self.bad_images == "fail"

    def settings(self) -> dict[str, object]:
        """The settings that `TrainConfig` has too, by their names there, as far as this kind of loader uses them."""
        chosen: dict[str, object] = {"bad_images": self.bad_images}
        if self.augmentation is not None:
            chosen |= {**asdict(self.augmentation), "aug_repeats": self.repeats, "augment_on": self.augment_on}
        if self.calibration_images is not None:
            chosen["calibration_images"] = self.calibration_images
        return chosen


class TrainPlan:
    """The order of a training epoch: a function of (seed, epoch). Iterating yields one rank's keys of each batch.

    Attributes:
        epoch: the epoch to iterate over.
        start_batch: the first batch to yield, 0..len.
    """

    def __init__(self, images: int, loading: Loading) -> None:
        self.images = images
        self.loading = loading
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        """Whole batches in an epoch."""
        return self.images // self.loading.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        loading, epoch, times = self.loading, self.epoch, self.loading.repeats
        order = generator(loading.seed, "order", epoch).permutation(self.images)
        for batch in range(self.start_batch, len(self)):
            first = batch * loading.batch_size
            # Position p holds image order[p // times]: repetitions are neighbours, so they go to different ranks.
            positions = np.arange(first + loading.rank, first + loading.batch_size, loading.world)
            indices, repeats = order[positions // times].tolist(), (positions % times).tolist()
            yield [(epoch, index, repeat) for index, repeat in zip(indices, repeats, strict=True)]


class FixedPlan:
    """Batches of the given images in the given order, every time; the last batch may be smaller."""

    def __init__(self, indices: Sequence[int], loading: Loading) -> None:
        self.indices = indices
        self.loading = loading
        self.epoch = 0  # the same interface as `TrainPlan`; the value has no effect
        self.start_batch = 0

    def __len__(self) -> int:
        """The number of batches, the same on all ranks, even if the last batch has too few rows for some of them."""
        return -(-len(self.indices) // self.loading.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        size = self.loading.batch_size
        for first in range(self.start_batch * size, len(self.indices), size):
            rows = self.indices[first : first + size][self.loading.rank :: self.loading.world]
            yield [(0, int(index), 0) for index in rows]
