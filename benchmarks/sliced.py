"""The masked layers as good plain PyTorch: leading rows and columns of the weights, library attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def masked_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, width: int) -> Tensor:
    """As `skd_kernels.masked_mlp`."""
    return F.linear(F.gelu(F.linear(x, w1[:width], b1[:width])), w2[:, :width], b2)


def masked_attention(
    x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_proj: Tensor, b_proj: Tensor, width: int, num_heads: int
) -> Tensor:
    """As `skd_kernels.masked_attention`."""
    images, tokens, channels = x.shape
    head_dim = w_proj.shape[1] // num_heads
    rows = w_qkv.view(3, num_heads, head_dim, channels)[:, :, :width].reshape(-1, channels)
    bias = b_qkv.view(3, num_heads, head_dim)[:, :, :width].reshape(-1)
    q, k, v = F.linear(x, rows, bias).view(images, tokens, 3, num_heads, width).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    columns = w_proj.view(channels, num_heads, head_dim)[:, :, :width].reshape(channels, -1)
    return F.linear(out.transpose(1, 2).reshape(images, tokens, -1), columns, b_proj)
