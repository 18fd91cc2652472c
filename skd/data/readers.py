"""Where images come from, behind one interface: `Source.read(index)` gives a PIL image and its label."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image

from skd.data.modes import in_mode, is_turned, upright
from skd.data.scanning import LeftOut

# What Pillow raises for a file that is missing, broken or unreasonably large.
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, zlib.error, struct.error, Image.DecompressionBombError)


class BadImage(Exception):
    """One image that cannot be read.

    Attributes:
        file: its name.
        reason: why, on one line.
        missing: the file is not there, rather than broken.
    """

    def __init__(self, file: str, reason: BaseException) -> None:
        self.file = file
        self.reason = " ".join(f"{type(reason).__name__}: {reason}".split())
        super().__init__(f"{file} cannot be read: {self.reason}")
        self.missing = isinstance(reason, FileNotFoundError)


class LabelError(ValueError):
    """A label that is not one class of the head."""


class Source:
    """Images and labels of one split of a data set.

    Attributes:
        name: for messages.
        classes: class names by label; None: unknown.
        mode: of the images, "L" or "RGB".
        root: the folder that the images are read from; None: there is none.
        mapped: labels come from a class map, so the number of classes need not be the head's.
        labelled: labels mean something; otherwise the loaders give None in their place.
        left_out: what is in the folder and not read.
        exif_orientation: pictures are turned as EXIF says. timm does not, so models are evaluated without.
        turned: names of pictures that EXIF says are not upright and were not turned, since it was last emptied.
        iterable: images come in the order of a stream (`StreamSource`), there is no `read`.
    """

    iterable = False
    _new_labels: list[int] | None = None

    def __init__(
        self,
        name: str,
        mode: str,
        *,
        classes: list[str] | None = None,
        root: Path | None = None,
        mapped: bool = False,
        labelled: bool = True,
        left_out: LeftOut | None = None,
        exif_orientation: bool = False,
    ) -> None:
        self.labelled = labelled
        self.left_out = LeftOut() if left_out is None else left_out
        self.exif_orientation = exif_orientation
        self.turned: list[str] = []
        self.name = name
        self.mode = mode
        self.classes = classes
        self.root = root
        self.mapped = mapped

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image, decoded, in `mode`, and its label.

        Raises:
            BadImage: the file cannot be read.
            LabelError: the label is not one integer.
        """
        raise NotImplementedError

    def file(self, index: int) -> str:
        """What to call an image in messages: its file, or its number. It may take as long as reading the image."""
        return f"{self.name}[{index}]"

    def vanished(self) -> bool:
        """The folder is no longer there, or can no longer be asked."""
        return self.root is not None and not os.path.exists(self.root)

    def _prepared(self, image: Image.Image, index: int) -> Image.Image:
        """The picture in `mode`, upright if that is wanted, else noted in `turned` if it is not."""
        if is_turned(image):
            if self.exif_orientation:
                image = upright(image)
            else:
                self.turned.append(self.file(index))
        return in_mode(image, self.mode)

    def renumber(self, new_labels: list[int]) -> None:
        """From now on what was label i is label ``new_labels[i]``; other labels stay, for the loaders to refuse."""
        old = self._new_labels
        self._new_labels = new_labels if old is None else [new_labels[label] for label in old]

    def _label(self, label: Any, index: int) -> int:
        """Raises LabelError: it is not one integer."""
        if not self.labelled:
            return -1
        try:
            number = int(label)
        except (TypeError, ValueError):
            raise LabelError(f"{self.file(index)} has the label {label!r}; it must be one integer") from None
        renumbered = self._new_labels
        return number if renumbered is None or not 0 <= number < len(renumbered) else renumbered[number]


class ArrayImages:
    """Map-style data set of (PIL image "L", label): images (n, height, width) uint8, labels (n,)."""

    def __init__(self, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class PairSource(Source):
    """A map-style data set of (PIL image, label)."""

    def __init__(self, dataset: Any, name: str, mode: str, **options: Any) -> None:
        super().__init__(name, mode, **options)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self._dataset[index]
            image = self._prepared(image, index)
        except _UNREADABLE as reason:
            raise BadImage(self.file(index), reason) from reason
        return image, self._label(label, index)

    def file(self, index: int) -> str:
        samples = getattr(self._dataset, "samples", None)  # torchvision's ImageFolder
        return str(samples[index][0]) if samples else super().file(index)


class ReaderSource(Source):
    """One of timm's readers of files: class folders, Hugging Face data sets."""

    def __init__(self, reader: Any, name: str, mode: str, **options: Any) -> None:
        super().__init__(name, mode, **options)
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        # timm's own data set would go on to the next image silently.
        try:
            file, label = self._reader[index]
            with file:
                image = self._prepared(_opened(file), index)
        except KeyError as key:
            raise LabelError(f"{self.file(index)} has a label that the class map does not have: {key}") from None
        except (*_UNREADABLE, TypeError) as reason:  # TypeError: None in place of an image
            raise BadImage(self.file(index), reason) from reason
        return image, self._label(label, index)

    def file(self, index: int) -> str:
        try:
            name = self._reader.filename(index, absolute=True)
        except (OSError, KeyError, TypeError):
            name = None
        return str(name) if name else super().file(index)


class StreamSource(Source):
    """One of timm's readers of streams (web data sets and the like): no index, an order of their own.

    Attributes:
        training: shuffled, and cut into whole batches of the same number in every worker.
    """

    iterable = True

    def __init__(self, dataset: Any, name: str, mode: str, *, training: bool, **options: Any) -> None:
        super().__init__(name, mode, **options)
        self._dataset = dataset
        self.training = training
        self.samples = int(getattr(dataset.reader, "num_samples", 0) or 0)

    def __len__(self) -> int:
        return self.samples

    def prepare(
        self, *, seed: int, worker_seed: int, epoch: int, workers: int, rank: int, world: int, rows: int
    ) -> None:
        """Set the order of an epoch, and this rank's share; before the workers start.

        The readers keep a pipeline once it is built, with generators that have moved on: it is built anew, so that an
        epoch is the same whether or not others came before it.
        """
        reader = self._dataset.reader
        reader.ds = None
        reader.common_seed, reader.worker_seed = seed, worker_seed
        reader.dist_rank, reader.dist_num_replicas = rank, world
        reader.batch_size = rows
        self._dataset.set_epoch(epoch)
        self._dataset.set_loader_cfg(num_workers=workers)

    def stream(self) -> Iterator[tuple[Image.Image, int]]:
        """This worker's images and labels.

        Raises:
            BadImage: the reader failed.
        """
        try:
            for position, (image, label) in enumerate(self._dataset):
                yield self._prepared(image, position), self._label(label, position)
        except LabelError:
            raise
        except KeyError as key:
            raise LabelError(f"{self.name} has no such column, or its class map no such label: {key}") from None
        except (*_UNREADABLE, RuntimeError) as reason:
            raise BadImage(self.name, reason) from reason


def _opened(file: Any) -> Image.Image:
    image = Image.open(file)
    image.load()  # some formats have their EXIF block after the pixels
    return image


def names_of(class_to_index: Mapping[str, int]) -> list[str] | None:
    """Class names by label; None if the labels are not 0..n-1, each once."""
    names = {index: name for name, index in class_to_index.items()}
    if not names or len(names) < len(class_to_index) or sorted(names) != list(range(len(names))):
        return None
    return [str(names[index]) for index in range(len(names))]
