"""The images that a model takes: their size, a check of a batch, and one random image to compare two networks by."""

from __future__ import annotations

import torch

from skd.vit.protocol import TimmModel


def image_size(model: TimmModel) -> tuple[int, int]:
    """(height, width) of the images that `model` was built for.

    A model with `dynamic_img_size` takes only multiples of the patch size. Its size is then the largest multiple that
    is not above the nominal size; the number of patches is the same.
    """
    height, width = model.patch_embed.img_size
    if is_dynamic(model) and not _pads(model):
        rows, columns = model.patch_embed.patch_size
        return height // rows * rows, width // columns * columns
    return height, width


def is_dynamic(model: TimmModel) -> bool:
    """Whether the model takes images of any size."""
    return bool(getattr(model, "dynamic_img_size", False))


def _pads(model: TimmModel) -> bool:
    return bool(getattr(model.patch_embed, "dynamic_img_pad", False))


def check_images(model: TimmModel, images: object) -> None:
    """Check that `images` are a batch that `model` takes.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images is {got}; it must be a (B, {model.in_chans}, height, width) tensor")
    if images.shape[1] != model.in_chans:
        raise ValueError(f"images has {images.shape[1]} channels; the model takes {model.in_chans}")
    size, dynamic = model.patch_embed.img_size, is_dynamic(model)
    if not dynamic and size is not None and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(f"images has size {tuple(images.shape[2:])}; the model takes {tuple(size)}")
    patch = model.patch_embed.patch_size
    divisible = not any(pixels % side for pixels, side in zip(images.shape[2:], patch, strict=True))
    if dynamic and not divisible and not _pads(model):
        raise ValueError(f"images has size {tuple(images.shape[2:])}; both must be multiples of {tuple(patch)}")
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; it must be a floating-point tensor")


def probe(model: TimmModel) -> torch.Tensor:
    """One random image that `model` takes, the same each time; two networks are compared by their outputs for it."""
    parameter = next(model.parameters())
    image = torch.rand(1, model.in_chans, *image_size(model), generator=torch.Generator().manual_seed(0))
    return image.to(parameter.device, parameter.dtype)
