"""Every format, bit depth and mode that Pillow reads, and what is said of the files that are left out."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from test_data_loaders import config
from test_data_sources import png_folder, refusal

from skd.data import calibration_loader, eval_loader, open_source
from skd.data.indexed import PairSource, ReaderSource
from skd.data.pixels import extensions, in_mode, is_turned, upright
from skd.data.source import BadImage, LabelError

GREY = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(8, 0)
ORIENTATION = 0x0112


def read(path: Path, channels: int = 3) -> Any:
    """The pixels of the one image in a folder of class folders."""
    return np.asarray(open_source(path, in_chans=channels).read(0)[0])


@pytest.mark.parametrize(
    "ending", ["png", "bmp", "gif", "tif", "tiff", "TIF", "pgm", "tga", "webp", "pcx", "jp2", "ico"]
)
def test_formats(tmp_path: Path, ending: str) -> None:
    if (ending == "jp2" and not features.check("jpg_2000")) or (ending == "webp" and not features.check("webp")):
        pytest.skip("this Pillow does not have it")
    (tmp_path / "cat").mkdir()
    options: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
    square = np.resize(GREY, (48, 48))
    options |= {"sizes": [(48, 48)]} if ending == "ico" else {}
    Image.fromarray(square).save(tmp_path / "cat" / f"0.{ending}", **options)
    assert np.array_equal(read(tmp_path, 1), square)


def test_endings() -> None:
    known = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".mpo"}
    assert known <= extensions() and not {".txt", ".pdf", ".h5", ".mpg", ".json", ""} & extensions()


@pytest.mark.parametrize(
    "mode", ["1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "RGB", "L", "RGBX", "HSV", "La", "RGBa"]
)
def test_eight_bit_modes(mode: str) -> None:
    """As Pillow converts them, alpha dropped."""
    grey = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8) if mode == "1" else GREY)
    start = grey.convert(
        "LA"
        if mode == "La"
        else "RGBA"
        if mode == "RGBa"
        else "P"
        if mode == "PA"
        else "RGB"
        if mode in ("YCbCr", "HSV")
        else "L"
    )
    image = start if mode == "L" else start.convert(mode)
    tolerance = 1 if mode in ("YCbCr", "CMYK", "HSV") else 0
    for wanted in ("L", "RGB"):
        found = in_mode(image, wanted)
        assert found.mode == wanted
        expected = np.asarray(grey if wanted == "L" else grey.convert("RGB"), dtype=int)
        assert abs(np.asarray(found, dtype=int) - expected).max() <= tolerance


def test_lab() -> None:
    image = Image.new("LAB", (2, 2), (128, 128, 128))
    assert in_mode(image, "L").mode == "L" and in_mode(image, "RGB").mode == "RGB"


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits(tmp_path: Path, ending: str, channels: int) -> None:
    """White is 65535; Pillow's own conversion makes white of everything from 255 on."""
    (tmp_path / "cat").mkdir()
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "cat" / f"0.{ending}")
    found = read(tmp_path, channels)
    assert np.array_equal(found if channels == 1 else found[..., 1], GREY)


def test_big_endian_sixteen_bits() -> None:
    values = GREY.astype(">u2") * 257
    image = Image.frombytes("I;16B", GREY.shape[::-1], values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(in_mode(image, "L")), GREY)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.float32) / 255, GREY),
        (GREY.astype(np.float32), GREY),
        (GREY.astype(np.float32) * 257, GREY),
        (GREY.astype(np.float32) * 1e6 - 5, GREY),
        (GREY.astype(np.float32) / 10 - 20, GREY),
        (GREY.astype(np.int32), GREY),
        (GREY.astype(np.int32) * 257, GREY),
        (np.where(GREY == 5, np.nan, GREY).astype(np.float32), np.where(GREY == 5, 0, GREY)),
        (np.full((3, 3), -7, np.int32), np.zeros((3, 3))),
    ],
)
def test_thirty_two_bits(values: Any, expected: Any) -> None:
    high = GREY.max()
    stretched = values.min() < 0 or values.max() > 65535
    expected = np.rint(expected * (255 / high)) if stretched else expected
    assert np.array_equal(np.asarray(in_mode(Image.fromarray(values), "L")), expected)
    assert np.array_equal(np.asarray(in_mode(Image.fromarray(values), "RGB"))[..., 2], expected)


@pytest.mark.parametrize("ending", ["gif", "tif", "png", "webp"])
def test_the_first_of_several_pictures(tmp_path: Path, ending: str) -> None:
    (tmp_path / "cat").mkdir()
    first, *others = (Image.new("RGB", (8, 8), (level, level, level)) for level in (80, 160, 240))
    first.save(tmp_path / "cat" / f"0.{ending}", save_all=True, append_images=others)
    assert abs(read(tmp_path).astype(int) - 80).max() <= 2


def test_left_out_and_why(tmp_path: Path) -> None:
    png_folder(tmp_path / "x", 2)
    for name in (
        "cat/.hidden.png",
        "cat/._0.png",
        "cat/notes.txt",
        "dog/data",
        ".trash/cat/0.png",
        "__MACOSX/a/0.png",
    ):
        file = tmp_path / "x" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((tmp_path / "x" / "cat" / "0.png").read_bytes())
    (tmp_path / "x" / "fox").mkdir()
    source = open_source(tmp_path / "x")
    assert len(source) == 6 and source.classes == ["cat", "dog", "eel"]
    document = source.left_out.to_dict()
    assert {reason: entry["count"] for reason, entry in document.items()} == {
        "hidden": 4,
        "no image by its name (.txt)": 1,
        "no image by its name (without ending)": 1,
        "empty folder": 1,
    }
    assert document["no image by its name (.txt)"]["such_as"] == ["cat/notes.txt"]
    assert "1 empty folder: fox; 4 hidden: " in str(source.left_out)
    mapped = open_source(tmp_path / "x", class_map={"cat": 0}).left_out.to_dict()
    assert mapped["not in class_map (dog)"] == {"count": 2, "such_as": ["0.png", "1.png"]}
    (tmp_path / "y" / "cat").mkdir(parents=True)
    (tmp_path / "y" / "cat" / "0.npy").touch()
    assert "left out: 1 no image by its name (.npy): cat/0.npy" in refusal(tmp_path / "y")


def test_links_in_circles(tmp_path: Path) -> None:
    png_folder(tmp_path / "x", 1)
    (tmp_path / "x" / "cat" / "loop").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "fox").symlink_to(tmp_path / "x" / "dog")
    source = open_source(tmp_path / "x")
    assert source.classes == ["cat", "dog", "eel", "fox"] and len(source) == 4


def turned(path: Path, number: int = 6, ending: str = "png") -> Path:
    """One upright image and one that EXIF says is to be turned: 8 wide and 16 high as stored."""
    (path / "cat").mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION] = number
    picture = Image.fromarray(np.resize(GREY, (16, 8)))
    picture.save(path / "cat" / f"0.{ending}")
    picture.save(path / "cat" / f"1.{ending}", exif=exif)
    return path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_orientation_is_counted_by_default(tmp_path: Path, workers: int, ending: str) -> None:
    source = open_source(turned(tmp_path, ending=ending), in_chans=1)
    assert source.read(0)[0].size == source.read(1)[0].size == (8, 16)
    source.turned.clear()
    loader = eval_loader(source, config(), batch_size=1, workers=workers)
    with pytest.warns(UserWarning, match=rf"1 image of .* should be turned.*1\.{ending}") as caught:
        (first, _), (second, _) = loader
        list(loader)
    told = [warning for warning in caught if "should be turned" in str(warning.message)]  # Python may warn of forks
    assert len(told) == 1 and loader.turned == {str(tmp_path / "cat" / f"1.{ending}")}
    if ending == "png":
        assert torch.equal(first, second)


@pytest.mark.parametrize("number", range(2, 9))
def test_orientation_on_request(tmp_path: Path, number: int) -> None:
    source = open_source(turned(tmp_path, number), in_chans=1, exif_orientation=True)
    plain, other = source.read(0)[0], source.read(1)[0]
    ways = (Image.Transpose(way) for way in (0, 3, 1, 5, 4, 6, 2))
    assert np.array_equal(np.asarray(other), np.asarray(plain.transpose(list(ways)[number - 2])))
    assert not source.turned


def test_tiff_is_upright_once(tmp_path: Path) -> None:
    """Pillow turns it itself."""
    for wanted in (False, True):
        source = open_source(turned(tmp_path / str(wanted), ending="tif"), in_chans=1, exif_orientation=wanted)
        assert source.read(1)[0].size == (16, 8) and not source.turned


def test_broken_exif_is_no_reason_to_skip() -> None:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG", exif=b"Exif\0\0II*\0" + os.urandom(3))
    image = Image.open(file)
    image.load()
    assert not is_turned(image) and upright(image) is image


def test_labels_are_none_where_there_are_none(tmp_path: Path) -> None:
    png_folder(tmp_path, 2)
    given = calibration_loader(open_source(tmp_path, in_chans=1), config(), images=6)
    without = calibration_loader(open_source(tmp_path, in_chans=1, labelled=False), config(classes=0), images=6)
    ((images, labels),), ((same, none),) = given, without
    assert torch.equal(images, same) and none is None and len(labels) == 6 and without.read == 6


def test_a_reason_has_no_address_in_it(tmp_path: Path) -> None:
    """It is the same in every run."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"x")
    with pytest.raises(BadImage) as caught:
        read(tmp_path)
    assert caught.value.reason == "UnidentifiedImageError: cannot identify image file"


def test_why_an_image_was_skipped(tmp_path: Path) -> None:
    png_folder(tmp_path, 2)
    (tmp_path / "cat" / "0.png").write_bytes(b"no picture")
    loader = eval_loader(open_source(tmp_path, in_chans=1), config(), batch_size=4)
    with pytest.warns(UserWarning, match="1 image of"):
        list(loader)
    ((file, reason),) = loader.reasons.items()
    assert file.endswith("cat/0.png") and reason.startswith("UnidentifiedImageError") and loader.read == 5


def test_fewer_than_sixteen_bits_of_a_tiff(tmp_path: Path) -> None:
    """White is the largest value of the bits that are used."""
    picture = Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))
    picture.save(tmp_path / "a.tiff")
    opened = Image.open(tmp_path / "a.tiff")
    opened.load()
    opened.tag_v2[258] = (12,)  # Pillow writes 16
    assert np.asarray(in_mode(opened, "L")).tolist() == [[0, 255]]


def test_dark_grey_maps_of_sixteen_bits(tmp_path: Path) -> None:
    """They stay dark: their largest value need not be above 255."""
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([0, 200], ">u2").tobytes())
    assert np.asarray(in_mode(Image.open(tmp_path / "a.pgm"), "L")).tolist() == [[0, 1]]


@pytest.mark.parametrize("transparency", [bytes(range(0, 256, 16)), 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_palette_with_transparent_colours(tmp_path: Path, transparency: Any, channels: int) -> None:
    """Dropped as any alpha is, and without Pillow's warning of a palette whose every colour has its own."""
    (tmp_path / "cat").mkdir()
    colours = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colours).quantize(16)
    image.save(tmp_path / "cat" / "0.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(tmp_path, channels)
    assert np.array_equal(found, np.asarray(image.convert("L" if channels == 1 else "RGB")))


class Broken:
    """A reader like timm's with one image, whose decoding raises an error or returns None."""

    def __init__(self, error: type[Exception], in_label: bool = False) -> None:
        self.error, self.in_label = error, in_label

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        if self.in_label:
            raise self.error(7)
        return self, 0

    def __enter__(self) -> None:
        raise self.error("in Pillow")

    def __exit__(self, *_: object) -> None: ...

    def filename(self, index: int, absolute: bool = True) -> str:
        return "0.sgi"


@pytest.mark.parametrize("error", [KeyError, IndexError, AttributeError, AssertionError, OverflowError, RuntimeError])
def test_any_error_of_pillow_is_an_unreadable_image(error: type[Exception]) -> None:
    """A KeyError too, which is not one of the class map, whether there is one or not."""
    for mapped in (False, True):
        source = ReaderSource(Broken(error), "x", "RGB", mapped=mapped)
        with pytest.raises(BadImage, match=rf"0\.sgi cannot be read: {error.__name__}: .*in Pillow"):
            source.read(0)
    pairs = PairSource([Image.new("L", (1, 1))], "x", "RGB")  # no pair
    with pytest.raises(BadImage, match="TypeError"):
        pairs.read(0)


def test_a_label_that_the_class_map_does_not_have() -> None:
    with pytest.raises(LabelError, match="the class map does not have: 7"):
        ReaderSource(Broken(KeyError, in_label=True), "x", "RGB", mapped=True).read(0)
    with pytest.raises(BadImage, match="KeyError: 7"):
        ReaderSource(Broken(KeyError, in_label=True), "x", "RGB").read(0)


def test_too_little_memory_is_no_fault_of_the_image() -> None:
    with pytest.raises(MemoryError):
        ReaderSource(Broken(MemoryError), "x", "RGB").read(0)


def test_torchvision_folder(tmp_path: Path) -> None:
    """torchvision's classes in torchvision's order, but images of every format, and what is left out is said."""
    from torchvision.datasets import ImageFolder

    for number, place in enumerate(("2", "10/deep/er", "10")):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / place / f"{number}.png")
    assert ImageFolder(tmp_path).class_to_idx == {"10": 0, "2": 1}
    (tmp_path / ".cache").mkdir()
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "2" / "deep.jp2")
    (tmp_path / "2" / "notes.txt").write_text("x")
    Image.fromarray(GREY).save(tmp_path / "alone.png")
    source = open_source("torch/image_folder", data_dir=tmp_path, in_chans=1)
    assert source.classes == ["10", "2"] and len(source) == 4
    labels = {Path(source.file(i)).name: source.read(i)[1] for i in range(4)}
    assert labels == {"0.png": 1, "deep.jp2": 1, "1.png": 0, "2.png": 0}
    assert all(np.array_equal(source.read(i)[0], GREY) for i in range(4))
    assert set(source.left_out.to_dict()) == {"hidden", "in no class", "no image by its name (.txt)"}
    assert len(open_source("torch/image_folder", data_dir=tmp_path, labelled=False)) == 5
    with pytest.raises(ValueError, match="takes no options"):
        open_source("torch/folder", data_dir=tmp_path, allow_empty=True)


def test_torchvision_data_sets_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own loader would cut 16 bits off at 255."""
    from timm.data import dataset_factory
    from torchvision.datasets import ImageFolder

    (tmp_path / "cat").mkdir()
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "cat" / "0.png")
    monkeypatch.setattr(dataset_factory, "ImageNet", lambda root, split: ImageFolder(root))
    source = open_source("torch/imagenet", data_dir=tmp_path, in_chans=1)
    assert np.array_equal(source.read(0)[0], GREY)
