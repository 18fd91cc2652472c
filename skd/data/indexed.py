"""Sources whose images have numbers: arrays, idx files, torchvision's data sets, timm's readers of files."""

from __future__ import annotations

import gzip
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol, TypeVar, Unpack

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from skd.data.pixels import in_pixels
from skd.data.source import About, LabelError, Source, opened

FASHION = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
_PARTS = {"train": "train", "validation": "t10k"}
_UNSIGNED_BYTE = 8  # the type code of bytes in an idx header

_Image = TypeVar("_Image", Image.Image, torch.Tensor)


class Pairs(Protocol):
    """A map-style data set of PIL images and labels, such as torchvision's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, object]: ...


class Reader(Protocol):
    """A timm reader. It returns opened files, not yet decoded, and their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[IO[bytes], object]: ...

    def filename(self, index: int, /, *, absolute: bool) -> str | None: ...


class IndexedSource(Source):
    """Images that are numbered 0..len - 1, so that any of them can be read."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image, decoded, in `mode`, and its label.

        Raises:
            BadImage: the file cannot be read.
            LabelError: the label is not one integer.
        """

    def pixels(self, index: int) -> tuple[torch.Tensor, int]:
        """`read`, the image as (C, height, width) uint8; sources of files decode JPEGs faster here."""
        image, label = self.read(index)
        return in_pixels(image, self.mode), label

    def vanished(self) -> bool:
        """Whether the folder of the images is gone, or can no longer be accessed."""
        return self.root is not None and not os.path.exists(self.root)


class PairSource(IndexedSource):
    """Images of a map-style data set of (PIL image, label)."""

    def __init__(self, dataset: Pairs, name: str, mode: str, **about: Unpack[About]) -> None:
        super().__init__(name, mode, **about)
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


class ReaderSource(IndexedSource):
    """Images of a timm reader of files: class folders, or a Hugging Face data set."""

    def __init__(self, reader: Reader, name: str, mode: str, **about: Unpack[About]) -> None:
        super().__init__(name, mode, **about)
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self._read(index, self._prepared, decoded=True)

    def pixels(self, index: int) -> tuple[torch.Tensor, int]:
        return self._read(index, self._pixels, decoded=False)

    def _read(self, index: int, prepare: Callable[[Image.Image, int], _Image], decoded: bool) -> tuple[_Image, int]:
        # timm's own data set would silently give the next image in place of one that cannot be read.
        with self._decoding(index):
            try:
                file, label = self._reader[index]
            except KeyError as key:
                if not self.mapped:
                    raise
                raise LabelError(f"{self.file(index)} has a label that the class map does not have: {key}") from None
            with file:
                image = prepare(opened(file, decoded), index)
        return image, self._label(label, index)

    def file(self, index: int) -> str:
        try:
            name = self._reader.filename(index, absolute=True)
        except Exception:  # the libraries raise different errors for a file name that they do not have
            name = None
        return str(name) if name else super().file(index)


class ArrayImages:
    """Map-style data set of (PIL image "L", label): images (n, height, width) uint8, labels (n,)."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


# The idx files of MNIST and its relatives: train-images-idx3-ubyte, t10k-labels-idx1-ubyte, ...; also as .gz


def idx_folder(folder: Path) -> Path | None:
    """`folder`, or its sub-folder "raw" (torchvision's layout), if idx files of images are in it; otherwise None."""
    for place in (folder, folder / "raw"):
        if any(_idx_file(place, part, "images") for part in _PARTS.values()):
            return place
    return None


class IdxImages(ArrayImages):
    """The images and labels of two idx files, held in memory.

    Args:
        folder: from `idx_folder`.
        split: "train" or "validation".

    Attributes:
        classes: names by label: Fashion-MNIST's where the folder's name says so, else "0", "1", ...

    Raises:
        ValueError: a file is missing, damaged, empty, or the two do not have the same number of items.
    """

    def __init__(self, folder: Path, split: str) -> None:
        part = _PARTS[split]
        images, labels = _required_file(folder, part, "images"), _required_file(folder, part, "labels")
        super().__init__(_array(images, dimensions=3), _array(labels, dimensions=1))
        if not len(self.images):
            raise ValueError(f"{images} holds no images")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{images} has {len(self.images)} images, but {labels} has {len(self.labels)} labels")
        self.classes = _idx_classes(folder, int(self.labels.max()))


def _idx_classes(folder: Path, highest: int) -> list[str]:
    named = folder.parent if folder.name == "raw" else folder
    if "fashion" in named.resolve().name.lower() and highest < len(FASHION):
        return list(FASHION)
    return [str(label) for label in range(max(10, highest + 1))]


def _idx_names(part: str, kind: str) -> list[str]:
    code = {"images": "idx3", "labels": "idx1"}[kind]
    names = [f"{part}-{kind}-{code}-ubyte", f"{part}-{kind}.{code}-ubyte"]
    return [name + suffix for name in names for suffix in ("", ".gz")]


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    return next((folder / name for name in _idx_names(part, kind) if (folder / name).is_file()), None)


def _required_file(folder: Path, part: str, kind: str) -> Path:
    file = _idx_file(folder, part, kind)
    if file is None:
        raise ValueError(f"folder {str(folder)!r} has no {_idx_names(part, kind)[0]}[.gz]")
    return file


def _array(file: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array in an idx file: two zero bytes, a type code, the number of dimensions, their sizes, the data."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or cannot be read: {error}") from None
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise ValueError(f"{file} is damaged: it does not begin as an idx file of bytes in {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise ValueError(f"{file} is damaged: {expected} bytes should follow its header, {len(content) - start} do")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
