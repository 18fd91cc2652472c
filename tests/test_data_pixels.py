"""8-bit images from the workers, normalised by the main process: the same values as timm's whole transform."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_loaders import config

from skd.data import Loading, open_source, seeded, train_loader, train_transform
from skd.data.loading import TrainPlan
from skd.data.pixels import Normalisation, Pixels, packed
from skd.data.workers import IndexedBatches, Preparation

MEANS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# x / 255, minus the mean, over the deviation: three roundings of values up to 1, then divided by 0.22.
ROUNDING = 3 * 2**-24 / 0.22


def coloured(root: Path, count: int = 6) -> Path:
    numbers = np.random.default_rng(0)
    for index in range(count):
        (root / f"class{index % 3}").mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"class{index % 3}" / f"{index}.png")
    return root


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return open_source(coloured(tmp_path / "images"), "train")


@pytest.mark.parametrize("erasing", [{"remode": "pixel"}, {"remode": "rand", "recount": 3}, {"remode": "const"}])
def test_training_images_are_those_of_timms_transform(source: Any, erasing: dict[str, Any]) -> None:
    """Of the same draws: crops, colours, and the rectangles of random erasing to the last bit."""
    given = config(3, 24) | MEANS
    augmentation = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 1.0, **erasing}
    transform = train_transform(given, **augmentation)
    loader = train_loader(source, given, batch_size=6, seed=4, augment_on="cpu", **augmentation)
    ((images, labels),) = loader
    assert images.dtype == torch.float32 and images.is_contiguous()
    ((keys),) = TrainPlan(len(source), loader.loading)
    for found, label, key in zip(images, labels.tolist(), keys, strict=True):
        image, expected_label = source.read(key[1])
        with seeded(4, "augment", *key):
            expected = transform(image)
        assert label == expected_label
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
        with seeded(4, "augment", *key):
            patches = Pixels(transform)(image).patches
        assert patches
        if len(patches) == 1:
            top, left, values = patches[0]
            _, height, width = values.shape
            assert torch.equal(found[:, top : top + height, left : left + width], values)


def test_later_rectangles_lie_over_earlier_ones() -> None:
    transform = Pixels(train_transform(config(3, 24), reprob=1.0, remode="rand", recount=3))
    for seed in range(20):
        with seeded(seed):
            image = transform(Image.new("RGB", (24, 24)))
        if len(image.patches) == 3:
            break
    normalise = Normalisation(config(3, 24))
    expected = image.pixels[None].float() / 255
    for top, left, values in image.patches:
        expected[0, :, top : top + values.shape[1], left : left + values.shape[2]] = values
    torch.testing.assert_close(normalise(image.pixels[None], packed([image.patches])), expected)


def test_workers_send_bytes(source: Any) -> None:
    """A quarter of what float32 images take; without random erasing nothing else."""
    batches = IndexedBatches(source, Preparation(config(3, 24), Loading(batch_size=4)))
    loaded = batches[[(0, index, 0) for index in range(4)]]
    assert loaded.images is not None
    assert loaded.images.dtype == torch.uint8 and loaded.images.shape == (4, 3, 24, 24) and loaded.patches is None
    assert packed([[], []]) is None


def test_a_spawned_worker_can_take_it(source: Any) -> None:
    transform = pickle.loads(pickle.dumps(Pixels(train_transform(config(3, 24), reprob=1.0))))
    with seeded(0):
        first = transform(source.read(0)[0])
    assert first.pixels.dtype == torch.uint8 and first.patches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_they_are_the_same(source: Any, workers: int) -> None:
    given = config(3, 24) | MEANS
    options: dict[str, Any] = {"batch_size": 3, "seed": 1, "reprob": 0.5, "workers": workers}
    there = list(train_loader(source, given, pin_memory=True, device="cuda", **options))
    here = list(train_loader(source, given, **options))
    for (images, labels), (expected, same) in zip(there, here, strict=True):
        assert images.is_cuda and torch.equal(labels, same)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=ROUNDING)
