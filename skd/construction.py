"""How to build a timm Vision Transformer again: its name and arguments, or its constructor's arguments.

Models from ``timm.create_model`` know both. For one built directly the arguments are read off its modules, while it
is still whole: an extracted model no longer shows them.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import timm
from timm.layers import LayerNorm, LayerNormFp32, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models import get_model_args
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from skd.architecture import ModuleInfo, create_model, describe

MODEL_CLASSES = {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled)}
# Constructor arguments that are classes are written by name.
_CLASSES: dict[str, dict[str, Any]] = {
    "block_fn": {"ResPostBlock": ResPostBlock},
    "mlp_layer": {"SwiGLUPacked": SwiGLUPacked, "SwiGLU": SwiGLU},
}
_NORMS = {"layernorm": LayerNorm, "layernormfp32": LayerNormFp32, "rmsnorm": RmsNorm}
_DEFAULT_EPS = 1e-6
# Arguments of timm.create_model that read something other than the architecture.
_NOT_ARCHITECTURE = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def remember_construction(model: Any) -> None:
    """Record on `model`, where timm keeps them, the arguments that rebuild it, if timm has not."""
    if _known_to_timm(model) or _remembered(model) or None in _first_modules(model):
        return
    model._model_args = constructor_args(model)
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "architecture": None}


def construction(model: Any) -> dict[str, Any]:
    """JSON values for `build`: architecture (or None), model_class, model_args, norm_eps (or None)."""
    known = _known_to_timm(model)
    args = get_model_args(model) if known or _remembered(model) else constructor_args(model)
    norm_eps = args.pop("norm_eps", None)
    return {
        "architecture": model.pretrained_cfg["architecture"] if known else None,
        "model_class": type(model).__name__,
        "model_args": args,
        "norm_eps": norm_eps,
    }


def build(header: dict[str, Any]) -> Any:
    """The module that `construction` described, freshly initialised.

    Raises:
        ValueError: unknown architecture or class.
    """
    args = dict(header["model_args"])
    forbidden = _NOT_ARCHITECTURE & args.keys()
    if forbidden:
        raise ValueError(f"model_args has {sorted(forbidden)}; a file may not name other files or weights")
    if header["architecture"] is not None:
        return create_model(header["architecture"], pretrained=False, **args)
    if header["model_class"] not in MODEL_CLASSES:
        raise ValueError(f"model_class is {header['model_class']!r}; it may be one of {sorted(MODEL_CLASSES)}")
    for name, classes in _CLASSES.items():
        if name in args:
            args[name] = classes[args[name]]
    if header["norm_eps"] is not None:
        args["norm_layer"] = partial(_NORMS[args.get("norm_layer", "layernorm")], eps=header["norm_eps"])
    return MODEL_CLASSES[header["model_class"]](**args)


def _known_to_timm(model: Any) -> bool:
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        return False
    try:
        json.dumps(get_model_args(model))
    except TypeError:  # an argument that is a class or a function
        return False
    return True


def _remembered(model: Any) -> bool:
    return "norm_eps" in getattr(model, "_model_args", {})


def constructor_args(model: Any) -> dict[str, Any]:
    """VisionTransformer's constructor arguments, read off a whole model; and norm_eps, None for timm's 1e-6.

    What cannot be read here (a block or layer put in by hand) shows when a saved file is compared with its model.

    Raises:
        ValueError: every attention or every MLP is skipped, so that nothing shows what they were.
    """
    attn, mlp = _first_modules(model)
    if attn is None or mlp is None:
        what = "attention" if attn is None else "MLP"
        raise ValueError(
            f"model skips every {what} and does not know how it was built; "
            "it may be one of timm.create_model, skd.extract or skd.load"
        )
    first, other = model.blocks[attn.block], model.blocks[mlp.block]
    norm = first.norm1
    args = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": _mlp_ratio(model.embed_dim, mlp.full_width * (2 if hasattr(other.mlp, "gate_last") else 1)),
        "qkv_bias": first.attn.qkv.bias is not None,
        "qk_norm": _present(first.attn.q_norm),
        "scale_attn_norm": _present(first.attn.norm),
        "scale_mlp_norm": _present(other.mlp.norm),
        "proj_bias": first.attn.proj.bias is not None,
        "init_values": 1e-5 if _present(getattr(first, "ls1", None)) else None,
        "class_token": model.has_class_token,
        "pos_embed": "learn" if model.pos_embed is not None else "none",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": _present(model.norm_pre),
        "final_norm": _present(model.norm) or _present(model.fc_norm),
        "fc_norm": _present(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "norm_layer": _norm_name(norm),
        "act_layer": mlp.act,
        "norm_eps": None if norm.eps == _DEFAULT_EPS else norm.eps,
        **_class_names(other),
    }
    if getattr(model.patch_embed, "dynamic_img_pad", False):
        args["dynamic_img_pad"] = True
    if _present(getattr(model.patch_embed, "norm", None)):
        args["embed_norm_layer"] = args["norm_layer"]
    return args


def _first_modules(model: Any) -> tuple[ModuleInfo | None, ModuleInfo | None]:
    """The first attention and the first MLP that are not skipped, None where all are."""
    left = [info for info in describe(model) if info.full_width]
    return (
        next((info for info in left if info.kind == "attn"), None),
        next((info for info in left if info.kind == "mlp"), None),
    )


def _present(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _mlp_ratio(dim: int, hidden: int) -> float:
    """A ratio with ``int(dim * ratio) == hidden``."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _norm_name(norm: nn.Module) -> str:
    for name, cls in _NORMS.items():
        if type(norm) is cls:
            return name
    return "layernorm" if isinstance(norm, nn.LayerNorm) else type(norm).__name__.lower()


def _class_names(block: Any) -> dict[str, str]:
    """block_fn and mlp_layer, where they are not timm's defaults."""
    names = {}
    if getattr(block, "block_class", type(block)) is ResPostBlock:
        names["block_fn"] = "ResPostBlock"
    if not hasattr(block.mlp, "fc1"):
        names["mlp_layer"] = "SwiGLU"
    elif hasattr(block.mlp, "gate_last"):
        names["mlp_layer"] = "SwiGLUPacked"
    return names
