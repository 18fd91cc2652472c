"""idx files: what is read, what is refused, and where they are looked for."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skd.data import open_source
from skd.data.indexed import FASHION

FILES = {"train": "train", "validation": "t10k"}


def idx_bytes(array: Any) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, compress: bool = True, count: int = 12) -> dict[str, Any]:
    """Both splits; returns the images of each, (n, 4, 5) uint8. Labels are 0, 1, ..., 9, 0, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for split, part in FILES.items():
        images[split] = np.random.default_rng(len(part)).integers(0, 256, (count, 4, 5), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images[split]), ("labels-idx1", labels)):
            content = idx_bytes(array)
            if compress:
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)
    return images


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", ["mnist", "mnist/raw"])
def test_reads_both_splits(tmp_path: Path, compress: bool, place: str) -> None:
    images = write_idx(tmp_path / place, compress)
    for split, expected in images.items():
        source = open_source(tmp_path / "mnist", split, in_chans=1)
        read = [source.read(index) for index in range(len(source))]
        assert np.array_equal(np.stack([np.asarray(image) for image, _ in read]), expected)
        assert [label for _, label in read] == [*range(10), 0, 1]
        assert source.classes == [str(digit) for digit in range(10)]
    colour, _ = open_source(tmp_path / "mnist", "validation", in_chans=3).read(0)
    assert colour.mode == "RGB" and np.array_equal(np.asarray(colour)[..., 1], images["validation"][0])


@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw"])
def test_names_of_fashion(tmp_path: Path, place: str) -> None:
    """The folder of Debian's package, and torchvision's."""
    write_idx(tmp_path / place)
    assert open_source(tmp_path / place.split("/")[0], "train", in_chans=1).classes == FASHION
    assert open_source(tmp_path / place, "train", in_chans=1).classes == FASHION


@pytest.mark.parametrize("change", ["cut", "longer", "type", "dimensions", "header", "gzip cut", "gzip broken"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_damaged(tmp_path: Path, change: str, file: str) -> None:
    zipped = change.startswith("gzip")
    write_idx(tmp_path, compress=zipped)
    path = tmp_path / (file + ".gz" * zipped)
    content = bytearray(path.read_bytes())
    if change in ("cut", "gzip cut"):
        del content[-3:]
    elif change == "longer":
        content += b"x"
    elif change == "type":
        content[2] = 13
    elif change == "dimensions":
        content[3] += 1
    elif change == "header":
        del content[5:]
    else:
        content[20] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as caught:
        open_source(tmp_path, "train", in_chans=1)
    assert file in str(caught.value) and "\n" not in str(caught.value)
    assert len(open_source(tmp_path, "validation", in_chans=1)) == 12


def test_images_and_labels_must_agree(tmp_path: Path) -> None:
    write_idx(tmp_path, compress=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(11, np.uint8)))
    with pytest.raises(ValueError, match=r"has 12 images, but .*labels-idx1-ubyte has 11 labels"):
        open_source(tmp_path, "train", in_chans=1)


def test_missing(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"no t10k-labels-idx1-ubyte\[.gz\]"):
        open_source(tmp_path, "validation", in_chans=1)
    with pytest.raises(ValueError, match="split is 'extra'"):
        open_source(tmp_path, "extra", in_chans=1)
