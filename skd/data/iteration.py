"""The main process's side of loading: starts workers, raises what they report, counts what they left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from skd.data.counted import generator
from skd.data.pixels import Normalisation
from skd.data.plans import FixedPlan, TrainPlan
from skd.data.processes import be_patient, start
from skd.data.readers import Source, StreamSource
from skd.data.scanning import shown
from skd.data.workers import Loaded, MapBatches, Preparation, StreamBatches, UnreadableData

Batch = tuple[torch.Tensor, Any]  # the labels are a tensor, or None


class Loader:
    """Iterable, again and again, over (images, labels): float32 (B, C, H, W), on the device, and int64 (B,).

    Of a source without labels they are None.

    The workers send 8-bit images; this process normalises them on the device. Labels stay on the host, where they
    are checked.

    One iteration at a time: the workers serve the latest, so an earlier one that goes on is a RuntimeError.

    Attributes:
        source: where the images come from.
        reasons: why images could not be read, by their names, of all iterations so far.
        turned: names of the images that EXIF says are not upright, and which were read as they are stored.
        settings: those of its own that `TrainConfig` has too, by their names there.
        read: images that the latest iteration has given so far.
    """

    def __init__(self, source: Source, normalise: Normalisation) -> None:
        self.source = source
        self.name = source.name
        self.normalise = normalise
        self.reasons: dict[str, str] = {}
        self.turned: set[str] = set()
        self.settings: dict[str, Any] = {}
        self.read = 0
        self.epoch = 0
        self.start_batch = 0
        self._iterations = 0

    @property
    def skipped(self) -> set[str]:
        """Names of the images that could not be read, of all iterations so far."""
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
        """Raises what the workers report, and warns at the end of the epoch of images left out, or not upright."""
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
                yield self.normalise(loaded.images, loaded.patches), loaded.labels if self.source.labelled else None
        if bad and not self.read:
            file, reason = next(iter(bad.items()))
            raise UnreadableData(f"none of the images of {self.name} can be read, such as {file} ({reason})")
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


class MapLoader(Loader):
    """Over images that have numbers, by a plan. Its workers stay alive between iterations: keys tell them all."""

    def __init__(
        self,
        dataset: MapBatches,
        normalise: Normalisation,
        plan: TrainPlan | FixedPlan,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(dataset.source, normalise)
        self._dataset = dataset
        self._plan = plan
        self._processes = workers
        self._pin_memory = pin_memory
        self._loader: DataLoader[Loaded] | None = None

    def __len__(self) -> int:
        return len(self._plan)

    def close(self) -> None:
        self._loader = None

    def _loaded(self) -> Iterator[Loaded]:
        self._plan.epoch, self._plan.start_batch = self.epoch, self.start_batch
        if self._loader is None:
            self._loader = DataLoader(
                self._dataset,
                sampler=self._plan,
                batch_size=None,  # a key is a whole batch
                num_workers=self._processes,
                collate_fn=_unchanged,
                pin_memory=self._pin_memory,
                persistent_workers=self._processes > 0,
                worker_init_fn=be_patient,
                generator=torch.Generator(),  # else every iteration would draw from the global one
            )
        return start(self._loader)


class StreamLoader(Loader):
    """Over a stream. Every iteration starts workers of its own: their readers remember how far they have come."""

    def __init__(
        self,
        source: StreamSource,
        preparation: Preparation,
        normalise: Normalisation,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__(source, normalise)
        self._source = source
        self._preparation = preparation
        self._rows = max(1, batch_size // world)
        self._seed = seed
        self._processes = workers
        self._rank, self._world = rank, world
        self._pin_memory = pin_memory
        self._images = len(source) if limit is None else limit
        self._limit = limit

    def __len__(self) -> int:
        """In training exact; otherwise an estimate: every worker may have a smaller last batch."""
        share = -(-self._images // self._world)
        return self._images // (self._rows * self._world) if self._training else -(-share // self._rows)

    @property
    def _training(self) -> bool:
        return self._preparation.seed is not None

    def _loaded(self) -> Iterator[Loaded]:
        if self._training:
            return self._exactly(len(self))
        return start(self._workers()) if self._limit is None else self._first(-(-self._limit // self._world))

    def _exactly(self, batches: int) -> Iterator[Loaded]:
        """As many batches on every rank, or an error: a rank that stops earlier would leave the others waiting."""
        count = 0
        for loaded in islice(start(self._workers()), batches):
            yield loaded
            count += 1
        if count < batches:
            raise UnreadableData(
                f"the stream {self.name} ended after {count} of {batches} batches; it needs a shard for each of "
                f"{max(1, self._processes)} workers on {self._world} ranks, and as many images as it says it has"
            )

    def _first(self, images: int) -> Iterator[Loaded]:
        """Batches until there are this many images; the last is cut."""
        for loaded in start(self._workers()):
            if loaded.images is not None and loaded.labels is not None:
                loaded = loaded._replace(images=loaded.images[:images], labels=loaded.labels[:images])
                images -= len(loaded.images)
            yield loaded
            if images <= 0:
                return

    def _workers(self) -> DataLoader[Loaded]:
        """What the readers draw from: the same on all ranks for the shards, one of its own for a worker's images."""
        # To evaluate, every rank reads all and keeps its part: the readers' own division may leave out images of one
        # shard and read those of another twice.
        whole = not self._training and self._limit is None
        rank, world = (0, 1) if whole else (self._rank, self._world)
        shards = int(generator(self._seed, "shards").integers(2**31))
        images = int(generator(self._seed, "stream", self.epoch, self._rank).integers(2**31))
        self._source.prepare(
            seed=shards,
            worker_seed=images,
            epoch=self.epoch,
            workers=self._processes,
            rank=rank,
            world=world,
            rows=self._rows,
        )
        counters = (self.epoch, self._rank)
        keep = (self._rank, self._world) if whole else (0, 1)
        dataset = StreamBatches(self._source, self._preparation, self._rows, counters, self.start_batch, keep)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._processes,
            collate_fn=_unchanged,
            pin_memory=self._pin_memory,
            worker_init_fn=be_patient,
            generator=torch.Generator().manual_seed(images),  # from which the readers' worker seeds come
        )


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _unchanged(batch: Any) -> Any:
    """Instead of PyTorch's collation; by name, because spawned workers cannot take a lambda."""
    return batch
