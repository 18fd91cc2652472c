"""Whole networks at the widths of a dropout list, by layers written in one of several ways; and such a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import skd
from benchmarks.sizes import SIZES

Layer = Callable[..., torch.Tensor]
SMALLEST = 0.125  # of the MACs, as METHOD's lists end


def deit(size: str, device: str) -> Any:
    """A DeiT with random weights, the same each time; drawn on the device, which is faster there."""
    torch.manual_seed(0)
    with torch.device(device):
        return timm.create_model(f"deit_{size}_patch16_224", img_size=SIZES.pixels, depth=SIZES.depth)


def dropout_list(supernet: skd.SuperNet, smallest: float = SMALLEST) -> skd.DropoutList:
    """A nested list down to `smallest` of the MACs: one group less per entry, the modules in a fixed random order.

    As in a planned list widths are multiples of a group and differ between modules; all modules narrow alike.
    """
    infos = supernet.infos
    order = np.repeat(np.arange(len(infos)), [-(-info.full_width // info.group_size) for info in infos])
    np.random.default_rng(0).shuffle(order)
    row = np.array(supernet.widths())
    full, rows = supernet.costs.macs(row), [row.copy()]
    for module in order:
        if supernet.costs.macs(row) <= smallest * full:
            break
        group = infos[module].group_size
        row[module] = (row[module] - 1) // group * group
        rows.append(row.copy())
    return skd.DropoutList(supernet.modules_in_order, rows)


def entry_at(supernet: skd.SuperNet, fraction: float) -> int:
    """The largest sub-network within a fraction of the MACs."""
    macs = supernet.dropout_list.macs
    return int(np.flatnonzero(macs <= fraction * macs[0])[0])


def spread(supernet: skd.SuperNet, count: int) -> list[int]:
    """Entries evenly over the list, both ends included: their mean stands for a uniform draw's."""
    return np.linspace(0, len(supernet.dropout_list) - 1, count).round().astype(int).tolist()


class Network(nn.Module):
    """``network(images, widths)``: a DeiT whose blocks call `attention` and `mlp` on the widths, ints.

    Args:
        attention, mlp: as `published.masked_attention` and `published.masked_mlp`.
        compiler: takes the function of one block, and returns what all blocks call in its place.
    """

    def __init__(self, model: Any, attention: Layer, mlp: Layer, compiler: Callable[[Layer], Layer] | None) -> None:
        super().__init__()
        self.model = model

        def block(module: Any, x: torch.Tensor, k: int, m: int) -> torch.Tensor:
            if k:
                own = module.attn
                weights = own.qkv.weight, own.qkv.bias, own.proj.weight, own.proj.bias
                x = x + attention(module.norm1(x), *weights, k, own.num_heads)
            if m:
                fc1, fc2 = module.mlp.fc1, module.mlp.fc2
                x = x + mlp(module.norm2(x), fc1.weight, fc1.bias, fc2.weight, fc2.bias, m)
            return x

        self.block = block if compiler is None else compiler(block)

    def forward(self, images: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for index, module in enumerate(model.blocks):
            x = self.block(module, x, widths[2 * index], widths[2 * index + 1])
        return model.forward_head(model.norm(x))


def gradient(network: nn.Module, forward: Callable[[], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """The gradient of the true classes' logits at all parameters, as one vector."""
    parameters = list(network.parameters())
    chosen = forward().float().gather(1, labels[:, None])
    found = torch.autograd.grad(chosen.sum(), parameters, allow_unused=True)
    zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
    return torch.cat([part.flatten().double() for part in zeros])
