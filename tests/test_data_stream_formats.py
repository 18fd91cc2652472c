"""Streams decode by the rules of folders: every format and bit depth; what cannot be read is counted."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data_loaders import STILL, config, flat, numbers

from skd.data import calibration_loader, eval_loader, open_source, train_loader
from skd.data.workers import UnreadableImage

RAMP = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(8, 0)
Entry = tuple[str, bytes]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(number: int) -> bytes:
    """As `numbers` reads it back."""
    return encoded(Image.new("L", (16, 16), 4 * number))


def shard(path: Path, *entries: Entry) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def web(folder: Path, *shards: list[Entry], count: int | None = None) -> str:
    """A web data set of which each split has all shards."""
    pytest.importorskip("webdataset")
    folder.mkdir(exist_ok=True)
    names = [f"{number}.tar" for number in range(len(shards))]
    for name, entries in zip(names, shards, strict=True):
        shard(folder / name, *entries)
    lengths = [sum(name.endswith(".cls") for name, _ in entries) for entries in shards]
    split = {"num_samples": count or sum(lengths), "filenames": names, "shard_lengths": lengths}
    splits = {name: {"name": name, **split} for name in ("train", "validation")}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return f"wds/{folder}"


def hugging_face(folder: Path, images: list[bytes]) -> str:
    """A parquet file of images, some of them perhaps no images, and labels."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {
        "image": [{"bytes": image, "path": None} for image in images],
        "label": [i % 3 for i in range(len(images))],
    }
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "data" / "validation.parquet"))
    return f"hfids/{folder}"


def opened(kind: str, folder: Path, images: list[bytes], endings: list[str], **options: Any) -> Any:
    """The images as the source of a stream."""
    if kind == "wds":
        entries = [
            (f"{number:03d}.{suffix}", content)
            for number, (image, ending) in enumerate(zip(images, endings, strict=True))
            for suffix, content in ((ending, image), ("cls", str(number % 3).encode()))
        ]
        return open_source(web(folder / "wds", entries), "validation", **options)
    name = hugging_face(folder / "hf", images)
    return open_source(name, "validation", num_samples=len(images), data_dir=folder / "cache", **options)


PICTURES = {
    "png": encoded(Image.fromarray(RAMP)),
    "bmp": encoded(Image.fromarray(RAMP), "BMP"),
    "tif": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
    "tiff": encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "pgm": encoded(Image.fromarray(RAMP), "PPM"),
    "webp": encoded(Image.fromarray(RAMP), "WEBP", lossless=True),
    "PNG": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
}


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_and_bit_depth(tmp_path: Path, kind: str, channels: int) -> None:
    source = opened(kind, tmp_path, list(PICTURES.values()), list(PICTURES), in_chans=channels)
    found = list(source.stream())
    assert len(found) == len(PICTURES) and source.unread == []
    for number, (image, label) in enumerate(found):
        assert image.mode == ("L" if channels == 1 else "RGB") and label == number % 3
        first = np.asarray(image) if channels == 1 else np.asarray(image)[..., 0]
        assert np.array_equal(first, RAMP)


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.parametrize("workers", [0, 1])
def test_orientation(tmp_path: Path, kind: str, workers: int) -> None:
    """Counted and left as it is stored, as timm does it (Hugging Face's own decode would turn it); or turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("L", (32, 16), 40)
    images = [encoded(wide, exif=exif), encoded(wide), encoded(wide, exif=exif)]
    source = opened(kind, tmp_path, images, ["png"] * 3, in_chans=1)
    loader = eval_loader(source, config(), batch_size=2, workers=workers)
    with pytest.warns(UserWarning, match="2 images of .* should be turned"):
        list(loader)
    assert len(loader.turned) == 2 and loader.read == 3
    assert [image.size for image, _ in source.stream()] == [(32, 16)] * 3
    again = open_source(source.name, "validation", in_chans=1, num_samples=3, exif_orientation=True)
    assert [image.size for image, _ in again.stream()] == [(16, 32), (32, 16), (16, 32)]


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_counted(tmp_path: Path, kind: str, workers: int) -> None:
    images = [grey(number) for number in range(8)]
    images[2], images[7] = b"no image", images[7][:40]
    source = opened(kind, tmp_path, images, ["png"] * 8, in_chans=1)
    loader = eval_loader(source, config(), batch_size=4, workers=workers)
    with pytest.warns(UserWarning, match="2 images of .* cannot be read, skipped"):
        assert sorted(flat(numbers(loader))) == [0, 1, 3, 4, 5, 6]
    assert loader.read == 6 and len(loader.reasons) == 2
    assert any("UnidentifiedImageError" in reason for reason in loader.reasons.values())
    if kind == "wds":
        assert [Path(name).name for name in sorted(loader.reasons)] == ["002.png", "007.png"]
    strict = eval_loader(source, config(), batch_size=4, workers=workers, bad_images="fail")
    with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
        list(strict)


def test_others_take_their_place_in_training(tmp_path: Path) -> None:
    """Every batch is whole; the same images in every worker's epoch, whether it is repeated or gone on with."""
    halves: list[list[Entry]] = [[], []]
    for number in range(16):
        content = b"broken" if number in (3, 12, 13) else grey(number)
        halves[number // 8] += [(f"{number:03d}.png", content), (f"{number:03d}.cls", b"0")]
    source = open_source(web(tmp_path / "wds", *halves), "train", in_chans=1)
    for workers in (0, 2):
        loader = train_loader(source, config(), batch_size=4, seed=1, workers=workers, **STILL)
        with pytest.warns(UserWarning, match="3 images of .* cannot be read"):
            first = numbers(loader)
        assert [len(batch) for batch in first] == [4] * 4
        assert set(flat(first)) == set(range(16)) - {3, 12, 13}
        with pytest.warns(UserWarning):
            assert numbers(loader) == first
        assert len(loader.reasons) == 3
    some = calibration_loader(source, config(), images=6, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [len(batch) for batch in numbers(some)] == [4, 2]


def test_nothing_can_be_read(tmp_path: Path) -> None:
    entries = [(f"{n}.{suffix}", b"0") for n in range(4) for suffix in ("png", "cls")]
    name = web(tmp_path / "wds", entries)
    with pytest.raises(OSError, match="none of the images of"):
        list(eval_loader(open_source(name, "validation"), config(3), batch_size=2))
    with pytest.raises(OSError, match="no image of a worker's part can be read"):
        list(train_loader(open_source(name, "train"), config(3), batch_size=2, seed=0))


def test_shards_that_are_broken_or_not_there(tmp_path: Path) -> None:
    """timm only logs them; the others are read."""
    parts = [[(f"{n}.png", grey(n)), (f"{n}.cls", b"0")] for n in range(3)]
    name = web(tmp_path / "wds", *parts)
    (tmp_path / "wds" / "0.tar").unlink()
    (tmp_path / "wds" / "1.tar").write_bytes((tmp_path / "wds" / "1.tar").read_bytes()[:700])
    loader = eval_loader(open_source(name, "validation", in_chans=1), config(), batch_size=2)
    with pytest.warns(UserWarning, match=r"3 images of .* cannot be read"):
        assert numbers(loader) == [[2]]
    assert sorted(Path(file).name for file in loader.reasons) == ["0.tar", "1.png", "1.tar"]
    with pytest.raises(UnreadableImage, match="tar cannot be read"):
        list(eval_loader(open_source(name, "validation"), config(3), batch_size=2, bad_images="fail"))


def test_samples_without_an_image_or_a_label(tmp_path: Path) -> None:
    entries = [("readme.txt", b"x"), ("0.png", grey(1)), ("0.cls", b"1"), ("1.png", grey(2))]
    name = web(tmp_path / "wds", entries, count=2)
    loader = eval_loader(open_source(name, "validation", in_chans=1), config(), batch_size=4)
    with pytest.warns(UserWarning, match="2 images of"):
        assert numbers(loader) == [[1]]
    assert sorted(loader.reasons.values()) == ["it has no label (cls)", "no image by its name (txt)"]
    loader = eval_loader(open_source(name, "validation", in_chans=1, labelled=False), config(classes=0), batch_size=4)
    with pytest.warns(UserWarning, match="1 image of"):
        ((images, labels),) = list(loader)
    assert len(images) == 2 and labels is None
    assert list(loader.reasons.values()) == ["no image by its name (txt)"]


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    bad = open_source(web(tmp_path / "a", [("0.png", grey(0)), ("0.cls", b"cat")]), "validation")
    with pytest.raises(ValueError, match=r"0\.png has a label that cannot be used: .*cat"):
        list(eval_loader(bad, config(3), batch_size=4))
    entries = [
        (f"{n}.{suffix}", content) for n in (0, 1) for suffix, content in (("png", grey(n)), ("cls", b"%d" % n))
    ]
    name = web(tmp_path / "b", entries)
    mapped = open_source(name, "validation", in_chans=1, class_map={0: 2, 1: 0})  # type: ignore[dict-item]
    assert [label for _, label in mapped.stream()] == [2, 0]
    short = open_source(name, "validation", in_chans=1, class_map={0: 2})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"1\.png has a label that the class map does not have"):
        list(short.stream())
    json_file = [("0.png", grey(0)), ("0.json", b'{"kind": -1}'), ("1.png", grey(1)), ("1.json", b'{"kind": 2}')]
    keyed = open_source(web(tmp_path / "c", json_file, count=2), "validation", in_chans=1, target_key="kind")
    assert [label for _, label in keyed.stream()] == [2]
    assert [reason for _, reason in keyed.unread] == ["its label is below 0"]


def test_one_ending_on_request(tmp_path: Path) -> None:
    entries = [("0.png", grey(1)), ("0.jpg", grey(2)), ("0.cls", b"0")]
    name = web(tmp_path / "wds", entries)
    for key, expected in ((None, 8), ("png", 4), ("bmp;png", 4)):
        options = {} if key is None else {"input_key": key}
        ((image, _),) = open_source(name, "validation", in_chans=1, **options).stream()
        assert image.getpixel((0, 0)) == expected


def test_tensorflow(tmp_path: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [encoded(Image.fromarray(RAMP)), encoded(deep), encoded(Image.fromarray(RAMP), exif=exif), b"broken"]
    paths = []
    for number, content in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(content)
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
    )
    rows = [(n, {"image": str(path), "label": n % 3}) for n, path in enumerate(paths)]
    split = {"validation": rows, "train": rows[:2]}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny", version="1.0.0", features=features, split_datasets=split, data_dir=tmp_path / "tfds"
    )
    for channels in (1, 3):
        source = open_source("tfds/tiny", "validation", in_chans=channels, data_dir=tmp_path / "tfds")
        found = {label: np.asarray(image.convert("L")) for image, label in source.stream()}
        assert sorted(found) == [0, 1, 2] and all(np.array_equal(image, RAMP) for image in found.values())
        assert len(source.turned) == 1 and len(source.unread) == 1
    training = open_source("tfds/tiny", "train", in_chans=1, data_dir=tmp_path / "tfds")
    assert len(list(train_loader(training, config(), batch_size=2, seed=0, **STILL))) == 1
    free = open_source("tfds/tiny", "train", in_chans=1, data_dir=tmp_path / "tfds", labelled=False)
    assert [label for _, label in free.stream()] == [-1, -1]
