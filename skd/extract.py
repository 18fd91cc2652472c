"""A sub-network of any size as a plain timm model: a slice of the super-network's weights (METHOD 3)."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from skd.architecture import ModuleInfo, unwrapped
from skd.prices import check_convention
from skd.skipped import is_skipped, skipped_like
from skd.supernet import SuperBlock, SuperNet, check_supernet


def extract(
    supernet: SuperNet,
    *,
    macs: float | None = None,
    params: float | None = None,
    entry: int | None = None,
    convention: str = "full",
) -> VisionTransformer:
    """Cut one sub-network out of the super-network.

    Args:
        supernet: not changed; the result shares no memory with it.
        macs, params: budget; a float in (0, 1] is a fraction of the full network, an int an absolute count. The
            largest sub-network of the dropout list within the budget is taken.
        entry: index into the dropout list. Exactly one of `macs`, `params` and `entry` must be given.
        convention: how `macs` counts, "full" or "linear" (see `skd.cost`).

    Returns:
        A timm VisionTransformer of timm and torch modules only, usable without skd. Its logits are those of
        ``supernet(images, entry=...)``: the softmax scale of the original head width is folded into the Q rows. In
        place of a skipped module stands a torch.fx.GraphModule that returns zeros, and in place of its norm and
        layer scale Identity: block indices never shift, and every entry can be exported and quantized.

    Raises:
        ValueError: not exactly one choice, an entry out of range, or a budget below the smallest sub-network.
    """
    supernet = unwrapped(supernet)
    chosen = choose_entry(supernet, macs=macs, params=params, entry=entry, convention=convention)
    widths = supernet.widths(chosen)
    blocks = [
        _extract_block(block, widths[2 * i], widths[2 * i + 1]) for i, block in enumerate(supernet.model.blocks)
    ]
    # Everything outside of the blocks is copied; the blocks are already cut, and are not copied again.
    cut = nn.Sequential(*blocks).train(supernet.model.training)
    model: VisionTransformer = copy.deepcopy(supernet.model, {id(supernet.model.blocks): cut})
    return model


def choose_entry(
    supernet: SuperNet,
    *,
    macs: float | None = None,
    params: float | None = None,
    entry: int | None = None,
    convention: str = "full",
) -> int:
    """The entry that `extract` would cut; same arguments and errors."""
    given = {"macs": macs, "params": params, "entry": entry}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"exactly one of macs, params and entry must be given; got {chosen or 'none'}")
    check_convention(convention)
    check_supernet(supernet)
    if entry is not None:
        supernet.widths(entry)
        return entry
    dropout_list = supernet.dropout_list
    if macs is not None:
        sizes = supernet.costs.macs(dropout_list.widths, convention)
        unit = f"MACs ({convention})"
    else:
        sizes = supernet.costs.params(dropout_list.widths)
        unit = "parameters"
    budget = _budget(chosen[0], given[chosen[0]], int(sizes[0]))
    fitting = np.flatnonzero(sizes <= budget)
    if len(fitting) == 0:
        smallest = int(sizes[-1])
        if len(sizes) == 1:
            raise ValueError(
                f"{chosen[0]} is {given[chosen[0]]}, but this super-network was never planned: its dropout list has "
                f"the full network alone, with {smallest:,} {unit}; skd plan or skd train (skd.plan, skd.train) "
                "gives it smaller ones"
            )
        raise ValueError(
            f"{chosen[0]} is {given[chosen[0]]}, that is {budget:,} {unit}; the smallest sub-network is entry "
            f"{len(sizes) - 1} with {smallest:,} ({smallest / int(sizes[0]):.4f} of the full network)"
        )
    return int(fitting[0])


def _budget(name: str, value: Any, full: int) -> int:
    """A fraction (float in (0, 1]) or a count (int) as a count."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if int(value) < 1:
            raise ValueError(f"{name} is {value}; a count must be positive")
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if 0 < float(value) <= 1:
            count = math.floor(float(value) * full)
            # A fraction that was computed as count / full means that count, whatever the product rounds to.
            return count + 1 if (count + 1) / full <= float(value) else count
        raise ValueError(f"{name} is {value}; a float is a fraction in (0, 1], an int an absolute count")
    raise ValueError(f"{name} is {value!r}; it must be a float in (0, 1] or an int")


def _extract_block(block: SuperBlock, attn_width: int, mlp_width: int) -> nn.Module:
    """The timm block at the given widths; every tensor is a fresh copy."""
    replaced = {
        "attn": _narrow(narrow_attention, block.attn, block.attn_info, attn_width),
        "mlp": _narrow(narrow_mlp, block.mlp, block.mlp_info, mlp_width),
    }
    for which, width in (("1", attn_width), ("2", mlp_width)):
        if width == 0:
            replaced |= {f"{part}{which}": nn.Identity() for part in ("norm", "ls", "drop_path")}
    # A timm block without its constructor, which would allocate and initialise full-size weights.
    plain: Any = block.block_class.__new__(block.block_class)
    nn.Module.__init__(plain)
    if block.post_norm:
        # What init_weights gives to both norms: not to be asked of an Identity.
        plain.init_values = block.init_values if attn_width and mlp_width else None
    for name, child in block.named_children():
        plain.add_module(name, replaced.get(name) or copy.deepcopy(child))
    return plain.train(block.training)


def _narrow(cut: Callable[[Any, ModuleInfo, int], nn.Module], module: Any, info: ModuleInfo, width: int) -> nn.Module:
    """`module` whole, cut to `width`, or what stands for it where it is skipped."""
    if is_skipped(module) or 0 < width == info.full_width:
        return copy.deepcopy(module)
    return cut(module, info, width) if width else skipped_like(module)


def narrow_attention(attn: Any, info: ModuleInfo, width: int) -> nn.Module:
    """timm's Attention with `width` coordinates per head."""
    dim, bias = attn.qkv.in_features, attn.qkv.bias is not None
    heads, full = info.num_heads, info.full_width
    factor = math.sqrt(width / full)  # timm will scale by width ** -0.5
    qkv = _linear_like(attn.qkv, 3 * heads * width, dim, bias)
    proj = _linear_like(attn.proj, attn.proj.out_features, heads * width, attn.proj.bias is not None)
    with torch.no_grad():
        for new, old in ((qkv.weight, attn.qkv.weight), (qkv.bias, attn.qkv.bias)):
            if old is not None:
                rows = old.reshape(3, heads, full, -1)[:, :, :width]
                new.view(3, heads, width, -1).copy_(rows)
                new[: heads * width] *= factor
        columns = attn.proj.weight.unflatten(1, (heads, full))[:, :, :width]
        proj.weight.view(-1, heads, width).copy_(columns)
        if proj.bias is not None:
            proj.bias.copy_(attn.proj.bias)
    narrow: Any = copy.deepcopy(attn, {id(attn.qkv): qkv, id(attn.proj): proj})
    narrow.head_dim, narrow.attn_dim, narrow.scale = width, heads * width, width**-0.5
    module: nn.Module = narrow
    return module


def narrow_mlp(mlp: Any, info: ModuleInfo, width: int) -> nn.Module:
    """timm's MLP with its first `width` neurons."""
    inputs = [getattr(mlp, name) for name in info.inputs]
    memo: dict[int, Any] = {id(layer): _first_rows(layer, info.full_width, width) for layer in inputs}
    output = getattr(mlp, info.output)
    columns = _linear_like(output, output.out_features, width, output.bias is not None)
    with torch.no_grad():
        columns.weight.copy_(output.weight[:, :width])
        if columns.bias is not None:
            columns.bias.copy_(output.bias)
    narrow: nn.Module = copy.deepcopy(mlp, memo | {id(output): columns})
    return narrow


def _first_rows(layer: nn.Linear, full: int, width: int) -> nn.Linear:
    """The first `width` of every `full` rows (gate and value rows of a packed layer alike)."""
    parts = layer.out_features // full
    cut = _linear_like(layer, parts * width, layer.in_features, layer.bias is not None)
    with torch.no_grad():
        for new, old in ((cut.weight, layer.weight), (cut.bias, layer.bias)):
            if old is not None:
                rows = old.unflatten(0, (parts, full))[:, :width]
                new.copy_(rows.reshape(new.shape))
    return cut


def _linear_like(layer: nn.Linear, rows: int, columns: int, bias: bool) -> nn.Linear:
    """A Linear of another size, uninitialised, with the dtype, device, mode and grad flag of `layer`."""
    weight = layer.weight
    linear = nn.Linear(1, 1, bias=bias, device="meta")  # nothing to initialise, and no random number drawn
    linear.in_features, linear.out_features = columns, rows
    linear.weight = nn.Parameter(weight.new_empty(rows, columns))
    if bias:
        linear.bias = nn.Parameter(weight.new_empty(rows))
    linear.requires_grad_(weight.requires_grad).train(layer.training)
    return linear
