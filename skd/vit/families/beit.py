"""timm's Beit: BEiT and BEiT v2, whose attention adds a bias for every pair of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.beit import Attention, Beit, Block
from torch import nn

from skd.vit.families import register
from skd.vit.heads import HeadAttention
from skd.vit.mlp import SortedMlp
from skd.vit.network import BlockNetwork, Describe, repeated
from skd.vit.protocol import Module, Place, Shared, TimmLayer, TimmModel

# timm's block takes the two scales together or none: a number stands in for one alone.
_PLACES = (
    Place("attn", "norm1", "gamma_1", "drop_path1", no_scale=1.0, shared="shared_rel_pos_bias"),
    Place("mlp", "norm2", "gamma_2", "drop_path2", no_scale=1.0),
)


@register
@dataclass(frozen=True)
class Beits(BlockNetwork):
    """Attention that is all or nothing, as timm's has as many heads as its table of biases, and sorted MLPs."""

    model_classes = (Beit,)
    block_places: ClassVar[dict[type[nn.Module], tuple[Place, Place]]] = {Block: _PLACES}

    @classmethod
    def describers(cls, model: TimmModel) -> tuple[Describe, Describe]:
        return _describe_attention, SortedMlp.describe

    def embed(self, model: TimmModel, images: torch.Tensor) -> tuple[torch.Tensor, Sequence[Shared]]:
        """The blocks share a bias of positions, where the model has one outside of them."""
        x = self.patches(model, images)
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        return model.pos_drop(x), repeated(bias, model)


def _describe_attention(index: int, place: Place, attn: TimmLayer) -> Module:
    if type(attn) is not Attention:
        raise ValueError(f"blocks.{index}.{place.module} is a {type(attn).__name__}; it must be Beit's Attention")
    return HeadAttention.describe(index, place, attn, binary=True)
