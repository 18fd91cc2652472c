"""The other ways to compute what skd_kernels computes, which ours are timed against.

eager           whole tensors; of a statistic in the input's dtype, sums in float32 (of float64 in float64)
blocked         a statistic in blocks of tokens that stay in the cache of a CPU: the best PyTorch we found there
slices          a masked layer as good plain PyTorch: leading rows and columns of the weights, library attention
published       the published implementation's way, the same to rounding: a statistic of cloned features and centred
                copies in a Python loop over q, k, v and heads; a masked layer of weights gathered by boolean masks
torch.compile   the eager function, or the one on slices, compiled

registry.py says which operation has which of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import BACKEND

Tensor = torch.Tensor

EAGER, BLOCKED, SLICES, PUBLISHED, COMPILED = "eager", "blocked", "slices", "published", "torch.compile"
BLOCK_TOKENS = 256  # of the covariance: 64 to 512 are within 20 %
BLOCK_ELEMENTS = 128 * 1024  # of the scores: fits the second-level cache with its gradients


class Compiled:
    """`function` under torch.compile.

    Args:
        dynamic: ints and sizes may change without another compilation.

    Attributes:
        compilations: how often a graph was compiled; the first is one of them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        dynamic: bool = True,
        fullgraph: bool = False,
        backend: str = BACKEND,
    ) -> None:
        self.compilations = 0
        self.backend = backend
        self.call = torch.compile(function, dynamic=dynamic, fullgraph=fullgraph, backend=self._compile)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        self.compilations += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.call(*arguments, **named)

    @property
    def limited(self) -> bool:
        """PyTorch stopped compiling, and runs other sizes eagerly."""
        return self.compilations >= torch._dynamo.config.recompile_limit


# Statistics: (x, grad), one tensor ----------------------------------------------------------------


def sums_in(x: Tensor) -> torch.dtype:
    """float32, or what is wider."""
    return torch.promote_types(x.dtype, torch.float32)


# Weighted covariance of (T, G, D), from the token moments: sum over tokens of w (x - mean)(x - mean)^T with
# w = mean_d |x grad|; (G, D, D).


def covariance_eager(x: Tensor, grad: Tensor) -> Tensor:
    weight = (x * grad).abs_().mean(-1, keepdim=True, dtype=sums_in(x))
    mean = x.mean(0, dtype=sums_in(x)).to(x.dtype)
    scaled = ((x - mean) * weight.sqrt().to(x.dtype)).transpose(0, 1)
    return scaled.mT @ scaled


def covariance_blocked(x: Tensor, grad: Tensor) -> Tensor:
    _, groups, dims = x.shape
    mean = x.mean(0, dtype=sums_in(x))
    total = mean.new_zeros(groups, dims, dims)
    for part, part_grad in zip(x.split(BLOCK_TOKENS), grad.split(BLOCK_TOKENS), strict=True):
        part = part.to(mean.dtype)
        weight = (part * part_grad).abs_().mean(-1, keepdim=True)
        scaled = (part - mean).mul_(weight.sqrt_()).transpose(0, 1)
        total.baddbmm_(scaled.mT, scaled)
    return total


def covariance_published(x: Tensor, grad: Tensor) -> Tensor:
    feature, gradient = x.clone(), grad.clone()
    covariances = []
    for group in range(x.shape[1]):
        head, head_grad = feature[:, group], gradient[:, group]
        weight = (head * head_grad).abs().mean(-1, keepdim=True)
        centred = head - head.mean(0, keepdim=True)
        covariances.append((weight * centred).T @ centred)
    return torch.stack(covariances)


# Taylor scores of (T, D): sum over tokens of |x grad|; (D,).


def scores_eager(x: Tensor, grad: Tensor) -> Tensor:
    return (x * grad).abs().sum(0, dtype=sums_in(x))


def scores_blocked(x: Tensor, grad: Tensor) -> Tensor:
    tokens = max(1, BLOCK_ELEMENTS // x.shape[1])
    total = torch.zeros(x.shape[1], dtype=sums_in(x), device=x.device)
    for part, part_grad in zip(x.split(tokens), grad.split(tokens), strict=True):
        total += (part * part_grad).abs_().sum(0, dtype=total.dtype)
    return total


def scores_published(x: Tensor, grad: Tensor) -> Tensor:
    feature, gradient = x.clone(), grad.clone()
    return (feature * gradient).abs().sum(0)


# Masked layers on slices --------------------------------------------------------------------------


def mlp_slices(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, width: int) -> Tensor:
    """As `skd_kernels.masked_mlp`."""
    return F.linear(F.gelu(F.linear(x, w1[:width], b1[:width])), w2[:, :width], b2)


def attention_slices(
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


# Masked layers as published -----------------------------------------------------------------------

# Boolean masks, made on the host for every call and copied to the device, gather the kept rows and columns of the
# weights. Softmax attention is written out.


def mlp_published(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, width: int) -> Tensor:
    """As `skd_kernels.masked_mlp`."""
    mask = torch.zeros(len(b1), dtype=torch.bool)
    mask[:width] = True
    mask = mask.to(x.device)
    return F.linear(F.gelu(F.linear(x, w1[mask], b1[mask])), w2[:, mask], b2)


def attention_published(
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


# Residual sum and norm ----------------------------------------------------------------------------


def norm_eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, ``F.layer_norm`` and the conversion for the next linear layer, as PyTorch's own kernels."""
    total = x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(branch.dtype)
