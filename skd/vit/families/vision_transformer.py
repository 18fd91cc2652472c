"""timm's VisionTransformer and what inherits from it: DeiT, DINOv2, CLIP, SigLIP, AIMv2, BEiT-3, hybrids, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from timm.layers import LayerNorm, LayerNormFp32, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from skd.vit.attention import RotatedAttention
from skd.vit.families import register
from skd.vit.layers import is_there
from skd.vit.mlp import SortedMlp
from skd.vit.network import BlockNetwork, Describe, repeated
from skd.vit.protocol import Place, Shared, TimmLayer, TimmModel

_PLACES = Place("attn", "norm1", "ls1", "drop_path1"), Place("mlp", "norm2", "ls2", "drop_path2")
_POST_NORM = (
    Place("attn", "norm1", "ls1", "drop_path1", post_norm=True),
    Place("mlp", "norm2", "ls2", "drop_path2", post_norm=True),
)
NORMS = {"layernorm": LayerNorm, "layernormfp32": LayerNormFp32, "rmsnorm": RmsNorm}
# Constructor arguments that are classes are written by name.
CLASSES: dict[str, dict[str, type[nn.Module]]] = {
    "block_fn": {"ResPostBlock": ResPostBlock},
    "mlp_layer": {"SwiGLUPacked": SwiGLUPacked, "SwiGLU": SwiGLU},
}
_DEFAULT_EPS = 1e-6


@register
@dataclass(frozen=True)
class VisionTransformers(BlockNetwork):
    """Plain attention, rotated within its heads, and sorted MLPs."""

    model_classes = (VisionTransformer, VisionTransformerDistilled)
    block_places: ClassVar[dict[type[nn.Module], tuple[Place, Place]]] = {Block: _PLACES, ResPostBlock: _POST_NORM}
    other_blocks = "parallel and differential blocks are not supported"

    @classmethod
    def describers(cls, model: TimmModel) -> tuple[Describe, Describe]:
        return RotatedAttention.describe, SortedMlp.describe

    def embed(self, model: TimmModel, images: torch.Tensor) -> tuple[torch.Tensor, Sequence[Shared]]:
        x = model.norm_pre(model.patch_drop(model._pos_embed(self.patches(model, images))))
        return x, repeated(None, model)

    def pooled_tokens(self, model: TimmModel) -> int:
        return self.tokens(model) if model.pool_include_prefix else int(model.patch_embed.num_patches)

    def constructor_args(self, model: TimmModel) -> dict[str, object]:
        """As `Network.constructor_args`. A layer put in by hand does not show here, but `skd.save` finds it."""
        left = [module for module in self.modules if module.full_width]
        attn = next((module for module in left if isinstance(module, RotatedAttention)), None)
        mlp = next((module for module in left if isinstance(module, SortedMlp)), None)
        if attn is None or mlp is None:
            what = "attention" if attn is None else "MLP"
            raise ValueError(
                f"model skips every {what} and does not know how it was built; "
                "it may be one of timm.create_model, skd.extract or skd.load"
            )
        args = _outside(model) | _inside(model.blocks[attn.block], model.blocks[mlp.block])
        hidden = mlp.full_width * (2 if hasattr(mlp.of(model), "gate_last") else 1)
        args |= {"num_heads": attn.num_heads, "act_layer": mlp.act, "mlp_ratio": mlp_ratio(model.embed_dim, hidden)}
        if getattr(model.patch_embed, "dynamic_img_pad", False):
            args["dynamic_img_pad"] = True
        if is_there(getattr(model.patch_embed, "norm", None)):
            args["embed_norm_layer"] = args["norm_layer"]
        return args

    @classmethod
    def construct(cls, name: str, args: dict[str, object], norm_eps: float | None) -> nn.Module:
        for argument, classes in CLASSES.items():
            if argument in args:
                args[argument] = classes[str(args[argument])]
        if norm_eps is not None:
            args["norm_layer"] = partial(NORMS[str(args.get("norm_layer", "layernorm"))], eps=norm_eps)
        known = {known.__name__: known for known in cls.model_classes}
        model: nn.Module = known[name](**args)
        return model


def _outside(model: TimmModel) -> dict[str, object]:
    """The arguments that the layers around the blocks show."""
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.has_class_token,
        "pos_embed": "learn" if model.pos_embed is not None else "none",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": is_there(model.norm_pre),
        "final_norm": is_there(model.norm) or is_there(model.fc_norm),
        "fc_norm": is_there(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
    }


def _inside(first: TimmLayer, other: TimmLayer) -> dict[str, object]:
    """The arguments that the first block with an attention and the first block with an MLP show."""
    norm = first.norm1
    return {
        "qkv_bias": first.attn.qkv.bias is not None,
        "qk_norm": is_there(first.attn.q_norm),
        "scale_attn_norm": is_there(first.attn.norm),
        "scale_mlp_norm": is_there(other.mlp.norm),
        "proj_bias": first.attn.proj.bias is not None,
        "init_values": 1e-5 if is_there(getattr(first, "ls1", None)) else None,
        "norm_layer": _norm_name(norm),
        "norm_eps": None if norm.eps == _DEFAULT_EPS else norm.eps,
        **_class_names(other),
    }


def mlp_ratio(dim: int, hidden: int) -> float:
    """A ratio with ``int(dim * ratio) == hidden``."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _norm_name(norm: nn.Module) -> str:
    for name, cls in NORMS.items():
        if type(norm) is cls:
            return name
    return "layernorm" if isinstance(norm, nn.LayerNorm) else type(norm).__name__.lower()


def _class_names(block: TimmLayer) -> dict[str, str]:
    """block_fn and mlp_layer, where they are not timm's defaults."""
    names = {}
    if getattr(block, "block_class", type(block)) is ResPostBlock:
        names["block_fn"] = "ResPostBlock"
    if not hasattr(block.mlp, "fc1"):
        names["mlp_layer"] = "SwiGLU"
    elif hasattr(block.mlp, "gate_last"):
        names["mlp_layer"] = "SwiGLUPacked"
    return names
