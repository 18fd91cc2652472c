"""The idx files of MNIST and its relatives: train-images-idx3-ubyte, t10k-labels-idx1-ubyte, ...; also as .gz."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skd.data.readers import ArrayImages

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
_UNSIGNED_BYTE = 8  # the type code in a header


def idx_folder(folder: Path) -> Path | None:
    """`folder`, or its sub-folder "raw" (torchvision's layout), if idx files of images are in it; otherwise None."""
    for place in (folder, folder / "raw"):
        if any(_find(place, part, "images") for part in _PARTS.values()):
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
        images, labels = _required(folder, part, "images"), _required(folder, part, "labels")
        super().__init__(_read(images, dimensions=3), _read(labels, dimensions=1))
        if not len(self.images):
            raise ValueError(f"{images} holds no images")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{images} has {len(self.images)} images, but {labels} has {len(self.labels)} labels")
        self.classes = _classes(folder, int(self.labels.max()))


def _classes(folder: Path, highest: int) -> list[str]:
    named = folder.parent if folder.name == "raw" else folder
    if "fashion" in named.resolve().name.lower() and highest < len(FASHION):
        return list(FASHION)
    return [str(label) for label in range(max(10, highest + 1))]


def _names(part: str, kind: str) -> list[str]:
    code = {"images": "idx3", "labels": "idx1"}[kind]
    names = [f"{part}-{kind}-{code}-ubyte", f"{part}-{kind}.{code}-ubyte"]
    return [name + suffix for name in names for suffix in ("", ".gz")]


def _find(folder: Path, part: str, kind: str) -> Path | None:
    return next((folder / name for name in _names(part, kind) if (folder / name).is_file()), None)


def _required(folder: Path, part: str, kind: str) -> Path:
    file = _find(folder, part, kind)
    if file is None:
        raise ValueError(f"folder {str(folder)!r} has no {_names(part, kind)[0]}[.gz]")
    return file


def _read(file: Path, dimensions: int) -> npt.NDArray[Any]:
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
