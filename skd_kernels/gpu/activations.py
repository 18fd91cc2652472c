"""Activations and their derivatives, computed on float32 tiles in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.entry import INTERPRETED

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")

# Triton's interpreter cannot run inline assembly.
INSTRUCTIONS: tl.constexpr = tl.constexpr(not INTERPRETED)


def in_kernel(act: str, dtype: torch.dtype) -> str:
    """The name by which the kernels know `act`: in half precision the exact GELU has a form of its own."""
    return "gelu_half" if act == "gelu" and dtype != torch.float32 else act


@triton.jit
def power_of_two(x):
    """2 ** x in one instruction that flushes subnormal results to zero; ``tl.exp2`` takes three, to keep them."""
    if INSTRUCTIONS:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, with an error of one unit in the last place; a division takes ten instructions."""
    if INSTRUCTIONS:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def activate(z, ACT: tl.constexpr):
    """(act(z), act'(z)); if the caller ignores one of the two, the compiler removes its computation.

    Every activation but the exact GELU in float32 has the form act(z) = z s with s = 1 / (1 + 2^(z p(z))). Its
    derivative is act'(z) = s + z s (1 - s) q(z), where q(z) = -ln(2) d(z p(z))/dz.

    For the exact GELU in half precision s approximates the normal distribution function. Its p and q are even
    functions, each replaced by a polynomial of fourth degree in z^2, which was fitted (minimax, by linear
    programming) on |z| <= 5 and is constant beyond. The relative error of the value is at most 6e-4 for z >= -4, its
    absolute error at most 7e-5 everywhere; that of the derivative is at most 3e-4, a fraction of bfloat16's roundoff.
    """
    if ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        if ACT == "gelu_half":
            t = tl.minimum(z * z, 25.0)
            p = -2.30007674 + t * (-0.10751079 + t * (0.0010519193 + t * (1.29836559e-05 + t * -5.89196135e-07)))
            q = 1.59265056 + t * (0.224648452 + t * (-0.00381871992 + t * (-5.48481738e-05 + t * 3.61991158e-06)))
        elif ACT == "gelu_tanh":  # 0.5 (1 + tanh(u)) is sigmoid(2 u)
            t = z * z
            p = -2.302208198 - 0.1029432397 * t
            q = 1.5957691216057308 + 0.21406444881479867 * t
        elif ACT == "quick_gelu":
            p = -2.4554669596
            q = 1.702
        else:
            tl.static_assert(ACT == "silu")
            p = -1.4426950408889634
            q = 1.0
        s = reciprocal(1.0 + power_of_two(z * p))
        value = z * s
        return value, s + (value - value * s) * q
