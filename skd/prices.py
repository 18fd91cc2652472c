"""Price lists: MACs and parameters of a network at any widths, in two conventions (METHOD 4).

Within a module both are affine in its width and vanish with it, so a whole dropout list is priced by two small
integer tables. What lies outside of the blocks is counted once, by a forward pass on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.func import functional_call

from skd.architecture import ModuleInfo, image_size
from skd.settings import CONVENTIONS


@dataclass(frozen=True)
class CostModel:
    """Integer price list of a network; row 0 of each MACs array is `full`, row 1 `linear`.

    ``macs(widths) = base + sum over modules of [width > 0] * (per_unit * width + fixed)``, and likewise params.
    """

    base_macs: np.ndarray  # (2,)
    macs_per_unit: np.ndarray  # (2, modules)
    macs_fixed: np.ndarray  # (modules,)
    base_params: int
    params_per_unit: np.ndarray  # (modules,)
    params_fixed: np.ndarray  # (modules,)

    def macs(self, widths: Any, convention: str = "full") -> np.ndarray:
        """MACs of each row of `widths`, (..., modules) int: (...) int64."""
        row = CONVENTIONS.index(check_convention(convention))
        return self._price(widths, self.base_macs[row], self.macs_per_unit[row], self.macs_fixed)

    def params(self, widths: Any) -> np.ndarray:
        """Parameters of each row of `widths`, (..., modules) int: (...) int64."""
        return self._price(widths, self.base_params, self.params_per_unit, self.params_fixed)

    @staticmethod
    def _price(widths: Any, base: Any, per_unit: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        widths = np.asarray(widths, dtype=np.int64)
        priced: np.ndarray = base + ((widths > 0) * (widths * per_unit + fixed)).sum(-1)
        return priced


def check_convention(convention: str) -> str:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; it may be one of {CONVENTIONS}")
    return convention


def cost_model(model: Any, infos: tuple[ModuleInfo, ...]) -> CostModel:
    """The price list of a timm VisionTransformer at its present widths."""
    tokens = _tokens(model)
    base_linear, base_full = _outside_macs(model)
    rows = []
    for info in infos:
        block = model.blocks[info.block]
        if info.full_width == 0:
            rows.append((0, 0, 0, 0, 0))
        else:
            rows.append(_attention_prices(block, info) if info.kind == "attn" else _mlp_prices(block, info))
    table = np.array(rows, dtype=np.int64).reshape(len(infos), 5)
    linear, quadratic, fixed, params_per_unit, params_fixed = table.T
    linear, fixed = linear * tokens, fixed * tokens
    block_params = sum(p.numel() for p in model.blocks.parameters())
    return CostModel(
        base_macs=np.array([base_full, base_linear], dtype=np.int64),
        macs_per_unit=np.stack([linear + quadratic * tokens * tokens, linear]),
        macs_fixed=fixed,
        base_params=sum(p.numel() for p in model.parameters()) - block_params,
        params_per_unit=params_per_unit,
        params_fixed=params_fixed,
    )


def planning_macs_per_unit(
    model: Any, infos: tuple[ModuleInfo, ...], costs: CostModel, convention: str = "full"
) -> dict[str, float]:
    """MACs that one unit of width stands for in the planner: the whole module shared out evenly.

    METHOD 4's per-module figures: N (4 d^2 + 4 d) + [2 N^2 H D] for attention, N (2 d h + 2 h + d) for an MLP; no
    norm, and the activation once, where the whole-model figure counts it twice.
    """
    row = CONVENTIONS.index(check_convention(convention))
    tokens = _tokens(model)
    shares = {}
    for index, info in enumerate(infos):
        if info.full_width == 0:
            shares[info.name] = 0.0
            continue
        per_unit = int(costs.macs_per_unit[row, index])
        if info.kind == "mlp":
            per_unit -= tokens
        norm = tokens * model.embed_dim
        fixed = int(costs.macs_fixed[index]) - norm
        shares[info.name] = (per_unit * info.full_width + fixed) / info.full_width
    return shares


def _tokens(model: Any) -> int:
    """Tokens in the blocks."""
    return int(model.patch_embed.num_patches + model.num_prefix_tokens)


def _attention_prices(block: Any, info: ModuleInfo) -> tuple[int, int, int, int, int]:
    """Per token: MACs per unit, per token pair per unit, fixed; parameters per unit, fixed."""
    attn, heads = block.attn, info.num_heads
    dim = attn.qkv.in_features
    norms = [attn.q_norm, attn.k_norm, attn.norm]
    per_head = 4 * dim + 3 * _has_bias(attn.qkv)
    per_head += sum(not isinstance(norm, nn.Identity) for norm in norms)
    scaling = [attn.qkv.weight, attn.qkv.bias, attn.proj.weight]
    scaling += [parameter for norm in norms for parameter in norm.parameters()]
    if getattr(attn, "gate", None) is not None:
        per_head += dim + _has_bias(attn.gate) + 1  # and the product with the gate
        scaling += list(attn.gate.parameters())
    fixed = dim * _has_bias(attn.proj) + dim  # the output bias, and the block's norm
    numel = sum(p.numel() for p in scaling if p is not None)
    others = _numel(attn, block.norm1, getattr(block, "ls1", None)) - numel
    return heads * per_head, 2 * heads, fixed, numel // max(info.full_width, 1), others


def _mlp_prices(block: Any, info: ModuleInfo) -> tuple[int, int, int, int, int]:
    """Per token: MACs per unit, per token pair per unit, fixed; parameters per unit, fixed."""
    mlp, output = block.mlp, getattr(block.mlp, info.output)
    dim, first = output.out_features, [getattr(block.mlp, name) for name in info.inputs]
    inputs = 2 if info.gated else 1
    per_unit = dim * (inputs + 1) + inputs * _has_bias(first[0]) + 2 + (inputs - 1)
    fixed = dim * _has_bias(output) + dim
    scaling = _numel(*first) + output.weight.numel()
    if info.binary:  # the norm over the neurons
        per_unit += 1
        scaling += _numel(mlp.norm)
    elif not isinstance(mlp.norm, nn.Identity):  # a norm over the input
        fixed += dim
    others = _numel(mlp, block.norm2, getattr(block, "ls2", None)) - scaling
    return per_unit, 0, fixed, scaling // max(info.full_width, 1), others


def _has_bias(layer: Any) -> int:
    return int(layer.bias is not None)


def _numel(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def _outside_macs(model: Any) -> tuple[int, int]:
    """(linear, full) MACs of all that is not in a block, for one image, from the shapes of a meta forward."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += _leaf_macs(module, output)

    leaves = [
        module
        for name, module in model.named_modules()
        if not name.startswith("blocks.") and not list(module.children())
    ]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    training = model.training
    try:
        model.eval()
        _meta_forward(model)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total, total + _pool_attention_macs(model)


def _meta_forward(model: Any) -> None:
    """Run everything but the blocks on tensors without data."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    outside = {name: torch.empty_like(t, device="meta") for name, t in tensors if not name.startswith("blocks.")}
    height, width = image_size(model)
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, model.in_chans, height, width, device="meta", dtype=dtype)
    blocks, model.blocks = model.blocks, nn.Sequential()
    try:
        with torch.no_grad():
            functional_call(model, outside, (image,))
    finally:
        model.blocks = blocks


def _leaf_macs(module: nn.Module, output: torch.Tensor) -> int:
    """One layer in the published convention: bias adds and norms counted, an activation twice."""
    if isinstance(module, nn.Linear):
        positions = output.numel() // max(module.out_features, 1)
        return positions * module.out_features * (module.in_features + _has_bias(module))
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
        return output.numel() * (kernel + _has_bias(module))
    name = type(module).__name__.lower()
    if "norm" in name:
        return output.numel()
    if isinstance(module, nn.GELU | nn.SiLU) or "gelu" in name:
        return 2 * output.numel()
    return 0


def _pool_attention_macs(model: Any) -> int:
    """Q K^T and A V of an attention pool."""
    pool = model.attn_pool
    if pool is None:
        return 0
    tokens: int = _tokens(model) if model.pool_include_prefix else model.patch_embed.num_patches
    queries = pool.latent_len if isinstance(pool, AttentionPoolLatent) else tokens
    return 2 * queries * tokens * int(model.embed_dim)
