"""Opening data by name: what is found, and one line of explanation for what is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skd.data import check_classes, digits, open_source

CLASSES = ("cat", "dog", "eel")


def png_folder(folder: Path, count: int = 6, classes: tuple[str, ...] = CLASSES, mode: str = "RGB") -> Path:
    """`count` images per class, 20 x 16; every pixel of image i (0, 1, ... in the folder's order) is 4 * i."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            grey = Image.new("L", (20, 16), 4 * (number * count + index))
            grey.convert(mode).save(folder / name / f"{index}.png")
    return folder


def divided(folder: Path, *splits: str) -> Path:
    for count, split in enumerate(splits, start=1):
        png_folder(folder / split, count)
    return folder


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_source(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_class_folders(tmp_path: Path, channels: int, mode: str) -> None:
    source = open_source(png_folder(tmp_path / "x"), "train", in_chans=channels)
    assert len(source) == 18 and source.classes == list(CLASSES) and not source.iterable
    image, label = source.read(13)
    assert image.mode == mode and image.size == (20, 16) and np.asarray(image).max() == 52 and label == 2
    assert source.file(13) == str(tmp_path / "x" / "eel" / "1.png")


@pytest.mark.parametrize("names", [("train", "val"), ("training", "validation"), ("train", "test")])
def test_splits_by_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    divided(tmp_path, *names)
    assert len(open_source(tmp_path, "train", require_split=True)) == 3
    assert len(open_source(tmp_path, "validation", require_split=True)) == 6


def test_the_very_name_comes_first(tmp_path: Path) -> None:
    divided(tmp_path, "val", "test", "mine")
    assert len(open_source(tmp_path, "test")) == 6 and len(open_source(tmp_path, "validation")) == 3
    assert len(open_source(tmp_path, "mine")) == 9


def test_a_folder_without_splits(tmp_path: Path) -> None:
    """Fit for calibration and evaluation; to train on, it would be validated with its own images."""
    png_folder(tmp_path / "x")
    assert len(open_source(tmp_path / "x", "validation")) == len(open_source(tmp_path / "x", "train")) == 18
    for split in ("train", "validation"):
        message = refusal(tmp_path / "x", split, require_split=True)
        assert "train and validation" in message and " val, " in message


def test_a_split_that_is_not_there_is_not_replaced_by_all(tmp_path: Path) -> None:
    """Evaluation on the parent folder would be evaluation on the training images."""
    assert "it has train, but no sub-folder validation or val or" in refusal(divided(tmp_path, "train"), "validation")
    assert "no sub-folder mine" in refusal(tmp_path / "train", "mine")


def test_a_class_called_train(tmp_path: Path) -> None:
    source = open_source(png_folder(tmp_path / "x", classes=("bus", "train")), "train")
    assert source.classes == ["bus", "train"] and len(source) == 12


def test_folders_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    png_folder(tmp_path / "x")
    assert "there is no such folder, and it is neither 'digits'" in refusal(tmp_path / "nowhere")
    assert "a file; it must be a folder" in refusal(file)
    assert "there are no images in" in refusal(tmp_path / "empty")
    assert "all of its images lie directly in" in refusal(tmp_path / "x" / "cat")
    Image.new("L", (4, 4)).save(tmp_path / "x" / "stray.png")
    assert "some of its images lie directly in" in refusal(tmp_path / "x")
    assert "in_chans is 4" in refusal(tmp_path / "x", in_chans=4)


def test_class_map(tmp_path: Path) -> None:
    png_folder(tmp_path / "x")
    (tmp_path / "names.txt").write_text("eel\ncat\n")
    for class_map in ({"eel": 0, "cat": 1}, tmp_path / "names.txt", str(tmp_path / "names.txt")):
        source = open_source(tmp_path / "x", "train", class_map=class_map)
        assert source.classes == ["eel", "cat"]
        assert [source.read(index)[1] for index in range(12)] == [1] * 6 + [0] * 6
        check_classes(source, 1000)
    assert open_source(tmp_path / "x", class_map={"eel": 7, "cat": 2}).classes is None
    assert "no images of the classes in class_map" in refusal(tmp_path / "x", class_map={"fox": 0})
    assert "class_map is 'nowhere.txt'" in refusal(tmp_path / "x", class_map="nowhere.txt")


def test_number_of_classes(tmp_path: Path) -> None:
    source = open_source(png_folder(tmp_path / "x"), "train")
    check_classes(source, 3)
    check_classes(source, 0)
    for wrong in (2, 4, 1000):
        with pytest.raises(ValueError, match=r"has 3 classes \(cat, dog, eel\), the model's head has") as caught:
            check_classes(source, wrong)
        assert "model.reset_classifier(3), or --num-classes 3" in str(caught.value)


def test_digits() -> None:
    for split, part in zip(("train", "validation"), digits(), strict=True):
        source = open_source("digits", split, in_chans=1)
        assert len(source) == len(part.labels) and source.classes == [str(digit) for digit in range(10)]
        assert [source.read(index)[1] for index in range(50)] == part.labels[:50].tolist()
    assert open_source("digits", "test", in_chans=3).read(0)[0].mode == "RGB"
    assert "split is 'mine'" in refusal("digits", "mine")
    assert "class_map is given" in refusal("digits", class_map={"0": 1})
    assert "input_key is given" in refusal("./digits", input_key="image")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither 'digits' nor a name with a prefix (hfds/, hfids/, wds/, tfds/, torch/)" in refusal("fdhs/cifar10")
    assert "data_dir must say" in refusal("torch/cifar10")
    assert "Unknown torchvision dataset cifra10" in refusal("torch/cifra10", data_dir=tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("looked for the network"))
    assert "download=True" in refusal("torch/cifar10", "train", data_dir=tmp_path)
    for name, package in (("hfds/x", "datasets"), ("hfids/x", "datasets"), ("wds/x", "webdataset")):
        monkeypatch.setitem(sys.modules, package, None)
        assert refusal(name).endswith(f"pip install {package}")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert refusal("tfds/x").endswith("pip install tensorflow-datasets tensorflow")


def test_a_folder_called_like_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    png_folder(Path("torch/x"))
    assert len(open_source(Path("torch/x"))) == len(open_source("./torch/x")) == 18


def test_torchvision_folder(tmp_path: Path) -> None:
    png_folder(tmp_path / "train")
    source = open_source("torch/image_folder", "train", data_dir=tmp_path)
    assert source.classes == list(CLASSES) and source.read(7)[1] == 1
    assert source.file(7) == str(tmp_path / "train" / "dog" / "1.png")
    assert "train and validation" in refusal("torch/folder", data_dir=tmp_path / "train", require_split=True)
    assert "it has train, but no" in refusal("torch/folder", data_dir=tmp_path)
    assert "class_map is given" in refusal("torch/image_folder", data_dir=tmp_path, class_map={"cat": 0})


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    name, cache = f"hfds/{divided(tmp_path / 'x', 'train', 'val')}", tmp_path / "cache"
    source = open_source(name, "validation", in_chans=1, data_dir=cache)
    assert len(source) == 6 and source.classes == list(CLASSES)
    image, label = source.read(5)
    assert image.mode == "L" and np.asarray(image).max() == 20 and label == 2
    assert source.file(5).endswith("eel/1.png")
    assert "target_key is 'fine'; " in refusal(name, "train", data_dir=cache, target_key="fine")
    assert "has the columns image, label" in refusal(name, "train", data_dir=cache, input_key="img")
    assert "Unknown split" in refusal(name, "test", data_dir=cache)


def test_hugging_face_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address is even looked up."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("looked for the network"))
    assert "download=True fetches what is not there" in refusal("hfds/nobody/nothing", data_dir=tmp_path)


def test_web_data_set_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    assert "there is no folder" in refusal("wds/nowhere", "train")
    assert "split train not found" in refusal("wds/", "train", data_dir=tmp_path)
