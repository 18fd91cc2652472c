"""Tiny random copies of every architecture that timm builds as a VisionTransformer, an Eva or a Beit.

A copy keeps what makes the architecture its own (classes of block and MLP, norms, biases, tokens, pooling, embedding)
and shrinks sizes only: 2 blocks, 36 to 51 channels, a handful of tokens. No pre-trained weight is read.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import beit, eva, get_pretrained_cfg, model_entrypoint, vision_transformer_hybrid, vitamin
from timm.models.vision_transformer import VisionTransformer
from torch import nn

CLASSES = 5
# (embed_dim, num_heads): heads of 16, 18, 17 and 20 coordinates, so the last group of 8 is often ragged; with the
# usual ratio 4 the MLPs have 192, 144, 204 and 160 neurons.
SIZES = ((48, 3), (36, 2), (51, 3), (40, 2))
# With rotary positions a head has a multiple of 4 coordinates.
ROTARY_SIZES = ((48, 3), (64, 4), (40, 5))
OTHER_MODULES = (eva.__name__, beit.__name__)


def transformer_modules() -> list[str]:
    """timm's model files that use VisionTransformer itself (not only its blocks), and those of Eva and Beit."""
    of_vit = [
        name
        for name, module in sys.modules.items()
        if name.startswith("timm.models.") and getattr(module, "VisionTransformer", None) is VisionTransformer
    ]
    return sorted((*of_vit, *OTHER_MODULES))


def names() -> list[str]:
    """Every name of timm's registry whose entry point lives in one of `transformer_modules`."""
    modules = transformer_modules()
    return [name for name in timm.list_models() if model_entrypoint(name).__module__ in modules]


def structure(model: nn.Module) -> object:
    """What two models have in common that differ in sizes alone: their layers, switches and names of parameters."""
    layers = [
        (name, type(layer), *sorted((key, repr(value)) for key, value in vars(layer).items() if _is_switch(value)))
        for name, layer in model.named_modules()
    ]
    return (*layers, *(name for name, _ in model.named_parameters()))


def _is_switch(value: object) -> bool:
    return value is None or isinstance(value, str | bool)


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


def tiny(name: str, **kwargs: Any) -> Any:
    """The architecture `name` at a small size, float64, evaluation mode, every number random."""
    other = model_entrypoint(name).__module__ in OTHER_MODULES
    sizes = ROTARY_SIZES if other else SIZES
    dim, heads = sizes[seed_of(name) % len(sizes)]
    arguments: dict[str, Any] = {"embed_dim": dim, "depth": 2, "num_heads": heads, "img_size": image_size(name)}
    if get_pretrained_cfg(name).num_classes != 0:
        arguments["num_classes"] = CLASSES
    if model_entrypoint(name).__module__ == vitamin.__name__:
        stem = vitamin.VitCfg(embed_dim=(8, 8, kwargs.get("embed_dim", dim)), depths=(1, 1, 1), stem_width=8)
        arguments["embed_cfg"] = stem
    if "sapiens2" in name:  # some of whose blocks have fewer heads of keys and values
        arguments["num_kv_heads"] = (heads, 1)
    with narrow_backbones():
        model = timm.create_model(name, **(arguments | kwargs))
    return randomise(model.double().eval(), seed_of(name))


def image_size(name: str) -> int:
    """Pixels of a side, for 2 x 2 to 4 x 4 patches."""
    if model_entrypoint(name).__module__ == vision_transformer_hybrid.__name__:
        return 32 if "mci" in name else 64
    for size in (8, 14, 16, 32):
        if f"patch{size}_" in name:
            return 2 * size
    return 32


def build(seed: int = 0, **kwargs: Any) -> Any:
    """A tiny VisionTransformer straight from its constructor, randomised like `tiny`."""
    arguments: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**(arguments | {"num_classes": CLASSES} | kwargs))
    return randomise(model.double().eval(), seed)


@contextmanager
def narrow_backbones() -> Iterator[None]:
    """Hybrids build their convolutional stems with few channels."""
    hybrid = vision_transformer_hybrid
    sizes = {"layers": (1,) * 4, "channels": (8,) * 4, "stem_width": 8}
    narrow = {
        "_resnetv2": narrow_resnetv2(hybrid._resnetv2),
        "resnet26d": partial(hybrid.resnet26d, **sizes),
        "resnet50d": partial(hybrid.resnet50d, **sizes),
        "ConvStem": partial(narrow_stem, hybrid.ConvStem),
    }
    # Group norms of 32 groups and bottlenecks of a quarter: 128 channels are the least.
    resnet = partial(hybrid.ResNetV2, channels=(128,) * 4, stem_chs=32)
    stem = partial(hybrid.create_resnetv2_stem, out_chs=32)
    with mock.patch.multiple(hybrid, ResNetV2=resnet, create_resnetv2_stem=stem, **narrow):
        yield


def narrow_resnetv2(build_backbone: Any) -> Any:
    """The same number of stages, each of one layer."""
    return lambda layers=(1, 1, 1), **kwargs: build_backbone((1,) * len(layers), **kwargs)


def narrow_stem(stem: Any, channels: tuple[int, ...], **kwargs: Any) -> nn.Module:
    """A ConvStem that ends in as many channels as the tiny `vit_base_mci_224` has."""
    last = SIZES[seed_of("vit_base_mci_224") % len(SIZES)][0]
    return stem(channels=(8,) * (len(channels) - 1) + (last,), **kwargs)


@torch.no_grad()
def randomise(model: Any, seed: int) -> Any:
    """Random numbers for every parameter and running statistic; norms and LayerScale stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.ndim > 1 and name.endswith("weight"):
            tensor.copy_(noise / (tensor[0].numel() ** 0.5))
        elif name.endswith(("weight", "gamma")):
            tensor.copy_(1 + 0.2 * noise)
        else:  # biases, tokens, position embeddings
            tensor.copy_(0.4 * noise)
    for name, tensor in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(0.5 + noise if name.endswith("var") else noise - 0.5)
    return model


def images(model: Any, count: int, seed: int = 0, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Random images (count, in_chans, height, width) that `model` takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, model.in_chans, *(size or model.patch_embed.img_size))
    return torch.randn(shape, generator=generator, dtype=next(model.parameters()).dtype)


def batches(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two calibration batches, of 3 and 2 images, with random labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(max(model.num_classes, 1), (5,), generator=generator)
    return [(images(model, 3, 2), labels[:3]), (images(model, 2, 3), labels[3:])]
