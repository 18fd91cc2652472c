"""scikit-learn's handwritten digits as tensors: 1,797 real 8x8 grey images that need no download."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Pixels = npt.NDArray[Any]

TEST_IMAGES = 450
MEAN, STD = 0.3053, 0.3759  # of all pixels, scaled to [0, 1]
_DARK = (0.0 - MEAN) / STD  # background, normalised

# What a model trained on `digits` expects, in the form of timm's `model.pretrained_cfg`.
PREPROCESSING: dict[str, Any] = {
    "input_size": (1, 8, 8),
    "mean": (MEAN,),
    "std": (STD,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "num_classes": 10,
    "label_names": [str(digit) for digit in range(10)],
}


class Split(NamedTuple):
    """Images (n, 1, 8, 8) float32, normalised, and labels (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor


def pixels() -> tuple[tuple[Pixels, Pixels], tuple[Pixels, Pixels]]:
    """The digits as ((images, labels) to train, (images, labels) to test), images (n, 8, 8) uint8, labels (n,) int64.

    1,347 and 450 images: one fixed split, drawn at random with equal shares of every class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    # 17 levels of grey as 8 bits, so that an image file and a tensor hold the same.
    images = np.round(raw.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=TEST_IMAGES, stratify=raw.target, random_state=0)
    labels = raw.target.astype(np.int64)
    return (images[train], labels[train]), (images[test], labels[test])


def digits() -> tuple[Split, Split]:
    """The digits as (train, test): the images of `pixels` as tensors."""
    train, test = (
        Split((torch.from_numpy(images).float().div(255)[:, None] - MEAN) / STD, torch.from_numpy(labels))
        for images, labels in pixels()
    )
    return train, test


def batched(split: Split, size: int = 256) -> Batches:
    """(images, labels) pairs of up to `size` images, in order.

    Raises:
        ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1")
    return list(zip(split.images.split(size), split.labels.split(size), strict=True))


def shifted(
    images: torch.Tensor, generator: torch.Generator, *, most: int = 1, background: float = _DARK
) -> torch.Tensor:
    """Move each image at random by up to `most` pixels along both axes; what becomes free is background."""
    count, _, height, width = images.shape
    padded = F.pad(images[:, 0], (most,) * 4, value=background)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    image = torch.arange(count)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]][:, None]
