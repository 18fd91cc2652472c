"""What runs in the workers: reading, transforming and stacking one batch at a time.

Errors that concern the data are not raised here: an exception that leaves a worker arrives as a traceback in text.
They travel in the batch (`Loaded.failure`), as do the names of unreadable images, and the main process raises them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from skd.data.counted import seeded
from skd.data.pixels import Patches, Pixels, Prepared, packed
from skd.data.plans import Key
from skd.data.readers import BadImage, LabelError, Source, StreamSource

RETRIES = 10  # unreadable images in a row before training gives up, as in timm

Sample = tuple[Prepared, int]
Bad = list[tuple[str, str]]  # files and reasons


class UnreadableImage(ValueError):
    """An image cannot be read, and bad_images is "fail"."""


class UnreadableData(OSError):
    """The data set has vanished, or so much of it cannot be read that going on makes no sense."""


class Loaded(NamedTuple):
    """One batch: images (n, C, H, W) uint8 and labels (n,) int64, None if there is no image; or why it failed.

    `bad` has the images that could not be read, each with the reason, `turned` those that EXIF says are not upright.
    An exception itself would hold on to the frames it passed, and those to the workers.
    """

    images: torch.Tensor | None
    labels: torch.Tensor | None
    bad: Bad
    failure: tuple[type[Exception], str] | None = None
    patches: Patches | None = None
    turned: Sequence[str] = ()


def _stacked(samples: list[Sample], bad: Bad, source: Source) -> Loaded:
    turned, source.turned = source.turned, []
    if not samples:
        return Loaded(None, None, bad, turned=turned)
    images, labels = default_collate([(image.pixels, label) for image, label in samples])  # in shared memory
    return Loaded(images, labels, bad, patches=packed([image.patches for image, _ in samples]), turned=turned)


class Preparation(NamedTuple):
    """What happens to an image between its source and the batch.

    Attributes:
        transform: PIL image to 8-bit pixels.
        seed: of the augmentation; None: nothing is random.
        num_classes: labels are 0..num_classes - 1; 0: they are not checked.
        fail: an unreadable image is an error.
    """

    transform: Pixels
    seed: int | None
    num_classes: int
    fail: bool

    def prepare(self, image: Any, label: int, counters: tuple[int, ...], file: Callable[[], str]) -> Sample:
        """Raises LabelError: the label is out of range, of the image that `file` names."""
        if self.num_classes and not 0 <= label < self.num_classes:
            raise LabelError(f"{file()} has the label {label}; the head has the classes 0..{self.num_classes - 1}")
        if self.seed is None:
            return self.transform(image), label
        with seeded(self.seed, "augment", *counters):
            return self.transform(image), label


class MapBatches(Dataset[Loaded]):
    """Batches by their keys: ``self[keys]``. Its content depends on the keys alone."""

    def __init__(self, source: Source, preparation: Preparation) -> None:
        self.source = source
        self.preparation = preparation
        self._missing = 0  # files in a row that are not there

    def __getitem__(self, keys: Sequence[Key]) -> Loaded:
        sample = self._evaluation_sample if self.preparation.seed is None else self._training_sample
        bad: Bad = []
        try:
            samples = [sample(key, bad) for key in keys]
        except (LabelError, UnreadableImage, UnreadableData) as failure:
            return Loaded(None, None, bad, (type(failure), str(failure)))
        return _stacked([sample for sample in samples if sample is not None], bad, self.source)

    def _evaluation_sample(self, key: Key, bad: Bad) -> Sample | None:
        """None for an image that cannot be read."""
        return self._read(key[1], key, bad)

    def _training_sample(self, key: Key, bad: Bad) -> Sample:
        """The next image that can be read takes the place of one that cannot."""
        for step in range(RETRIES):
            sample = self._read((key[1] + step) % len(self.source), key, bad)
            if sample is not None:
                return sample
        raise UnreadableData(
            f"{RETRIES} images of {self.source.name} in a row cannot be read, the last is {bad[-1][0]}"
        )

    def _read(self, index: int, key: Key, bad: Bad) -> Sample | None:
        try:
            image, label = self.source.read(index)
        except BadImage as error:
            self._judge(error)
            bad.append((error.file, error.reason))
            return None
        self._missing = 0
        # The key's own counters: a stand-in may be in the same epoch for itself.
        return self.preparation.prepare(image, label, key, partial(self.source.file, index))

    def _judge(self, error: BadImage) -> None:
        """Raise if an unreadable image is the end."""
        self._missing = self._missing + 1 if error.missing else 0
        if self.source.vanished() or self._missing >= RETRIES:
            raise UnreadableData(f"the data set {self.source.name} has vanished: {error}") from error
        if self.preparation.fail:
            raise UnreadableImage(str(error)) from error


class StreamBatches(IterableDataset[Loaded]):
    """This worker's batches of a stream; batch number b of an epoch comes from worker b modulo their number.

    Args:
        source: prepared for the epoch.
        preparation: what happens to each image.
        rows: images in a batch.
        counters: of the augmentation, before the worker and the position in its part of the stream.
        start_batch: batches before it are read, since a stream cannot do otherwise, but not prepared: they are empty.
        keep: (rank, world): of this worker's part only the images rank, rank + world, ...
    """

    def __init__(
        self,
        source: StreamSource,
        preparation: Preparation,
        rows: int,
        counters: tuple[int, ...],
        start_batch: int = 0,
        keep: tuple[int, int] = (0, 1),
    ) -> None:
        self.keep = keep
        self.source = source
        self.preparation = preparation
        self.rows = rows
        self.counters = counters
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[Loaded]:
        try:
            yield from self._batches()
        except (LabelError, UnreadableImage) as failure:
            yield Loaded(None, None, self._unread(), (type(failure), str(failure)))
        except BadImage as error:
            yield Loaded(None, None, self._unread(), (UnreadableData, str(error)))

    def _batches(self) -> Iterator[Loaded]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        count, samples = 0, []
        mine = islice(self.source.stream(), self.keep[0], None, self.keep[1])
        for count, (image, label) in enumerate(mine, start=1):
            self._judge()
            batch = (count - 1) // self.rows * workers + worker
            if batch >= self.start_batch:
                counters = (*self.counters, worker, count - 1)
                file = partial(self.source.file, count - 1)
                samples.append(self.preparation.prepare(image, label, counters, file))
            if count % self.rows == 0:
                yield _stacked(samples, self._unread(), self.source)
                samples = []
        self._judge()
        # Training takes whole batches, and none of another pass's images is read after its last.
        if self.preparation.seed is None and (count % self.rows or self.source.unread):
            yield _stacked(samples, self._unread(), self.source)

    def _judge(self) -> None:
        """Raise if an image that could not be read is the end."""
        if self.preparation.fail and self.source.unread:
            file, reason = self.source.unread[0]
            raise UnreadableImage(f"{file} cannot be read: {reason}")

    def _unread(self) -> Bad:
        """What could not be read since the last batch; it is emptied in place, as the reader notes there too."""
        unread = list(self.source.unread)
        self.source.unread.clear()
        return unread
