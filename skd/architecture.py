"""What can be narrowed in a timm Vision Transformer, and what cannot: one `ModuleInfo` per attention and MLP."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from typing import Any

import timm
import torch
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
MODEL_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # prefixes of names, as timm has them
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
    """``timm.create_model`` whose errors are one line: what is wrong with the name, or with which argument.

    Args:
        name: as timm takes it: of its registry, "hf-hub:USER/MODEL" or "local-dir:FOLDER".
        kwargs: arguments of ``timm.create_model``.

    Raises:
        ValueError: an unknown name (near ones are suggested), a folder that is not there, an argument that timm or
            the architecture does not take.
        OSError: weights that cannot be downloaded.
    """
    source, _, place = name.partition(":")
    if source.lower() not in MODEL_SOURCES:
        _check_name(name)
    elif source.lower() == "local-dir" and not os.path.isfile(os.path.join(place, "config.json")):
        raise ValueError(f"model name is {name!r}; there is no folder {place!r} with timm's config.json in it")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:  # FileNotFoundError is the file's that an argument names; the rest is the network's
        if isinstance(error, FileNotFoundError) and kwargs.get("checkpoint_path"):
            raise ValueError(f"checkpoint_path is {kwargs['checkpoint_path']!r}; there is no such file") from None
        raise OSError(f"model {name} cannot be had: {_first_line(error)}") from None
    except Exception as error:  # timm checks with assertions, look-ups and divisions
        raise ValueError(f"model {name} cannot be built{_with(name, kwargs)}: {_first_line(error)}") from None
    return model


def _check_name(name: str) -> None:
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=4)
    hint = f"; near names: {', '.join(near)}" if near else ""
    if not near and os.sep in name:
        hint = f" (of a hub: 'hf-hub:{name}', in a folder: 'local-dir:{name}')"
    raise ValueError(f"model name is {name!r}; timm has no such model{hint}")


def _with(name: str, kwargs: dict[str, Any]) -> str:
    """What to say of the arguments: " with" those without which the model can be built, or else all of them.

    Nothing, where the model can be built with them: then its weights are at fault.
    """
    plain = {key: value for key, value in kwargs.items() if key != "pretrained"}
    if _builds(name, set(plain), plain):
        return ""
    wrong = {key: value for key, value in plain.items() if _builds(name, plain.keys() - {key}, plain)} or plain
    return f" with {', '.join(f'{key}={value!r}' for key, value in wrong.items())}" if wrong else ""


def _builds(name: str, keys: set[str], kwargs: dict[str, Any]) -> bool:
    """With these arguments alone; without memory for the weights."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **{key: kwargs[key] for key in keys})
    except Exception:
        return False
    return True


def _first_line(error: Exception) -> str:
    """What an exception says, in one line; of one that says little (a key, nothing) also its class."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if " " in text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def unwrapped(model: Any) -> Any:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers, however nested."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def image_size(model: Any) -> tuple[int, int]:
    """(height, width) of the images that `model` was built for.

    With `dynamic_img_size` any multiple of the patch is taken, and nothing else: then the largest such size within
    it, which has as many patches.
    """
    height, width = model.patch_embed.img_size
    if model.dynamic_img_size and not getattr(model.patch_embed, "dynamic_img_pad", False):
        rows, columns = model.patch_embed.patch_size
        return height // rows * rows, width // columns * columns
    return height, width


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
    if model.num_classes < 0:
        raise ValueError(f"model has num_classes={model.num_classes}; it must be at least 0")
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
