"""`skd.data.loaders`: the settings of a run are those of its loaders, from Python as from the command line."""

from __future__ import annotations

import warnings
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, digit_net, digit_vit, training_config
from test_commands import make_images
from test_data_loaders import STILL, flat, numbers, same
from test_data_sources import divided, png_folder
from test_data_streams import write_shards

import skd
from skd.cli import parsed
from skd.commands import train as command
from skd.data import Augmentation, Sources, data_config, loaders, open_source, train_loader
from skd.data.pixels import AUGMENTATION


def batches(config: skd.TrainConfig, model: Any = None, data: Any = "digits", **options: Any) -> Any:
    return loaders(data, digit_vit() if model is None else model, config, **options)


def two(loader: Any) -> list[Any]:
    """The first two batches."""
    return list(islice(loader, 2))


def test_one_set_of_defaults() -> None:
    settings = {setting.name: setting.default for setting in fields(skd.TrainConfig)}
    assert {name: settings[name] for name in AUGMENTATION} == vars(Augmentation())
    assert vars(Augmentation())["aa"] == "rand-m9-mstd0.5-inc1" and Augmentation().reprob == 0.25


def test_what_the_command_line_uses(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    model = skd.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3
    )
    config = training_config(batch_size=8, grad_accum_steps=2, calibration_images=10, aug_repeats=2, seed=5)
    arguments = parsed(["train", "--data", str(tmp_path / "images"), "--supernet", "x"])
    arguments.group = None
    theirs = command.loaders(arguments, model, config)
    ours = skd.data.loaders(tmp_path / "images", skd.SuperNet(model), config)
    for one, other in zip(ours, theirs, strict=True):
        assert same(one, other) and len(one) > 0
    assert [len(labels) for _, labels in ours.train] == [4] * 6
    assert [len(labels) for _, labels in ours.validation] == [8, 4]
    assert [len(labels) for _, labels in ours.calibration] == [8, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"scale": (0.5, 0.6)},
        {"ratio": (2.0, 3.0)},
        {"hflip": 1.0},
        {"vflip": 1.0},
        {"color_jitter": 1.0},
        {"aa": "rand-m9-mstd0.5-inc1"},
        {"train_interpolation": "bilinear"},
        {"reprob": 0.5},
        {"reprob": 0.5, "remode": "const"},
        {"reprob": 0.5, "recount": 3},
        {"aug_repeats": 3},
        {"augment_on": "cpu"},
        {"seed": 1},
        {"batch_size": 8},
    ],
    ids=lambda change: list(change)[-1],
)
def test_settings_of_training(change: dict[str, Any]) -> None:
    """Each changes the batches, and to what `train_loader` makes of it."""
    plain = {"aa": None, "reprob": 0.0, "hflip": 0.0, "color_jitter": 0.0, "aug_repeats": 1, "batch_size": 16}
    model = digit_vit()
    changed = plain | change
    found = [two(batches(training_config(**settings), model).train) for settings in (plain, changed)]
    assert not same(*found)
    source = open_source("digits", "train", in_chans=1)
    expected = train_loader(source, data_config(model), **{"seed": 0, **changed})
    assert same(found[1], two(expected))


def test_other_settings(tmp_path: Path) -> None:
    config = training_config(validation_batch_size=7, calibration_images=9, workers=1)
    train, validation, calibration = batches(config)
    assert len(next(iter(validation))[1]) == 7
    assert sum(len(labels) for _, labels in calibration) == calibration.read == 9
    assert train.loading.workers == 1
    assert batches(training_config(progressive_epochs=0)).calibration is None
    divided(tmp_path, "train", "val")
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"no picture")
    model = digit_vit(num_classes=3)
    config = training_config(batch_size=3, bad_images="fail", calibration_images=3)
    with pytest.raises(ValueError, match="cannot be read"):
        list(batches(config, model, tmp_path).validation)


def test_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of every batch each."""
    whole = batches(training_config())
    monkeypatch.setattr("skd.data.building.size_of", lambda group: 2)
    monkeypatch.setattr("skd.data.building.rank_of", lambda group: 1)
    half = batches(training_config(), group="both")
    for one, other in ((whole.train, half.train), (whole.calibration, half.calibration)):
        (images, _), (part, _) = next(iter(one)), next(iter(other))
        assert torch.equal(images[1::2], part)


def test_streams(tmp_path: Path) -> None:
    """The calibration of a stream has a reader of its own."""
    pytest.importorskip("webdataset")
    config = training_config(batch_size=8, aug_repeats=1, calibration_images=8, **STILL | {"color_jitter": 0.0})
    model = digit_vit(num_classes=3, img_size=16)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0,), "std": (1.0,)}
    train, validation, calibration = batches(config, model, f"wds/{write_shards(tmp_path)}")
    iterator = iter(train)
    next(iterator)
    assert len(flat(numbers(calibration))) == 8 and len(list(iterator)) == 5
    assert sorted(flat(numbers(validation))) == list(range(48))


def test_mistakes(tmp_path: Path) -> None:
    model = digit_vit(num_classes=3)
    config = training_config(batch_size=3)
    png_folder(tmp_path / "undivided")
    with pytest.raises(ValueError, match="training needs images to train and others"):
        batches(config, model, tmp_path / "undivided")
    with pytest.raises(ValueError, match="has 10 classes"):
        batches(config, model)
    png_folder(tmp_path / "other" / "train")
    png_folder(tmp_path / "other" / "val", classes=("cat", "dog", "fox"))
    with pytest.raises(ValueError, match="have different classes, so their labels differ: only in one is eel"):
        batches(config, model, tmp_path / "other")
    assert len(batches(config, model, tmp_path / "other", val_split="train").validation) == 6
    opened = open_source(tmp_path / "undivided", in_chans=1)
    assert len(batches(config, model, Sources(opened, opened, opened)).train) == 6
    with pytest.raises(ValueError, match="class_map is given with sources that are open already"):
        batches(config, model, Sources(opened, opened, opened), class_map={})


def test_settings_that_a_run_cannot_have_are_named() -> None:
    """A loader made by hand keeps its own augmentation; that is said. Of one made by the settings nothing is."""
    config = training_config(epochs=1, progressive_epochs=1, calibration_images=16, aug_repeats=1, batch_size=64)
    net = digit_net()
    train, validation, calibration = batches(config, net)
    by_hand = train_loader(train.source, data_config(net), batch_size=64, seed=0, aa=None, reprob=0.5)
    with pytest.warns(UserWarning, match=r"train_loader was made with aa=None, reprob=0\.5; that counts") as caught:
        skd.train(net, by_hand, validation, config, calibration=calibration, console=QUIET)
    assert "not aa='rand-m9-mstd0.5-inc1', reprob=0.25 as in config" in str(caught[0].message)
    assert caught[0].filename == __file__ and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skd.train(digit_net(), train, validation, config, calibration=calibration, console=QUIET)


def test_open_sources_are_matched_too(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    model = skd.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3
    )
    opened = [open_source(tmp_path / "images", split, require_split=True) for split in ("train", "validation")]
    names = opened[0].classes
    assert names is not None
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names[::-1]}
    config = training_config(batch_size=8)
    by_path = loaders(tmp_path / "images", model, config)
    by_sources = loaders(Sources(opened[0], opened[1], opened[0]), model, config)
    labels = [torch.cat([y for _, y in found.validation]).tolist() for found in (by_path, by_sources)]
    assert labels[0] == labels[1] and labels[0][0] == 2


def test_the_model_is_named_by_the_images_it_is_trained_on(tmp_path: Path) -> None:
    """As the commands do it: its files have the names; of equal names the model's order stays."""
    make_images(tmp_path / "images")
    config, names = training_config(batch_size=8), ["class0", "class1", "class2"]
    for known, expected, warns in (
        (None, names, False),
        (names[::-1], names[::-1], False),
        (["a", "b", "c"], names, True),
        (["a"], names, False),  # of another head
    ):
        model = digit_vit(num_classes=3)
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "label_names": known}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaders(tmp_path / "images", model, config)
        assert model.pretrained_cfg["label_names"] == expected
        assert len([w for w in caught if "other classes than the model" in str(w.message)]) == warns
    model = digit_vit(num_classes=3)
    loaders(tmp_path / "images", model, config, class_map={"class0": 0, "class1": 0, "class2": 2})
    assert model.pretrained_cfg.get("label_names") is None
