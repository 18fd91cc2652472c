"""The main process's side of loading: starts workers, raises what they report, counts what they left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

from skd.data.counted import generator
from skd.data.loading import FixedPlan, Loading, TrainPlan
from skd.data.pixels import Normalisation
from skd.data.source import Source, shown
from skd.data.streams import StreamSource
from skd.data.workers import IndexedBatches, Loaded, Preparation, StreamBatches, UnreadableData, be_patient, start
from skd.support.types import Batch

_Item = TypeVar("_Item")


class Loader:
    """Batches (images, labels): float32 (B, C, H, W) on the device, and int64 (B,). They can be read repeatedly.

    The labels are None if the source has no labels.

    The workers send 8-bit images; this process does the rest on the device: the operations and rectangles that were
    drawn for them, and the normalisation. Labels stay on the host, where they are checked.

    The workers serve only the latest iteration; continuing an earlier one raises a RuntimeError.

    Attributes:
        source: where the images come from.
        loading: how batches are made of them.
        reasons: why images could not be read, by name of the image, over all iterations so far.
        turned: names of the images that EXIF says are not upright, and which were read as they are stored.
        read: images that the latest iteration has given so far.
    """

    def __init__(self, source: Source, loading: Loading, normalise: Normalisation) -> None:
        self.source = source
        self.loading = loading
        self.name = source.name
        self.normalise = normalise
        self.reasons: dict[str, str] = {}
        self.turned: set[str] = set()
        self.read = 0
        self.epoch = 0
        self.start_batch = 0
        self._iterations = 0

    @property
    def skipped(self) -> set[str]:
        """Names of the images that could not be read, over all iterations so far."""
        return set(self.reasons)

    def __len__(self) -> int:
        """Batches in an epoch, from its beginning."""
        raise NotImplementedError

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iterations yield: this epoch, from this batch on.

        Raises:
            ValueError: a negative epoch, or a batch that the epoch does not have.
        """
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(f"epoch is {epoch}, start_batch {start_batch}; they may be 0.. and 0..{len(self)}")
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[Batch]:
        """Raise the errors that workers report; warn at the end of the epoch of images left out or not upright."""
        bad: dict[str, str] = {}
        self.read, noted = 0, len(self.turned)
        self._iterations += 1
        this = self._iterations
        for loaded in self._loaded():
            if self._iterations != this:
                raise RuntimeError(f"another iteration over the batches of {self.name} began before this one ended")
            bad.update(loaded.bad)
            self.reasons.update(loaded.bad)
            self.turned.update(loaded.turned)
            if loaded.failure is not None:
                self.close()
                error, message = loaded.failure
                raise error(message)
            if loaded.images is not None and loaded.labels is not None:
                self.read += len(loaded.images)
                images = self.normalise(loaded.images, loaded.patches, loaded.operations)
                yield images, loaded.labels if self.source.labelled else None
        if bad and not self.read:
            file, reason = next(iter(bad.items()))
            share = "this process's share of " if self.loading.world > 1 else ""
            raise UnreadableData(f"none of the images of {share}{self.name} can be read, such as {file} ({reason})")
        if bad:
            names = shown(bad)
            warnings.warn(f"{_images(len(bad))} of {self.name} cannot be read, skipped: {names}", stacklevel=2)
        if len(self.turned) > noted:
            warnings.warn(
                f"{_images(len(self.turned))} of {self.name} should be turned, by their EXIF orientation, and were "
                f"read as they are stored, as timm does (exif_orientation turns them): {shown(sorted(self.turned))}",
                stacklevel=2,
            )

    def close(self) -> None:
        """End the workers now; another iteration starts new ones."""

    def _loaded(self) -> Iterator[Loaded]:
        raise NotImplementedError


class IndexedLoader(Loader):
    """A loader of numbered images, by a plan. Its workers stay alive between iterations: keys say all they need."""

    def __init__(self, batches: IndexedBatches, normalise: Normalisation, plan: TrainPlan | FixedPlan) -> None:
        super().__init__(batches.source, batches.preparation.loading, normalise)
        self._batches = batches
        self._plan = plan
        self._loader: DataLoader[Loaded] | None = None

    def __len__(self) -> int:
        return len(self._plan)

    def close(self) -> None:
        self._loader = None

    def _loaded(self) -> Iterator[Loaded]:
        self._plan.epoch, self._plan.start_batch = self.epoch, self.start_batch
        if self._loader is None:
            self._loader = DataLoader(
                self._batches,
                sampler=self._plan,
                batch_size=None,  # a key is a whole batch
                num_workers=self.loading.workers,
                collate_fn=_unchanged,
                pin_memory=self.loading.pin_memory,
                persistent_workers=self.loading.workers > 0,
                worker_init_fn=be_patient,
                generator=torch.Generator(),  # without it every iteration would draw from the global generator
            )
        return start(self._loader)


class StreamLoader(Loader):
    """A loader of a stream. Every iteration starts new workers, because a reader remembers how far it has read."""

    def __init__(self, source: StreamSource, preparation: Preparation, normalise: Normalisation) -> None:
        super().__init__(source, preparation.loading, normalise)
        self._source = source
        self._preparation = preparation
        # Calibration uses the first images of the stream.
        self._limit = preparation.loading.calibration_images
        self._images = len(source) if self._limit is None else self._limit

    def __len__(self) -> int:
        """The number of batches: exact in training, otherwise an estimate (each worker's last may be smaller)."""
        rows, world = self.loading.rows, self.loading.world
        share = -(-self._images // world)
        return self._images // (rows * world) if self.loading.training else -(-share // rows)

    def _loaded(self) -> Iterator[Loaded]:
        if self.loading.training:
            return self._exactly(len(self))
        return start(self._workers()) if self._limit is None else self._first(-(-self._limit // self.loading.world))

    def _exactly(self, batches: int) -> Iterator[Loaded]:
        """Exactly this many batches, or an error: a rank that stopped earlier would leave the others waiting."""
        count = 0
        for loaded in islice(start(self._workers()), batches):
            yield loaded
            count += 1
        if count < batches:
            raise UnreadableData(
                f"the stream {self.name} ended after {count} of {batches} batches; it needs a shard for each of "
                f"{max(1, self.loading.workers)} workers on {self.loading.world} ranks, and as many images as "
                "it says it has"
            )

    def _first(self, images: int) -> Iterator[Loaded]:
        """Batches until there are this many images; the last batch is cut to reach the number exactly."""
        for loaded in start(self._workers()):
            if loaded.images is not None and loaded.labels is not None:
                kept = loaded.images[:images]
                loaded = loaded._replace(images=kept, labels=loaded.labels[:images])
                images -= len(kept)
            yield loaded
            if images <= 0:
                return

    def _workers(self) -> DataLoader[Loaded]:
        """A DataLoader for this epoch.

        The seed of the shards' order is the same on all ranks, so that they divide the shards alike; the seed of the
        order of images is this rank's own.
        """
        # For evaluation every rank reads the whole stream and keeps its part, because the readers' own division may
        # leave out images of one shard and read those of another twice.
        loading = self.loading
        whole = not loading.training and self._limit is None
        rank, world = (0, 1) if whole else (loading.rank, loading.world)
        shards = int(generator(loading.seed, "shards").integers(2**31))
        images = int(generator(loading.seed, "stream", self.epoch, loading.rank).integers(2**31))
        self._source.prepare(
            seed=shards,
            worker_seed=images,
            epoch=self.epoch,
            workers=loading.workers,
            rank=rank,
            world=world,
            rows=loading.rows,
        )
        counters = (self.epoch, loading.rank)
        keep = (loading.rank, loading.world) if whole else (0, 1)
        return DataLoader(
            StreamBatches(self._source, self._preparation, counters, self.start_batch, keep),
            batch_size=None,
            num_workers=loading.workers,
            collate_fn=_unchanged,
            pin_memory=loading.pin_memory,
            worker_init_fn=be_patient,
            generator=torch.Generator().manual_seed(images),  # the seeds of the workers' readers come from it
        )


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _unchanged(batch: _Item) -> _Item:
    """Takes the place of PyTorch's collation. It is a named function because spawned workers cannot take a lambda."""
    return batch
