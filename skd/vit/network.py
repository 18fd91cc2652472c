"""What timm's families of transformers have in common around their blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn

from skd.vit.images import check_images
from skd.vit.outside import outside_macs, pool_macs
from skd.vit.patches import embed_patches
from skd.vit.protocol import Module, Network, Place, TimmModel
from skd.vit.skipped import SkippedModule, is_skipped

# A function that describes a module, from the index of its block, its place in the block, and the module.
Describe = Callable[[int, Place, Any], Module]


@dataclass(frozen=True)
class BlockNetwork(Network):
    """A patch embedding, blocks of one attention and one MLP, and a head, under timm's usual names."""

    # The places in each class of block, attention first; another class of block is refused.
    block_places: ClassVar[dict[type[nn.Module], tuple[Place, Place]]]
    other_blocks: ClassVar[str] = "other blocks are not supported"

    @classmethod
    def describe(cls, model: TimmModel) -> Network:
        _check_head(model)
        modules: list[Module] = []
        for index, block in enumerate(model.blocks):
            # A SuperBlock remembers which timm block it was made from.
            kind = getattr(block, "block_class", type(block))
            if kind not in cls.block_places:
                known = " or ".join(f"a {known.__name__}" for known in cls.block_places)
                raise ValueError(f"blocks.{index} is a {kind.__name__}; {cls.other_blocks}, it may be {known}")
            for place, describe in zip(cls.block_places[kind], cls.describers(model), strict=True):
                part = getattr(block, place.module)
                skipped = is_skipped(part)
                modules.append(SkippedModule.describe(index, place) if skipped else describe(index, place, part))
        parameters = [id(p) for _, p in model.blocks.named_parameters(remove_duplicate=False)]
        if len(set(parameters)) < len(parameters):
            raise ValueError("model shares a parameter between two layers; every layer must have its own")
        return cls(tuple(modules))

    @classmethod
    @abstractmethod
    def describers(cls, model: TimmModel) -> tuple[Describe, Describe]:
        """The functions that describe the attentions and the MLPs of `model`."""

    def patches(self, model: TimmModel, images: Any) -> torch.Tensor:
        """The output of the patch embedding; ValueError if `images` is not a batch that it takes."""
        check_images(model, images)
        dtype = next(model.parameters()).dtype
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(f"images has dtype {images.dtype}; the model has {dtype}")
        return embed_patches(model.patch_embed, images)

    def last_norm(self, model: TimmModel) -> nn.Module:
        norm: nn.Module = model.norm
        return norm

    def head(self, model: TimmModel, normed: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.forward_head(normed)
        return logits

    def tokens(self, model: TimmModel) -> int:
        return int(model.patch_embed.num_patches + model.num_prefix_tokens)

    def grid(self, model: TimmModel) -> tuple[int, ...]:
        return tuple(model.patch_embed.grid_size)

    def tokens_read(self, model: TimmModel) -> int | None:
        """With token pooling only the prefix tokens; the other outputs of the last block have no gradient either."""
        pooled = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
        return int(model.num_prefix_tokens) if pooled else None

    def blocks(self, model: TimmModel) -> Sequence[Any]:
        blocks: Sequence[Any] = model.blocks
        return blocks

    def replace_blocks(self, model: TimmModel, blocks: Sequence[nn.Module]) -> None:
        """Replace the blocks, in a container of the same class."""
        in_list = isinstance(model.blocks, nn.ModuleList)
        container = nn.ModuleList(blocks) if in_list else nn.Sequential(*blocks)
        model.blocks = container.train(model.training)

    def checkpoints(self, model: TimmModel) -> bool:
        return bool(model.grad_checkpointing)

    def set_checkpoints(self, model: TimmModel, on: bool) -> None:
        model.set_grad_checkpointing(on)

    def undecayed(self, model: TimmModel) -> Collection[str]:
        names: Collection[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        return names

    def summary(self, model: TimmModel) -> str:
        return f"{len(model.blocks)} blocks of width {model.embed_dim}"

    def outside_macs(self, model: TimmModel) -> tuple[int, int]:
        linear = outside_macs(model)
        return linear + pool_macs(model, self.pooled_tokens(model)), linear

    def outside_params(self, model: TimmModel) -> int:
        """The count does not walk through the blocks, because every training step asks for it."""
        outside = [part for name, part in model.named_children() if name != "blocks"]
        parameters = chain(model.parameters(recurse=False), *(part.parameters() for part in outside))
        return sum(parameter.numel() for parameter in parameters)

    def pooled_tokens(self, model: TimmModel) -> int:
        """The number of tokens that the attention pool reads, if there is one."""
        return self.tokens(model)

    def constructor_args(self, model: TimmModel) -> dict[str, Any]:
        raise ValueError(
            f"model is a {type(model).__name__} that was built without timm.create_model, so that nothing says how; "
            "build it by a name: timm.create_model(name, **arguments)"
        )

    @classmethod
    def construct(cls, name: str, args: dict[str, Any], norm_eps: float | None) -> nn.Module:
        raise ValueError(f"model_class is {name!r} without a name of timm's; it cannot be built")


def _check_head(model: TimmModel) -> None:
    if len(model.blocks) == 0:
        raise ValueError("model has no blocks; it must have at least one")
    if model.patch_embed.img_size is None:
        raise ValueError("model was built without an image size; give img_size, with which its cost is counted")
    if model.num_classes < 0:
        raise ValueError(f"model has num_classes={model.num_classes}; it must be at least 0")
    if model.num_classes and not model.global_pool and getattr(model, "attn_pool", None) is None:
        raise ValueError(
            "model has global_pool='' and a classifier, so logits per token; it may have one or the other"
        )


def repeated(shared: Any, model: TimmModel) -> Sequence[Any]:
    """`shared` once for every block."""
    return (shared,) * len(model.blocks)
