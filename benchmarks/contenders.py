"""The ways to compute the two statistics that are timed against each other. All take (x, grad), return one tensor.

eager       whole tensors, in the input's dtype, sums in float32 (of float64 in float64)
blocked     the same in blocks of tokens that stay in the cache of a CPU: the best PyTorch we found there
published   the published implementation's way: cloned features, centred copies, a Python loop over q, k, v and heads
ours        `skd_kernels`, by the implementation it chooses itself
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from skd_kernels import taylor_scores, weighted_covariance

Contender = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

BLOCK_TOKENS = 256  # of the covariance: 64 to 512 are within 20 %
BLOCK_ELEMENTS = 128 * 1024  # of the scores: fits the second-level cache with its gradients


def sums_in(x: torch.Tensor) -> torch.dtype:
    """float32, or what is wider."""
    return torch.promote_types(x.dtype, torch.float32)


# Weighted covariance of (T, G, D): sum over tokens of w (x - mean)(x - mean)^T with w = mean_d |x grad|; (G, D, D).


def covariance_eager(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    weight = (x * grad).abs_().mean(-1, keepdim=True, dtype=sums_in(x))
    mean = x.mean(0, dtype=sums_in(x)).to(x.dtype)
    scaled = ((x - mean) * weight.sqrt().to(x.dtype)).transpose(0, 1)
    return scaled.mT @ scaled


def covariance_blocked(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    _, groups, dims = x.shape
    mean = x.mean(0, dtype=sums_in(x))
    total = mean.new_zeros(groups, dims, dims)
    for part, part_grad in zip(x.split(BLOCK_TOKENS), grad.split(BLOCK_TOKENS), strict=True):
        part = part.to(mean.dtype)
        weight = (part * part_grad).abs_().mean(-1, keepdim=True)
        scaled = (part - mean).mul_(weight.sqrt_()).transpose(0, 1)
        total.baddbmm_(scaled.mT, scaled)
    return total


def covariance_published(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    feature, gradient = x.clone(), grad.clone()
    covariances = []
    for group in range(x.shape[1]):
        head, head_grad = feature[:, group], gradient[:, group]
        weight = (head * head_grad).abs().mean(-1, keepdim=True)
        centred = head - head.mean(0, keepdim=True)
        covariances.append((weight * centred).T @ centred)
    return torch.stack(covariances)


def covariance_ours(first: torch.Tensor) -> Contender:
    return weighted_covariance


# Taylor scores of (T, D): sum over tokens of |x grad|; (D,).


def scores_eager(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return (x * grad).abs().sum(0, dtype=sums_in(x))


def scores_blocked(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    tokens = max(1, BLOCK_ELEMENTS // x.shape[1])
    total = torch.zeros(x.shape[1], dtype=sums_in(x), device=x.device)
    for part, part_grad in zip(x.split(tokens), grad.split(tokens), strict=True):
        total += (part * part_grad).abs_().sum(0, dtype=total.dtype)
    return total


def scores_published(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    feature, gradient = x.clone(), grad.clone()
    return (feature * gradient).abs().sum(0)


def scores_ours(first: torch.Tensor) -> Contender:
    return taylor_scores
