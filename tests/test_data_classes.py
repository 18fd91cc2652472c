"""Classes of data and of a model, matched by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_vit
from PIL import Image

from skd.data import (
    calibration_loader,
    data_config,
    eval_loader,
    label_names,
    match_classes,
    open_source,
    train_loader,
)
from skd.data.indexed import ArrayImages, PairSource


def folder(root: Path, *classes: str) -> Path:
    """The k-th class has k + 1 images."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(number + 1):
            Image.new("RGB", (32, 32), (0, 60 * number, 0)).save(root / name / f"{index}.png")
    return root


def pairs(labels: list[int], classes: list[str] | None, **options: Any) -> PairSource:
    images = np.zeros((len(labels), 4, 4), np.uint8)
    return PairSource(ArrayImages(images, np.array(labels)), "pairs", "L", classes=classes, **options)


def labels_of(source: Any) -> list[int]:
    return [source.read(index)[1] for index in range(len(source))]


def test_the_same_names_in_another_order(tmp_path: Path) -> None:
    """timm sorts 1, 2, 10 as numbers, torchvision as words: a model of the one on the data of the other."""
    source = open_source(folder(tmp_path / "x", "1", "2", "10"), "train")
    assert source.classes == ["1", "2", "10"] and labels_of(source) == [0, 1, 1, 2, 2, 2]
    assert match_classes(source, ["1", "10", "2"]) is None
    assert source.classes == ["1", "10", "2"] and labels_of(source) == [0, 2, 2, 1, 1, 1]
    assert match_classes(source, ["10", "2", "1"]) is None  # and once more
    assert source.classes == ["10", "2", "1"] and labels_of(source) == [2, 1, 1, 0, 0, 0]


def test_the_loaders_give_the_labels_of_the_model(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "x", "a", "b", "c"), "train")
    match_classes(source, ["c", "a", "b"])
    config = data_config(tiny_vit(num_classes=3))
    for workers in (0, 1):
        loader = eval_loader(source, config, batch_size=6, workers=workers)
        assert [labels.tolist() for _, labels in loader] == [[1, 2, 2, 0, 0, 0]]
    for loader in (
        calibration_loader(source, config, images=6, batch_size=6),
        train_loader(source, config, batch_size=6, seed=0),
    ):
        assert sorted(label for _, labels in loader for label in labels.tolist()) == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (["rot", "blau", "gelb"], "label 0 is 'a' in the data, 'rot' in the model"),
        (["a", "b", "d"], "label 2 is 'c' in the data, 'd' in the model"),
        (["a", "c", "x"], "label 1 is 'b' in the data, 'c' in the model"),
        (["a", "b", "c", "d"], "label 3 is none in the data, 'd' in the model"),
        (["a", "b"], "label 2 is 'c' in the data, none in the model"),
    ],
)
def test_other_names_are_told_and_change_nothing(names: list[str], difference: str) -> None:
    source = pairs([0, 1, 2], ["a", "b", "c"])
    assert match_classes(source, names) == difference
    assert source.classes == ["a", "b", "c"] and labels_of(source) == [0, 1, 2]


def test_where_nothing_is_known_nothing_is_matched() -> None:
    for source, names in (
        (pairs([0, 1], ["a", "b"]), None),
        (pairs([0, 1], None), ["b", "a"]),
        (pairs([0, 1], ["a", "b"], mapped=True), ["b", "a"]),
    ):
        assert match_classes(source, names) is None and labels_of(source) == [0, 1]


def test_labels_that_no_class_has_stay_for_the_loaders_to_refuse() -> None:
    source = pairs([0, 1, 7, -1], ["a", "b"])
    match_classes(source, ["b", "a"])
    assert labels_of(source) == [1, 0, 7, -1]


def test_names_of_a_models_classes() -> None:
    model = tiny_vit(num_classes=3)
    assert label_names(model) is None
    for names, expected in (
        (("a", "b", "c"), ["a", "b", "c"]),
        ([1, 2, 3], ["1", "2", "3"]),
        (["a", "b"], None),  # of the head before
        ({"a": 0}, None),
        (None, None),
    ):
        model.pretrained_cfg = {"label_names": names}
        assert label_names(model) == expected
