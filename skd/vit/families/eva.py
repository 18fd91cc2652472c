"""timm's Eva: DINOv3, EVA-02, Perception Encoder, LingBot, Sapiens2 and the ViTs with rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn

from skd.vit.families import register
from skd.vit.heads import HeadAttention
from skd.vit.mlp import SortedMlp
from skd.vit.network import BlockNetwork, Describe, repeated
from skd.vit.protocol import Module, Place, Shared, TimmLayer, TimmModel

_PLACES = (
    Place("attn", "norm1", "gamma_1", "drop_path1", shared="rope"),
    Place("mlp", "norm2", "gamma_2", "drop_path2"),
)
_POST_NORM = (
    Place("attn", "norm1", "gamma_1", "drop_path1", post_norm=True, shared="rope"),
    Place("mlp", "norm2", "gamma_2", "drop_path2", post_norm=True),
)


@register
@dataclass(frozen=True)
class Evas(BlockNetwork):
    """Attention by whole heads, with rotary positions, and sorted MLPs."""

    model_classes = (Eva,)
    block_places: ClassVar[dict[type[nn.Module], tuple[Place, Place]]] = {
        EvaBlock: _PLACES,
        EvaBlockPostNorm: _POST_NORM,
    }

    @classmethod
    def describers(cls, model: TimmModel) -> tuple[Describe, Describe]:
        """With mixed rotary positions every head of every block has angles of its own, outside of the blocks."""
        return partial(_describe_attention, binary=model.rope_mixed), SortedMlp.describe

    def embed(self, model: TimmModel, images: torch.Tensor) -> tuple[torch.Tensor, Sequence[Shared]]:
        """The blocks share the rotary embedding of the positions."""
        x, rope = model._pos_embed(self.patches(model, images))
        per_block = model.rope_mixed and rope is not None
        return model.norm_pre(x), rope.unbind(0)[: len(model.blocks)] if per_block else repeated(rope, model)


def _describe_attention(index: int, place: Place, attn: TimmLayer, *, binary: bool) -> Module:
    if type(attn) not in (EvaAttention, AttentionRope):
        raise ValueError(
            f"blocks.{index}.{place.module} is a {type(attn).__name__}; "
            "it may be timm's EvaAttention or AttentionRope"
        )
    return HeadAttention.describe(index, place, attn, binary=binary)
