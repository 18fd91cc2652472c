"""Where images come from, behind one interface: `Source.read(index)` gives a PIL image and its label."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
from PIL import Image
from torch.utils.data import get_worker_info

from skd.data.modes import in_mode, is_turned, upright
from skd.data.scanning import LeftOut


class BadImage(Exception):
    """One image that cannot be read.

    Attributes:
        file: its name.
        reason: why, on one line.
        missing: the file is not there, rather than broken.
    """

    def __init__(self, file: str, reason: BaseException | str) -> None:
        self.file = file
        words = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        # Pillow names the file object, too: a file that has been named, or an address in memory.
        self.reason = " ".join(re.sub(r" <_io\.[^>]*>", "", words).split())
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

    @contextmanager
    def _decoding(self, index: int, name: str | None = None) -> Iterator[None]:
        """Inside the block whatever Pillow (or the library in front of it) makes of a broken file is a `BadImage`.

        Its plugins raise all kinds of errors: OSError, SyntaxError, KeyError, IndexError, struct.error, ...
        """
        try:
            yield
        except (BadImage, LabelError, MemoryError):
            raise
        except Exception as reason:
            raise BadImage(name or self.file(index), reason) from reason

    def _prepared(self, image: Image.Image, index: int, name: str | None = None) -> Image.Image:
        """The picture in `mode`, upright if that is wanted, else noted in `turned` if it is not."""
        if is_turned(image):
            if self.exif_orientation:
                image = upright(image)
            else:
                self.turned.append(name or self.file(index))
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
        with self._decoding(index):
            image, label = self._dataset[index]
            image = self._prepared(image, index)
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
        with self._decoding(index):
            try:
                file, label = self._reader[index]
            except KeyError as key:
                if not self.mapped:
                    raise
                raise LabelError(f"{self.file(index)} has a label that the class map does not have: {key}") from None
            with file:
                image = self._prepared(opened(file), index)
        return image, self._label(label, index)

    def file(self, index: int) -> str:
        try:
            name = self._reader.filename(index, absolute=True)
        except Exception:  # of an image that is not there, whatever its library makes of it
            name = None
        return str(name) if name else super().file(index)


class Item(NamedTuple):
    """An image of a stream that is not decoded yet: its bytes or PIL image, and its name where it has one.

    `missing` says why there is no image.
    """

    content: Any
    name: str | None = None
    missing: str = ""


class StreamSource(Source):
    """One of timm's readers of streams (web data sets and the like): no index, an order of their own.

    The readers give undecoded images (`skd.data.streams`), which are decoded here by the rules of all other sources.

    Attributes:
        training: shuffled, and cut into whole batches of the same number in every worker.
        unread: names of images that could not be read and why, since it was last emptied.
    """

    iterable = True

    def __init__(self, dataset: Any, name: str, mode: str, *, training: bool, **options: Any) -> None:
        super().__init__(name, mode, **options)
        self._dataset = dataset
        self.training = training
        self.samples = int(getattr(dataset.reader, "num_samples", 0) or 0)
        self.unread: list[tuple[str, str]] = dataset.reader.unread

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
        """This worker's images and labels, those that cannot be read left out and noted in `unread`.

        In training others take their place, of another pass over this worker's part: every worker gives as many
        images as the reader counts.

        Raises:
            BadImage: the reader failed, or none of the images to train with can be read.
            LabelError: a label is not one integer, or not in the class map.
        """
        owed = yield from self._pass(None)
        while owed and self.training:
            left = yield from self._pass(owed)
            if left == owed:
                raise BadImage(self.name, "no image of a worker's part can be read")
            owed = left

    def _pass(self, most: int | None) -> Generator[tuple[Image.Image, int], None, int]:
        """One pass over this worker's part, until there are `most` images.

        Returns:
            How many images could not be read; with `most`, how many are missing.
        """
        bad = read = 0
        for position, (item, label) in self._undecoded():
            try:
                image = self._decoded(item, position)
            except BadImage as error:
                self.unread.append((error.file, error.reason))
                bad += 1
                continue
            yield image, self._label(label, position)
            read += 1
            if read == most:
                break
        return bad if most is None else most - read

    def _undecoded(self) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """What the reader gives, numbered; its failures are those of the stream."""
        try:
            yield from enumerate(self._dataset)
        except KeyError as key:
            raise LabelError(f"{self.name} has no such column, or its class map no such label: {key}") from None
        except (MemoryError, BadImage, LabelError):
            raise
        except Exception as reason:
            raise BadImage(self.name, reason) from reason

    def _decoded(self, item: Item, position: int) -> Image.Image:
        """Raises BadImage: it cannot be read."""
        name = item.name or self.file(position)
        if item.missing:
            raise BadImage(name, item.missing)
        with self._decoding(position, name):
            content = item.content
            image = opened(io.BytesIO(content)) if isinstance(content, bytes) else content
            return self._prepared(image, position, name)

    def file(self, index: int) -> str:
        """A worker's images have numbers of its own."""
        worker = get_worker_info()
        return f"{self.name}[{index if worker is None else f'{worker.id}:{index}'}]"


def opened(file: Any) -> Image.Image:
    """Decoded by Pillow, in its own mode."""
    image = Image.open(file)
    image.load()  # some formats have their EXIF block after the pixels
    return image


def names_of(class_to_index: Mapping[str, int]) -> list[str] | None:
    """Class names by label; None if the labels are not 0..n-1, each once."""
    names = {index: name for name, index in class_to_index.items()}
    if not names or len(names) < len(class_to_index) or sorted(names) != list(range(len(names))):
        return None
    return [str(names[index]) for index in range(len(names))]
