"""What runs in the workers: reading, transforming and stacking one batch at a time.

Errors that concern the data are not raised here: an exception that leaves a worker arrives as a traceback in text.
They travel in the batch (`Loaded.failure`), as do the names of unreadable images, and the main process raises them.

At the end is how the processes begin and end: they outlive the signals of a run that is being stopped, but not the
run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from skd.data.counted import seeded
from skd.data.indexed import IndexedSource
from skd.data.loading import Key, Loading
from skd.data.pixels import DataConfig, Patches, Pixels, Prepared, eval_transform, packed, train_transform
from skd.data.source import BadImage, LabelError, Source
from skd.data.streams import StreamSource

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


class Preparation:
    """What happens to an image between its source and the batch.

    Args:
        data: the model's data configuration.
        loading: how it is augmented, and which labels there may be.
    """

    def __init__(self, data: DataConfig, loading: Loading) -> None:
        augmentation = loading.augmentation
        self.transform = Pixels(
            eval_transform(data) if augmentation is None else train_transform(data, **asdict(augmentation))
        )
        self.loading = loading

    def __call__(self, image: Image.Image, label: int, counters: tuple[int, ...], file: Callable[[], str]) -> Sample:
        """Raises LabelError: the label is out of range, of the image that `file` names."""
        loading = self.loading
        if loading.num_classes and not 0 <= label < loading.num_classes:
            raise LabelError(f"{file()} has the label {label}; the head has the classes 0..{loading.num_classes - 1}")
        if not loading.training:
            return self.transform(image), label
        with seeded(loading.seed, "augment", *counters):
            return self.transform(image), label


class IndexedBatches(Dataset[Loaded]):
    """Batches by their keys: ``self[keys]``. Its content depends on the keys alone."""

    def __init__(self, source: IndexedSource, preparation: Preparation) -> None:
        self.source = source
        self.preparation = preparation
        self._missing = 0  # files in a row that are not there

    def __getitem__(self, keys: Sequence[Key]) -> Loaded:
        training = self.preparation.loading.training
        sample = self._training_sample if training else self._evaluation_sample
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
        return self.preparation(image, label, key, partial(self.source.file, index))

    def _judge(self, error: BadImage) -> None:
        """Raise if an unreadable image is the end."""
        self._missing = self._missing + 1 if error.missing else 0
        if self.source.vanished() or self._missing >= RETRIES:
            raise UnreadableData(f"the data set {self.source.name} has vanished: {error}") from error
        if self.preparation.loading.fails:
            raise UnreadableImage(str(error)) from error


class StreamBatches(IterableDataset[Loaded]):
    """This worker's batches of a stream; batch number b of an epoch comes from worker b modulo their number.

    Args:
        source: prepared for the epoch.
        preparation: what happens to each image.
        counters: of the augmentation, before the worker and the position in its part of the stream.
        start_batch: batches before it are read, since a stream cannot do otherwise, but not prepared: they are empty.
        keep: (rank, world): of this worker's part only the images rank, rank + world, ...
    """

    def __init__(
        self,
        source: StreamSource,
        preparation: Preparation,
        counters: tuple[int, ...],
        start_batch: int = 0,
        keep: tuple[int, int] = (0, 1),
    ) -> None:
        self.keep = keep
        self.source = source
        self.preparation = preparation
        self.rows = preparation.loading.rows
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
                samples.append(self.preparation(image, label, counters, file))
            if count % self.rows == 0:
                yield _stacked(samples, self._unread(), self.source)
                samples = []
        self._judge()
        # Training takes whole batches, and none of another pass's images is read after its last.
        if not self.preparation.loading.training and (count % self.rows or self.source.unread):
            yield _stacked(samples, self._unread(), self.source)

    def _judge(self) -> None:
        """Raise if an image that could not be read is the end."""
        if self.preparation.loading.fails and self.source.unread:
            file, reason = self.source.unread[0]
            raise UnreadableImage(f"{file} cannot be read: {reason}")

    def _unread(self) -> Bad:
        """What could not be read since the last batch; it is emptied in place, as the reader notes there too."""
        unread = list(self.source.unread)
        self.source.unread.clear()
        return unread


_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def start(loader: DataLoader[Loaded]) -> Iterator[Loaded]:
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

    def obey_the_next(number: int, frame: FrameType | None) -> None:
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
