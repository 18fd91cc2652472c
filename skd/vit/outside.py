"""MACs of all layers outside of the blocks, counted by a forward pass on the meta device (METHOD 4)."""

from __future__ import annotations

import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.func import functional_call

from skd.vit.images import image_size
from skd.vit.layers import has_bias
from skd.vit.protocol import TimmModel


def outside_macs(model: TimmModel) -> int:
    """MACs of the layers outside of the blocks, for one image, from the shapes of their outputs."""
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
    return total


def pool_macs(model: TimmModel, tokens: int) -> int:
    """The MACs of Q K^T and A V in an attention pool over `tokens`; 0 if there is none."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0
    queries = pool.latent_len if isinstance(pool, AttentionPoolLatent) else tokens
    return 2 * queries * tokens * int(model.embed_dim)


def _meta_forward(model: TimmModel) -> None:
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
    """The MACs of one layer in the published convention: it counts bias adds and norms, and an activation twice."""
    if isinstance(module, nn.Linear):
        positions = output.numel() // max(module.out_features, 1)
        return positions * module.out_features * (module.in_features + has_bias(module))
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
        return output.numel() * (kernel + has_bias(module))
    name = type(module).__name__.lower()
    if "norm" in name:
        return output.numel()
    if isinstance(module, nn.GELU | nn.SiLU) or "gelu" in name:
        return 2 * output.numel()
    return 0
