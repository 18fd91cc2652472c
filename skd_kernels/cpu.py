"""Autograd of the compiled CPU operations that the masked layers use: csrc/gelu_cpu.cpp, csrc/attention_cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from skd_kernels import _native
from skd_kernels._dispatch import TensorSpec
from skd_kernels.gpu.entry import after_autocast


def refuses_compiled(*tensors: TensorSpec | None) -> str | None:
    """Whether the kernels take these features and parameters: None, or why not."""
    if torch.compiler.is_compiling():
        return "torch.compile generates code of its own"
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.device != "cpu":
            return f"there is no kernel for {tensor.device}"
        if after_autocast(tensor.dtype, "cpu") != torch.float32:
            return f"there is no kernel for {after_autocast(tensor.dtype, 'cpu')}"
        if 0 in tensor.shape:
            return f"a tensor of shape {tensor.shape} is empty"
    return None if _native.module() is not None else _native.failure()


class Gelu(torch.autograd.Function):
    """``F.gelu(z)`` of z (..., D) float32; going back, adds the sum over tokens of ``|h dh|`` to `scores` (D,)."""

    @staticmethod
    def forward(z: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        h: torch.Tensor = torch.ops.skd_kernels.gelu.default(z.contiguous())
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        z, ctx.scores = inputs
        ctx.save_for_backward(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (z,) = ctx.saved_tensors
        flat = z.flatten(0, -2).contiguous()
        scored = ctx.scores is not None
        dz, added = torch.ops.skd_kernels.gelu_backward.default(flat, grad.reshape(flat.shape).contiguous(), scored)
        if scored:
            ctx.scores.add_(added.to(ctx.scores.dtype))
        return dz.reshape(z.shape), None


class Attention(torch.autograd.Function):
    """softmax(scale q k^T) v of qkv (B, N, 3, H, D) float32: (B, N, H, D)."""

    @staticmethod
    def forward(qkv: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = torch.ops.skd_kernels.attention.default(qkv.contiguous(), scale)
        return out, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        qkv, ctx.scale = inputs
        out, sums = output
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, out, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, None]:
        if grad is None:
            return None, None
        qkv, out, sums = ctx.saved_tensors
        found: torch.Tensor = torch.ops.skd_kernels.attention_backward.default(
            grad.contiguous(), qkv.contiguous(), out, sums, ctx.scale
        )
        return found, None


def gelu(z: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    """As `Gelu`."""
    result: torch.Tensor = Gelu.apply(z, scores)
    return result


def attention(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """As `Attention`."""
    result: torch.Tensor = Attention.apply(qkv, scale)[0]
    return result
