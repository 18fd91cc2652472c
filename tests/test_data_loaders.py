"""Batches: the same whatever the workers, ranks and interruptions; and what happens to images that cannot be read."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import tiny_vit
from PIL import Image
from test_data_sources import png_folder
from timm.data import auto_augment
from timm.data.loader import PrefetchLoader

import skd
from skd.data import (
    PREPROCESSING,
    calibration_loader,
    data_config,
    digits,
    eval_loader,
    open_source,
    train_loader,
    train_transform,
)

STRONG = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "vflip": 0.5}
# Leaves an image as it is, so that its value tells its number.
STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None, "aa": None, "reprob": 0.0}


def config(channels: int = 1, size: int = 16, classes: int = 3) -> dict[str, Any]:
    return {
        "input_size": (channels, size, size),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": classes,
    }


def numbers(loader: Any) -> list[list[int]]:
    """The number of each image of `png_folder`, batch by batch."""
    return [(images.amax((1, 2, 3)) * 255 / 4).round().int().tolist() for images, _ in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def same(first: Any, second: Any) -> bool:
    first, second = list(first), list(second)
    return len(first) == len(second) > 0 and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return open_source(png_folder(tmp_path / "images"), "train", in_chans=1)


def break_images(source: Any, *indices: int) -> set[str]:
    files = {source.file(index) for index in indices}
    for file in files:
        Path(file).write_bytes(Path(file).read_bytes()[:40])
    return files


def test_workers_change_nothing(source: Any) -> None:
    loaders = [train_loader(source, config(), batch_size=4, seed=1, workers=n, **STRONG) for n in (0, 2)]
    epochs = []
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
            assert len(loader) == 4
        epochs.append(list(loaders[0]))
        assert len(epochs[-1]) == 4 and same(epochs[-1], loaders[1])
    assert not same(*epochs) and not same(epochs[1], train_loader(source, config(), batch_size=4, seed=2, **STRONG))
    images, labels = epochs[0][0]
    assert images.shape == (4, 1, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_order_of_each_epoch(source: Any) -> None:
    loader = train_loader(source, config(), batch_size=6, seed=1, **STILL)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append(flat(numbers(loader)))
        assert sorted(orders[-1]) == list(range(18)) != orders[-1]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != flat(numbers(train_loader(source, config(), batch_size=6, seed=2, **STILL)))


def test_batches_of_another_size_hold_the_same_samples(source: Any) -> None:
    small, large = (list(train_loader(source, config(), batch_size=size, seed=1, **STRONG)) for size in (3, 9))
    assert [len(small), len(large)] == [6, 2]
    assert torch.equal(torch.cat([images for images, _ in small]), torch.cat([images for images, _ in large]))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch(source: Any, workers: int) -> None:
    loader = train_loader(source, config(), batch_size=4, seed=1, workers=workers, **STRONG)
    loader.set_epoch(3)
    whole = list(loader)
    for start in (1, 3):
        loader.set_epoch(3, start)
        assert same(loader, whole[start:])
    loader.set_epoch(3, 4)
    assert list(loader) == [] and len(loader) == 4
    for wrong in ((-1, 0), (0, 5), (0, -1)):
        with pytest.raises(ValueError, match=r"start_batch .* may be 0\.\. and 0\.\.4"):
            loader.set_epoch(*wrong)


def test_what_came_before_is_not_read(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = train_loader(source, config(), batch_size=4, seed=1, **STILL)
    read: list[int] = []
    monkeypatch.setattr(source, "pixels", lambda index, read_=source.pixels: read.append(index) or read_(index))
    loader.set_epoch(0, 3)
    assert numbers(loader) == [read] and len(read) == 4


def test_ranks_share_the_global_batch(source: Any) -> None:
    def batches(**share: int) -> list[Any]:
        return list(train_loader(source, config(), batch_size=6, seed=1, aug_repeats=2, **share, **STRONG))

    parts = [batches(rank=rank, world=2) for rank in (0, 1)]
    for whole, first, second in zip(batches(), *parts, strict=True):
        for both, one, two in zip(whole, first, second, strict=True):
            assert torch.equal(both[0::2], one) and torch.equal(both[1::2], two)
    with pytest.raises(ValueError, match="batch_size is 5; it must be a multiple of the number of ranks, 2"):
        train_loader(source, config(), batch_size=5, seed=1, world=2)


def test_repeated_augmentation(source: Any) -> None:
    """Copies are neighbours, so ranks get different ones; the epoch is not longer; each copy looks different."""
    plain, repeated = (train_loader(source, config(), batch_size=6, seed=1, aug_repeats=n, **STILL) for n in (1, 3))
    order = flat(numbers(plain))
    assert sorted(order) == list(range(18)) and order != list(range(18))
    assert flat(numbers(repeated)) == [image for image in order[:6] for _ in range(3)]
    ((images, _),) = train_loader(source, config(), batch_size=18, seed=1, aug_repeats=18, reprob=1.0)
    assert len(images.flatten(1).unique(dim=0)) > 15
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match=f"aug_repeats is {wrong}"):
            train_loader(source, config(), batch_size=6, seed=1, aug_repeats=wrong)  # type: ignore[arg-type]


def test_only_whole_batches(source: Any) -> None:
    assert [len(batch) for batch in numbers(train_loader(source, config(), batch_size=7, seed=1))] == [7, 7]
    with pytest.raises(ValueError, match=r"batch_size is 19, but .* has only 18 images"):
        train_loader(source, config(), batch_size=19, seed=1)


def test_global_random_numbers_stay(source: Any) -> None:
    def states() -> list[Any]:
        return [random.getstate(), torch.get_rng_state().tolist(), np.random.mtrand.get_state()[1].tolist()]

    before = states()
    for workers in (0, 1):
        list(train_loader(source, config(), batch_size=6, seed=1, workers=workers, **STRONG))
        list(eval_loader(source, config(), batch_size=6, workers=workers))
    assert states() == before


def test_one_iteration_at_a_time(source: Any) -> None:
    loader = eval_loader(source, config(), batch_size=3)
    first = iter(loader)
    next(first)
    assert len(list(loader)) == 6
    with pytest.raises(RuntimeError, match="another iteration"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_order(source: Any, workers: int) -> None:
    loader = eval_loader(source, config(), batch_size=7, workers=workers)
    expected = [[*range(7)], [*range(7, 14)], [*range(14, 18)]]
    assert numbers(loader) == numbers(loader) == expected and len(loader) == 3
    assert torch.cat([labels for _, labels in loader]).tolist() == [0] * 6 + [1] * 6 + [2] * 6
    parts = [numbers(eval_loader(source, config(), batch_size=7, rank=rank, world=2)) for rank in (0, 1)]
    assert [batch[rank::2] for rank in (0, 1) for batch in expected] == parts[0] + parts[1]
    assert numbers(eval_loader(source, config(), batch_size=2, indices=[17, 0, 5])) == [[17, 0], [5]]
    assert numbers(eval_loader(source, config(), batch_size=17, rank=1, world=2)) == [[*range(1, 17, 2)]]
    with pytest.raises(ValueError, match=r"indices has 3\.\.18; .* has images 0\.\.17"):
        eval_loader(source, config(), batch_size=2, indices=[3, 18])


def test_evaluation_as_timm_does_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cat" / "0.png")
    given = config(3, 24) | {"crop_pct": 0.8, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    ((images, _),) = eval_loader(open_source(tmp_path), given, batch_size=1)
    described = {k: v for k, v in given.items() if k != "num_classes"}
    eight_bit = timm.data.create_transform(**described, use_prefetcher=True)(Image.fromarray(pixels))
    batches = [(eight_bit[None], torch.zeros(1))]
    ((fetched, _),) = PrefetchLoader(batches, given["mean"], given["std"], device=torch.device("cpu"))
    assert torch.equal(images, fetched)
    # The transform divides by 255 first: three roundings of values up to 1 / 0.4.
    torch.testing.assert_close(
        images[0], timm.data.create_transform(**described)(Image.fromarray(pixels)), rtol=0, atol=1e-6
    )


def test_digits_as_images_and_as_tensors() -> None:
    for split, part in zip(("train", "validation"), digits(), strict=True):
        source = open_source("digits", split, in_chans=1)
        batches = list(eval_loader(source, PREPROCESSING, batch_size=100))
        assert (torch.cat([images for images, _ in batches]) - part.images).abs().max() < 1e-6
        assert torch.equal(torch.cat([labels for _, labels in batches]), part.labels)


def test_calibration(source: Any) -> None:
    def batches(seed: int = 0, **options: Any) -> Any:
        return calibration_loader(source, config(), images=8, seed=seed, batch_size=3, **options)

    loader = batches()
    chosen = flat(numbers(loader))
    assert numbers(loader) == numbers(batches(workers=2)) and [len(labels) for _, labels in loader] == [3, 3, 2]
    assert len(set(chosen)) == 8 and set(chosen) != set(flat(numbers(batches(1))))
    plain = torch.cat([images for images, _ in eval_loader(source, config(), batch_size=18)])
    assert torch.equal(torch.cat([images for images, _ in loader]), plain[chosen])
    with pytest.warns(UserWarning, match="has 18 images to calibrate with, not 19"):
        all_of_them = calibration_loader(source, config(), images=19)
    assert sorted(flat(numbers(all_of_them))) == list(range(18))
    with pytest.raises(ValueError, match="images is 0"):
        calibration_loader(source, config(), images=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_in_training(source: Any, workers: int) -> None:
    """The next one that can be read takes the place, each is counted once, each epoch warns once."""
    loader = train_loader(source, config(), batch_size=6, seed=1, workers=workers, **STILL)
    before = flat(numbers(loader))
    files = break_images(source, 4, 5, 17)
    instead = {4: 6, 5: 6, 17: 0}
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"3 images of .* cannot be read, skipped: .*\.png") as caught:
            assert flat(numbers(loader)) == [instead.get(number, number) for number in before]
        assert len(caught) == 1 and caught[0].filename == __file__
    assert loader.skipped == files


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_in_evaluation(source: Any, workers: int) -> None:
    files = break_images(source, 0, 1, 2, 3, 9)
    loader = eval_loader(source, config(), batch_size=4, workers=workers)
    with pytest.warns(UserWarning, match=r"5 images .*\.png, \.\.\."):
        assert numbers(loader) == [[4, 5, 6, 7], [8, 10, 11], [12, 13, 14, 15], [16, 17]]
    assert loader.skipped == files


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_can_be_an_error(source: Any, workers: int) -> None:
    (file,) = break_images(source, 9)
    options: dict[str, Any] = {"batch_size": 6, "workers": workers, "bad_images": "fail"}
    for loader in (eval_loader(source, config(), **options), train_loader(source, config(), seed=1, **options)):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            list(loader)
        assert file in str(caught.value) and "\n" not in str(caught.value) and loader.skipped <= {file}
    with pytest.raises(ValueError, match="bad_images is 'ignore'"):
        eval_loader(source, config(), batch_size=2, bad_images="ignore")


def test_too_many_bad_images(source: Any) -> None:
    break_images(source, *range(2, 13))
    with pytest.raises(OSError, match=r"10 images of .* in a row cannot be read"):
        list(train_loader(source, config(), batch_size=18, seed=1))
    with pytest.warns(UserWarning, match="11 images"):
        assert len(flat(numbers(eval_loader(source, config(), batch_size=5)))) == 7
    break_images(source, *range(18))
    with pytest.raises(OSError, match="none of the images of"):
        list(eval_loader(source, config(), batch_size=5))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["folder", "files", "evaluation"])
def test_vanished(source: Any, workers: int, what: str) -> None:
    """With all of the folder, or as from a disk that is no longer mounted: the folder is there, but empty."""
    if what == "evaluation":
        loader = eval_loader(source, config(), batch_size=1, workers=workers)
    else:
        loader = train_loader(source, config(), batch_size=1, seed=1, workers=workers)
    batches = iter(loader)
    next(batches)
    shutil.rmtree(source.root)
    if what == "files":
        source.root.mkdir()
    with pytest.raises(OSError, match=r"the data set .*images has vanished") as caught:
        list(batches)
    assert "\n" not in str(caught.value) and str(source.root) in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_the_head_does_not_have(source: Any, workers: int) -> None:
    given = config(classes=2)
    for loader in (
        eval_loader(source, given, batch_size=6, workers=workers),
        train_loader(source, given, batch_size=6, seed=1, workers=workers),
    ):
        with pytest.raises(ValueError, match=r"eel.*\.png has the label 2; the head has the classes 0\.\.1"):
            list(loader)
    assert len(list(eval_loader(source, config(classes=0), batch_size=6))) == 3


@pytest.mark.parametrize("channels, size", [(1, 28), (1, 8), (3, 24)])
def test_every_operation_of_randaugment(channels: int, size: int) -> None:
    """At full strength, where timm asks Pillow to keep 0 bits."""
    transform: Any = train_transform(config(channels, size), aa="rand-m10-n2-p1-inc1")
    (step,) = [step for step in transform.transforms if isinstance(step, auto_augment.RandAugment)]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    results = {operation.name: operation(image) for operation in step.ops}
    assert len(results) == 15 and all(result.mode == image.mode for result in results.values())
    assert not np.asarray(results["PosterizeIncreasing"]).any()
    assert transform(image).shape == (channels, size, size)


def test_augmentation_is_checked() -> None:
    for wrong in ({"hflip": 1.5}, {"scale": (0.9, 0.1)}, {"remode": "x"}, {"recount": 0}, {"aa": "rand-x9"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            train_transform(config(), **wrong)
    with pytest.raises(ValueError, match="train_interpolation 'cubic'"):
        train_transform(config(), train_interpolation="cubic")
    with pytest.raises(ValueError, match="augmentation has reprop; it may have scale, ratio, hflip"):
        train_transform(config(), reprop=0.5)


def test_configuration_of_a_model() -> None:
    """As it was built, not as it was pre-trained."""
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, num_classes=7)
    model.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.5, 0.5, 0.5), "input_size": (3, 224, 224)}
    given = data_config(model)
    assert given["input_size"] == (1, 32, 32) and given["num_classes"] == 7
    assert given["mean"] == pytest.approx((0.4,)) and given["std"] == (0.5,)
    small = tiny_vit()
    small.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "crop_pct": 0.5}
    assert data_config(skd.SuperNet(small)) == data_config(small)
    assert data_config(small)["mean"] == (0.2, 0.4, 0.6) and data_config(small)["crop_pct"] == 0.5


def test_arguments(source: Any) -> None:
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"rank": 2, "world": 2}, {"rank": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
            eval_loader(source, config(), **{"batch_size": 2, **wrong})
    with pytest.raises(ValueError, match="seed"):
        train_loader(source, config(), batch_size=2, seed=-1)


def test_a_whole_iteration_warns_of_nothing(source: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = eval_loader(source, config(), batch_size=6)
        list(loader)
    assert loader.skipped == set()
