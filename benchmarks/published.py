"""The masked layers of PIAD training with the arithmetic as published.

Only the way to get there differs from ours; results are the same to rounding. Boolean masks, made on the host for
every call and copied to the device, gather the kept rows and columns of the weights. Softmax attention is written
out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


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
