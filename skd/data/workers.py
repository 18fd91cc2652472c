"""What runs in the workers: reading, transforming and stacking one batch at a time.

Errors in the data are not raised here, because an exception that leaves a worker reaches the main process only as the
text of a traceback. Instead a batch carries them (`Loaded.failure`), and the names of unreadable images, to the main
process, which raises them.

The end of this file starts and ends the worker processes. They survive the signals that stop a run, but end with it.
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
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from skd.data.counted import seeded
from skd.data.indexed import IndexedSource
from skd.data.loading import Key, Loading
from skd.data.operations import Operations, Unknown
from skd.data.pixels import Crops, DataConfig, Patches, Pixels, Prepared, eval_transform, packed, train_transform
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

    `bad` lists the images that could not be read, with reasons; `turned` those that EXIF says are not upright.
    `patches` and `operations` are what is left to do to the images.
    `failure` is a type and a text, because an exception would keep its frames alive, and these the workers.
    """

    images: torch.Tensor | None
    labels: torch.Tensor | None
    bad: Bad
    failure: tuple[type[Exception], str] | None = None
    patches: Patches | None = None
    turned: Sequence[str] = ()
    operations: Sequence[Operations] = ()


def _stacked(samples: list[Sample], bad: Bad, source: Source) -> Loaded:
    turned, source.turned = source.turned, []
    if not samples:
        return Loaded(None, None, bad, turned=turned)
    # In shared memory, in the order of the images' own memory: a stack of strided images takes several times as long.
    whole = samples[0][0].pixels.is_contiguous()
    ordered = [(image.pixels if whole else image.pixels.permute(1, 2, 0), label) for image, label in samples]
    images, labels = default_collate(ordered)
    return Loaded(
        images if whole else images.permute(0, 3, 1, 2),
        labels,
        bad,
        patches=packed([image.patches for image, _ in samples]),
        turned=turned,
        operations=[image.operations for image, _ in samples],
    )


class Preparation:
    """What happens to an image between its source and the batch.

    Args:
        data: the model's data configuration.
        loading: how it is augmented and where, and which labels there may be.

    Attributes:
        crops: only crops are made here, of tensors, and the device's stage does the rest.

    Raises:
        ValueError: the device's stage is asked for what it cannot do.
    """

    def __init__(self, data: DataConfig, loading: Loading) -> None:
        self.transform = _transform(data, loading)
        self.crops = isinstance(self.transform, Crops)
        self.loading = loading

    def __call__(
        self, image: Image.Image | torch.Tensor, label: int, counters: tuple[int, ...], file: Callable[[], str]
    ) -> Sample:
        """Raises LabelError: the label is out of range. `file` gives the name of the image for the message."""
        loading = self.loading
        if loading.num_classes and not 0 <= label < loading.num_classes:
            raise LabelError(f"{file()} has the label {label}; the head has the classes 0..{loading.num_classes - 1}")
        if not loading.training:
            return self.transform(image), label
        with seeded(loading.seed, "augment", *counters):
            return self.transform(image), label


def _transform(data: DataConfig, loading: Loading) -> Callable[[Any], Prepared]:
    if loading.augmentation is None:
        return Pixels(eval_transform(data))
    if loading.augment_on != "cpu":
        try:
            return Crops(train_transform(data, **asdict(loading.augmentation)), data["input_size"][1:])
        except Unknown as step:
            if loading.augment_on == "device":
                raise ValueError(
                    f"augment_on is 'device', where there is no {step}; it may be 'auto' or 'cpu'"
                ) from None
    return Pixels(train_transform(data, **asdict(loading.augmentation)))


class IndexedBatches(Dataset[Loaded]):
    """Batches by their keys: ``self[keys]``. The content of a batch depends only on its keys."""

    def __init__(self, source: IndexedSource, preparation: Preparation) -> None:
        self.source = source
        self.preparation = preparation
        self._missing = 0  # how many files in a row did not exist

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
            image, label = self._image(index)
        except BadImage as error:
            self._judge(error)
            bad.append((error.file, error.reason))
            return None
        self._missing = 0
        # The counters are those of `key`, not of `index`: the image read in place of a bad one also has a key of its
        # own in this epoch, and is to be augmented differently there.
        return self.preparation(image, label, key, partial(self.source.file, index))

    def _image(self, index: int) -> tuple[Image.Image | torch.Tensor, int]:
        return self.source.pixels(index) if self.preparation.crops else self.source.read(index)

    def _judge(self, error: BadImage) -> None:
        """Raise an error if loading has to end because of an unreadable image."""
        self._missing = self._missing + 1 if error.missing else 0
        if self.source.vanished() or self._missing >= RETRIES:
            raise UnreadableData(f"the data set {self.source.name} has vanished: {error}") from error
        if self.preparation.loading.fails:
            raise UnreadableImage(str(error)) from error


class StreamBatches(IterableDataset[Loaded]):
    """This worker's batches of a stream. Batch number b of an epoch comes from worker b % (number of workers).

    Args:
        source: prepared for the epoch.
        preparation: what happens to each image.
        counters: the first counters of the augmentation; the worker and the position in its part follow them.
        start_batch: earlier batches are read, since a stream cannot skip, but their images are not prepared; these
            batches are empty.
        keep: (rank, world): only the images rank, rank + world, ... of this worker's part are used.
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
        mine = islice(self.source.stream(self.preparation.crops), self.keep[0], None, self.keep[1])
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
        # In training every batch is whole, and nothing is read after the last one, so nothing is left to report.
        if not self.preparation.loading.training and (count % self.rows or self.source.unread):
            yield _stacked(samples, self._unread(), self.source)

    def _judge(self) -> None:
        """Raise an error if an image could not be read and bad_images is "fail"."""
        if self.preparation.loading.fails and self.source.unread:
            file, reason = self.source.unread[0]
            raise UnreadableImage(f"{file} cannot be read: {reason}")

    def _unread(self) -> Bad:
        """What could not be read since the last batch. The list is emptied in place, because the reader shares it."""
        unread = list(self.source.unread)
        self.source.unread.clear()
        return unread


_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def start(loader: DataLoader[Loaded]) -> Iterator[Loaded]:
    """``iter(loader)``; `_end` kills its worker processes, if they still run, when this process ends."""
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    _started.update(set(multiprocessing.active_children()) - before)
    return iterator


def be_patient(worker: int) -> None:
    """Run in each worker, so that it survives Ctrl-C and its first SIGTERM, and ends at the second SIGTERM.

    A signal to a whole job reaches the workers too. If they died at once, the main process could not finish its step
    and write a checkpoint. The main process ends the workers itself, if necessary with two SIGTERMs.
    """

    def obey_the_next(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, obey_the_next)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(owner: int = os.getpid()) -> None:
    """Kill the workers at exit: multiprocessing would send each only one SIGTERM, which it survives, and wait."""
    alive = [process for process in list(_started) if os.getpid() == owner and process.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report each end as a failure
    for process in alive:
        process.kill()


atexit.register(_end)
