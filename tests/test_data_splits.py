"""Folders by the names that people give them: the splits are found, or refused, but never taken for one set."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from test_data_sources import CLASSES, divided, png_folder, refusal

from skd.data import open_source
from skd.data.folders import split_folder


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("Train", "Test"),
        ("TRAIN", "Val"),
        ("data/train", "data/validation"),
        ("archive/images/Training", "archive/images/Testing"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train_images", "val_images"),
        ("training", "testing"),
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("train2017", "val2017"),
        ("TrainingImages", "TestImages"),
        ("imagenet-train", "imagenet-valid"),
    ],
)
def test_found(tmp_path: Path, train: str, validation: str) -> None:
    divided(tmp_path, train, validation)
    (tmp_path / "docs").mkdir()
    for require in (True, False):
        assert len(open_source(tmp_path, "train", require_split=require)) == 3
        assert len(open_source(tmp_path, "validation", require_split=require)) == 6


def test_validation_comes_before_test(tmp_path: Path) -> None:
    divided(tmp_path, "Train", "test", "Validation")
    assert split_folder(tmp_path, "validation") == tmp_path / "Validation"
    assert split_folder(tmp_path, "test") == tmp_path / "test"


def test_a_split_by_its_path(tmp_path: Path) -> None:
    divided(tmp_path, "a/train_small", "a/train_large", "a/val")
    assert "may be any of train_large, train_small" in refusal(tmp_path, "train")
    assert len(open_source(tmp_path, "a/train_small")) == 3
    assert len(open_source(tmp_path / "a", "Train_Small")) == 3


def test_several_divided_folders_are_refused(tmp_path: Path) -> None:
    divided(tmp_path, "old/train", "old/val", "new/train", "new/val")
    assert "several of its sub-folders have a split for training and one for evaluation (new, old)" in refusal(
        tmp_path, "train"
    )


@pytest.mark.parametrize("splits", [("one", "two"), ("a/fold1", "b/fold2"), ("train_a/x", "other/x")])
def test_a_class_under_several_folders(tmp_path: Path, splits: tuple[str, str]) -> None:
    divided(tmp_path, *splits)
    for split in ("train", "validation"):
        message = refusal(tmp_path, split)
        assert "the class 'cat' lies under several folders" in message and f"{splits[0]}/cat" in message
    assert len(open_source(tmp_path / splits[0])) == 3


def test_a_split_may_have_one_class_in_several_folders(tmp_path: Path) -> None:
    """As timm reads it: there is no other split to mix it up with."""
    divided(tmp_path, "train/day", "train/night", "val")
    assert len(open_source(tmp_path, "train")) == 9 and open_source(tmp_path, "train").classes == list(CLASSES)


def test_splits_in_every_class(tmp_path: Path) -> None:
    for name in CLASSES:
        png_folder(tmp_path / name, 1, ("train", "val"))
    assert "the class 'train' lies under several folders" in refusal(tmp_path, "train")


def test_splits_without_classes(tmp_path: Path) -> None:
    """They are not two classes; as images without labels they are two splits."""
    png_folder(tmp_path, 2, ("Train", "Val"))
    assert "the images of Train, Val must be in sub-folders, one for each class" in refusal(tmp_path, "train")
    source = open_source(tmp_path, "train", labelled=False)
    assert len(source) == 2 and source.root == tmp_path / "Train"


def test_a_split_without_classes_beside_one_with_them(tmp_path: Path) -> None:
    """As in ImageNet's archive, two folders down, beside another folder of folders."""
    png_folder(tmp_path / "Data" / "loc" / "train", 2)
    png_folder(tmp_path / "Data" / "loc", 2, ("val",))
    png_folder(tmp_path / "Extra" / "loc", 2, ("map",))
    assert "the images of train, val must be in sub-folders" in refusal(tmp_path, "train")
    assert "it has train, but no" in refusal(tmp_path / "Data", "validation")


def test_flat_classes_with_words_of_splits(tmp_path: Path) -> None:
    png_folder(tmp_path, 1, ("bullet_train", "cat", "test_tube"))
    assert open_source(tmp_path, "train").classes == ["bullet_train", "cat", "test_tube"]


def test_classes_with_words_of_splits(tmp_path: Path) -> None:
    """Folders in folders: what is called like a split is none without its counterpart."""
    png_folder(tmp_path / "model_train", 1, ("steam", "diesel"))
    png_folder(tmp_path / "cars", 1, ("red", "blue"))
    png_folder(tmp_path / "train_test_split", 1, ("bus", "van"))
    assert open_source(tmp_path, "train").classes == ["blue", "bus", "diesel", "red", "steam", "van"]


def test_images_beside_folders_of_images(tmp_path: Path) -> None:
    png_folder(tmp_path, 1)
    png_folder(tmp_path / "cat", 1, ("more",))
    assert "cat in" in refusal(tmp_path, "train") and "also folders of images" in refusal(tmp_path, "train")
    assert len(open_source(tmp_path, "train", class_map={"cat": 0, "more": 0})) == 2


def test_nested_classes(tmp_path: Path) -> None:
    png_folder(tmp_path / "animals" / "small", 1)
    png_folder(tmp_path, 1, ("bus",))
    assert open_source(tmp_path, "train").classes == ["bus", *CLASSES]


def test_images_without_labels(tmp_path: Path) -> None:
    """In one folder, in nested ones, beside each other: all of them."""
    for place in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        place.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(place / "1.png")
    source = open_source(tmp_path, "train", labelled=False)
    assert len(source) == 3 and source.classes is None and not source.labelled and source.read(2)[1] == -1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no images in"):
        open_source(tmp_path / "empty", labelled=False)


@pytest.mark.parametrize("split", ["/", "..", "../other", "train/../..", "a\0b"])
def test_a_split_does_not_lead_out_of_its_folder(tmp_path: Path, split: str) -> None:
    """All of a disk would be searched."""
    divided(tmp_path / "data", "train", "val")
    divided(tmp_path / "other", "train", "val")
    assert "must be the name of one of its sub-folders" in refusal(tmp_path / "data", split)
