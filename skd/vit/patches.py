"""timm's patch embedding as one matrix product: where patches do not overlap, it is a linear layer on each patch.

On a GPU cuDNN's convolution changes the layout of the images and of its output, and its kernels do not make use of
this special case. The product reads unfolded patches and writes tokens directly. On a CPU the convolution is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from torch import nn

from skd.vit.protocol import TimmLayer
from skd.vit.residual import is_watched
from skd_kernels.gpu.entry import after_autocast


def embed_patches(layer: TimmLayer, images: torch.Tensor) -> torch.Tensor:
    """The output of `layer`, a model's patch embedding, for `images` (B, in_chans, height, width)."""
    if images.is_cuda and is_one_product(layer, images):
        return product_of_patches(layer, images)
    embedded: torch.Tensor = layer(images)
    return embedded


def is_one_product(layer: TimmLayer, images: torch.Tensor) -> bool:
    """Whether `product_of_patches` does the same as `layer`, so that no error and no call of a hook is lost.

    It can for timm's PatchEmbed with a plain convolution whose stride is its kernel size, on images of whole patches
    and of the size that the layer requires; it cannot where the output has channels first.
    """
    if type(layer) is not PatchEmbed or is_watched(layer):
        return False
    conv, size, patch = layer.proj, tuple(images.shape[-2:]), tuple(layer.patch_size)
    if type(conv) is not nn.Conv2d or is_watched(conv):
        return False
    tiles = conv.kernel_size == conv.stride == patch and conv.dilation == (1, 1) and conv.groups == 1
    whole = all(side % step == 0 for side, step in zip(size, patch, strict=True))
    insists = layer.strict_img_size and layer.img_size is not None
    fits = whole and (not insists or size == tuple(layer.img_size))
    last = layer.flatten or layer.output_fmt in (Format.NHWC, Format.NLC)
    return tiles and conv.padding in ((0, 0), "valid") and fits and last


def product_of_patches(layer: TimmLayer, images: torch.Tensor) -> torch.Tensor:
    """The same as ``layer(images)`` where `is_one_product`: (B, N, C), or (B, rows, columns, C) if it says so."""
    conv, (height, width) = layer.proj, layer.patch_size
    tiles = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, in_chans, rows, height, columns, width)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5)  # the weight's order: channels, then rows, then columns
    # One pass unfolds the patches and, under autocast, casts them.
    dtype = after_autocast(images.dtype, images.device.type)
    patches = tiles.to(dtype, memory_format=torch.contiguous_format).flatten(3)
    if layer.flatten or layer.output_fmt == Format.NLC:
        patches = patches.flatten(1, 2)
    embedded: torch.Tensor = layer.norm(F.linear(patches, conv.weight.flatten(1), conv.bias))
    return embedded
