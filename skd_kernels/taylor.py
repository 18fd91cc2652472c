"""Taylor scores: how much the cost would change, to first order, if one coordinate were removed."""

from __future__ import annotations

from typing import Protocol

import torch

from skd_kernels._autograd import Context
from skd_kernels._checks import check_pair
from skd_kernels._dispatch import always, operation
from skd_kernels._native import refuses_statistics, rows


def taylor_scores(x: torch.Tensor, grad: torch.Tensor, power: int = 1) -> torch.Tensor:
    """Sum over all leading dimensions of ``|x * grad| ** power``.

    With power 1 the first-order Taylor importance of METHOD 2 (Molchanov et al., 2017, arXiv 1611.06440);
    with power 2 twice the diagonal-Hessian (Fisher) importance ``1/2 (x * grad)^2``.

    Args:
        x: features, (..., D), any floating dtype.
        grad: gradient of the cost at `x`, same shape, dtype and device.
        power: 1 or 2.

    Returns:
        (D,) float64, accumulated in float64, so squares of half-precision values do not underflow.
        Zeros for an empty batch. NaN and Inf propagate. Differentiable in both arguments.

    Raises:
        ValueError: wrong shape, dtype, device or power.
    """
    check_pair(x, grad)
    if x.ndim < 1:
        raise ValueError("x has no dimension; it must have shape (..., D)")
    if not isinstance(power, int) or isinstance(power, bool) or power not in (1, 2):
        raise ValueError(f"power is {power!r}; it may be 1 or 2")
    return _operation(x=x, grad=grad, power=power)


_operation = operation(taylor_scores)


@_operation.implementation("compiled", refuses_statistics)
def taylor_scores_compiled(x: torch.Tensor, grad: torch.Tensor, power: int) -> torch.Tensor:
    """csrc/taylor_cpu.cpp, csrc/taylor_cuda.cu: one pass; float32 over a few tokens, float64 across."""
    scores: torch.Tensor = torch.ops.skd_kernels.taylor_scores.default(rows(x, 1), rows(grad, 1), power)
    return scores


@_operation.implementation("reference", always)
def taylor_scores_reference(x: torch.Tensor, grad: torch.Tensor, power: int) -> torch.Tensor:
    product = (x.double() * grad.double()).reshape(x.shape[:-1].numel(), x.shape[-1])
    return (product.abs() if power == 1 else product.square()).sum(0)


class _ScoresContext(Context, Protocol):
    scores: torch.Tensor


class AddTaylorScores(torch.autograd.Function):
    """Identity whose backward adds the Taylor scores of its input to a buffer ("scores for free")."""

    @staticmethod
    def forward(ctx: _ScoresContext, h: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        ctx.scores = scores
        return h.view_as(h)

    @staticmethod
    def backward(ctx: _ScoresContext, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (h,) = ctx.saved_tensors
        (grad,) = grads
        scores = ctx.scores
        tokens = h.detach().reshape(-1, scores.numel())
        # Not the public function: torch.compile cannot trace its checks here, and they cannot fail.
        added = _operation(x=tokens, grad=grad.detach().reshape(tokens.shape).to(tokens.dtype), power=1)
        scores.add_(added.reshape(scores.shape).to(scores.dtype))
        return grad, None


def with_taylor_scores(h: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    """`h`, recorded so that a backward pass adds sum over tokens of ``|h * dh|`` to `scores`."""
    if scores is None or scores.numel() == 0 or not (torch.is_grad_enabled() and h.requires_grad):
        return h
    result: torch.Tensor = AddTaylorScores.apply(h, scores)
    return result
