"""The arithmetic as published: the conversion, and the masked layers and the step of PIAD training.

Only the way to get there differs from ours; results are the same to rounding.

`convert`: features and gradients of all layers are kept until the backward pass is over; otherwise it is
`skd.convert(..., centering="batch")`, and parameters get gradients that nobody reads. The clones are made in the
backward pass, which is to its advantage.

`masked_mlp`, `masked_attention`: boolean masks, made on the host for every call and copied to the device, gather the
kept rows and columns of the weights; softmax attention is written out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

import skd
from benchmarks.contenders import covariance_published
from skd.architecture import ModuleInfo, describe
from skd.convert import WpacStatistics, apply_transforms
from skd.taps import checked, tapped, total_cost

Kept = tuple[ModuleInfo, torch.Tensor, torch.Tensor]
Tensor = torch.Tensor


def convert(model: Any, batches: Iterable[Any]) -> skd.SuperNet:
    infos, converted = describe(model), copy.deepcopy(model)
    statistics = WpacStatistics("batch")
    kept: list[Kept] = []
    with tapped(converted, infos, lambda info, feature, grad: kept.append((info, feature.clone(), grad.clone()))):
        converted.requires_grad_()
        for images, labels in checked(converted, batches):
            converted.zero_grad()
            total_cost(converted, converted(images), labels).backward()
            for info, feature, grad in kept:
                add(statistics, info, feature, grad)
            kept.clear()
    apply_transforms(converted, infos, {info.name: statistics.transform(info) for info in infos})
    return skd.SuperNet(converted, copy=False)


def add(statistics: WpacStatistics, info: ModuleInfo, feature: torch.Tensor, grad: torch.Tensor) -> None:
    name = info.name
    if info.kind == "mlp":
        score = (feature * grad).square().flatten(0, -2).sum(0)
        statistics.importance[name] = statistics.importance.get(name, 0.0) + score
    else:
        x, g = feature.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
        statistics.covariances[name] = statistics.covariances.get(name, 0.0) + covariance_published(x, g).double()


def masked_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, width: int) -> Tensor:
    """As `skd_kernels.masked_mlp`."""
    mask = torch.zeros(len(b1), dtype=torch.bool)
    mask[:width] = True
    mask = mask.to(x.device)
    return F.linear(F.gelu(F.linear(x, w1[mask], b1[mask])), w2[:, mask], b2)


def masked_attention(
    x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_proj: Tensor, b_proj: Tensor, width: int, num_heads: int
) -> Tensor:
    """As `skd_kernels.masked_attention`."""
    images, tokens, _ = x.shape
    head_dim = w_proj.shape[1] // num_heads
    mask = torch.zeros(num_heads, head_dim, dtype=torch.bool)
    mask[:, :width] = True
    mask = mask.flatten().to(x.device)
    rows = mask.repeat(3)
    qkv = F.linear(x, w_qkv[rows], b_qkv[rows]).reshape(images, tokens, 3, num_heads, width)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q * head_dim**-0.5) @ k.transpose(-2, -1)
    out = attention.softmax(dim=-1) @ v
    return F.linear(out.transpose(1, 2).reshape(images, tokens, -1), w_proj[:, mask], b_proj)
