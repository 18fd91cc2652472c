"""What can be narrowed in a timm Vision Transformer, and what cannot: one `ModuleInfo` per attention and MLP."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import timm
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import nn

from skd.skipped import is_skipped

# timm's and PyTorch's activation classes by the names of `skd_kernels.masked_mlp`.
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "Swish": "silu",
}
# Layers into and out of the hidden neurons of each MLP; the gate's first.
_MLP_LAYERS: dict[Any, tuple[tuple[str, ...], str]] = {
    Mlp: (("fc1",), "fc2"),
    GluMlp: (("fc1",), "fc2"),
    SwiGLU: (("fc1_g", "fc1_x"), "fc2"),
    GeGluMlp: (("w0", "w1"), "w2"),
}
ATTENTION_GROUP = 8  # coordinates of a head (METHOD 2)
MLP_GROUPS = 32  # groups of neurons of an MLP (METHOD 2)


@dataclass(frozen=True)
class ModuleInfo:
    """One attention or MLP of the network, in the method's order 0.attn, 0.mlp, 1.attn, ...

    Attributes:
        name: "3.attn", "3.mlp".
        block: index of its block.
        kind: "attn" or "mlp".
        full_width: head width D, or hidden width F.
        group_size: how many coordinates one pruning step removes.
        binary: it takes the widths 0 and `full_width` only, because something inside mixes its coordinates.
        rotates_v, rotates_qk: which WPAC rotations preserve its function (attention only).
        num_heads: H (attention only, else 0).
        act: name of the activation for `skd_kernels.masked_mlp` (MLP only, else "").
        gated: the MLP has gate and value rows.
        inputs: names of the layers into the hidden neurons, the gate's first (MLP only): one layer holding the rows
            of both, or two.
        output: name of the layer out of them (MLP only).
    """

    name: str
    block: int
    kind: str
    full_width: int
    group_size: int
    binary: bool
    rotates_v: bool = False
    rotates_qk: bool = False
    num_heads: int = 0
    act: str = ""
    gated: bool = False
    inputs: tuple[str, ...] = ()
    output: str = ""


def attention_group(head_dim: int) -> int:
    """Coordinates per group of a head: 8."""
    return min(ATTENTION_GROUP, max(head_dim, 1))


def mlp_group(hidden: int) -> int:
    """Neurons per group: ceil(F / 32), rounded up to a multiple of 8 when F >= 512."""
    group = max(-(-hidden // MLP_GROUPS), 1)
    return -(-group // 8) * 8 if hidden >= 512 else group


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` whose error for an unknown name suggests near ones."""
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"model name is {name!r}; timm has no such model{hint}")
    model: nn.Module = timm.create_model(name, **kwargs)
    return model


def describe(model: nn.Module) -> tuple[ModuleInfo, ...]:
    """The modules of a timm VisionTransformer, two per block.

    Raises:
        ValueError: an architecture or feature that has no function-preserving nested form; the message names it.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"model is a {type(model).__module__}.{type(model).__name__}; "
            "it must be a timm VisionTransformer (Eva, Swin, NaFlexVit and others are not supported)"
        )
    if len(model.blocks) == 0:
        raise ValueError("model has no blocks; it must have at least one")
    if model.num_classes and not model.global_pool and model.attn_pool is None:
        raise ValueError(
            "model has global_pool='' and a classifier, so logits per token; it may have one or the other"
        )
    infos: list[ModuleInfo] = []
    for index, block in enumerate(model.blocks):
        # A SuperBlock remembers which timm block it was made from.
        kind = getattr(block, "block_class", type(block))
        if kind not in (Block, ResPostBlock):
            raise ValueError(
                f"blocks.{index} is a {kind.__name__}; parallel and differential blocks are not supported, "
                "it may be a Block or a ResPostBlock"
            )
        attn, mlp = block.attn, block.mlp
        infos.append(_skipped(index, "attn") if is_skipped(attn) else _describe_attention(index, attn))
        infos.append(_skipped(index, "mlp") if is_skipped(mlp) else _describe_mlp(index, mlp))
    parameters = [id(p) for _, p in model.blocks.named_parameters(remove_duplicate=False)]
    if len(set(parameters)) < len(parameters):
        raise ValueError("model shares a parameter between two layers; every layer must have its own")
    return tuple(infos)


def _skipped(index: int, kind: str) -> ModuleInfo:
    """Of a module that an extraction left out: nothing to narrow."""
    name = f"{index}.{kind}"
    return ModuleInfo(name, index, kind, full_width=0, group_size=1, binary=False, num_heads=int(kind == "attn"))


def _describe_attention(index: int, attn: Any) -> ModuleInfo:
    name = f"blocks.{index}.attn"
    if type(attn) is not Attention:
        raise ValueError(
            f"{name} is a {type(attn).__name__}; differential and other attention layers are not supported, "
            "it must be timm's Attention"
        )
    for layer in ("qkv", "proj"):
        _require_linear(f"{name}.{layer}", getattr(attn, layer))
    if attn.attn_drop.p > 0 or attn.proj_drop.p > 0:
        raise ValueError(
            f"{name} has dropout; build the model with attn_drop_rate=0 and proj_drop_rate=0 "
            "(drop_path_rate is supported)"
        )
    qk_norm = not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))
    scale_norm = not isinstance(attn.norm, nn.Identity)
    gated = getattr(attn, "gate", None) is not None
    binary = qk_norm or scale_norm or gated
    head_dim = attn.head_dim
    return ModuleInfo(
        name=f"{index}.attn",
        block=index,
        kind="attn",
        full_width=head_dim,
        group_size=head_dim if binary else attention_group(head_dim),
        binary=binary,
        rotates_v=not (scale_norm or gated),
        rotates_qk=not binary,
        num_heads=attn.num_heads,
    )


def _describe_mlp(index: int, mlp: Any) -> ModuleInfo:
    name = f"blocks.{index}.mlp"
    if type(mlp) not in _MLP_LAYERS:
        known = ", ".join(sorted(cls.__name__ for cls in _MLP_LAYERS))
        raise ValueError(f"{name} is a {type(mlp).__name__}; it may be one of timm's {known}")
    inputs, output = _MLP_LAYERS[type(mlp)]
    for layer in (*inputs, output):
        _require_linear(f"{name}.{layer}", getattr(mlp, layer))
    if any(module.p > 0 for module in mlp.modules() if isinstance(module, nn.Dropout)):
        raise ValueError(f"{name} has dropout; build the model with proj_drop_rate=0")
    if isinstance(mlp, GluMlp) and mlp.gate_last:
        raise ValueError(f"{name} is a GluMlp with gate_last=True; its gate rows must come first")
    act = _ACTIVATIONS.get(type(mlp.act).__name__)
    if act is None:
        raise ValueError(f"{name} has activation {type(mlp.act).__name__}; it may be one of {sorted(_ACTIVATIONS)}")
    if act == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh":
        act = "gelu_tanh"
    hidden = getattr(mlp, output).in_features
    # GeGluMlp has its norm before the first layer, the others between the two: there it mixes the neurons.
    binary = not isinstance(mlp, GeGluMlp) and not isinstance(mlp.norm, nn.Identity)
    return ModuleInfo(
        name=f"{index}.mlp",
        block=index,
        kind="mlp",
        full_width=hidden,
        group_size=hidden if binary else mlp_group(hidden),
        binary=binary,
        act=act,
        gated=not isinstance(mlp, Mlp),
        inputs=inputs,
        output=output,
    )


def _require_linear(name: str, layer: Any) -> None:
    """Weights that are computed (weight norm, adapters, quantisation) cannot be rewritten in place."""
    if type(layer) is not nn.Linear:
        raise ValueError(f"{name} is a {type(layer).__name__}; it must be a plain torch.nn.Linear")
