"""From PIL images to what a model takes: its preprocessing, and timm's transforms for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform, resolve_model_data_config

from skd.settings import Augmentation
from skd.supernet import SuperNet
from skd.vit import image_size, unwrapped

Transform = Callable[[Image.Image], torch.Tensor]


def data_config(model: Any) -> dict[str, Any]:
    """How images have to be prepared for a model.

    Args:
        model: a timm model, or a `SuperNet`.

    Returns:
        timm's data configuration (mean, std, interpolation, crop_pct, crop_mode) with "input_size" as the model was
        really built, (channels, height, width), mean and std one per channel, and "num_classes" of its head.
    """
    model = unwrapped(model)
    model = model.model if isinstance(model, SuperNet) else model
    config = resolve_model_data_config(model)
    return {
        **config,
        "input_size": (model.in_chans, *image_size(model)),
        "mean": _per_channel(config["mean"], model.in_chans),
        "std": _per_channel(config["std"], model.in_chans),
        "num_classes": model.num_classes,
    }


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """One value per channel: the average where their number differs, as for a colour model built for grey images."""
    values = tuple(float(value) for value in values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


AUGMENTATION = tuple(field.name for field in fields(Augmentation))


def train_transform(config: dict[str, Any], **augmentation: Any) -> Transform:
    """timm's training transform; it draws from the global generators of Python, NumPy and PyTorch.

    Args:
        config: from `data_config`.
        augmentation: fields of `Augmentation`.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    unknown = sorted(augmentation.keys() - set(AUGMENTATION))
    if unknown:
        raise ValueError(f"augmentation has {', '.join(unknown)}; it may have {', '.join(AUGMENTATION)}")
    chosen = Augmentation(**augmentation)
    try:
        transform = create_transform(
            config["input_size"],
            is_training=True,
            scale=chosen.scale,
            ratio=chosen.ratio,
            hflip=chosen.hflip,
            vflip=chosen.vflip,
            color_jitter=chosen.color_jitter,
            auto_augment=chosen.aa or None,
            interpolation=chosen.train_interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=chosen.reprob,
            re_mode=chosen.remode,
            re_count=chosen.recount,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:  # timm's parsing of the two strings
        raise ValueError(
            f"aa is {chosen.aa!r}, train_interpolation {chosen.train_interpolation!r}, color_jitter "
            f"{chosen.color_jitter!r}; timm does not know one of them: {error}"
        ) from None
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Any) -> Iterator[Any]:
    """timm's `AugmentOp`s in a training transform."""
    for step in transform.transforms:
        if isinstance(step, auto_augment.AutoAugment):
            yield from chain.from_iterable(step.policy)
        elif isinstance(step, auto_augment.RandAugment | auto_augment.AugMixAugment):
            yield from step.ops


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's asks for 0 bits at the highest magnitude: black, but an error in newer versions of Pillow."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def eval_transform(config: dict[str, Any]) -> Transform:
    """timm's evaluation transform: resize and crop by interpolation, crop_pct and crop_mode; nothing random."""
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return create_transform(config["input_size"], is_training=False, **{key: config[key] for key in keys})
