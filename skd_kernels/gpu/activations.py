"""Activations and their derivatives, in registers and float32."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def in_kernel(act: str, dtype: torch.dtype) -> str:
    """The name by which the kernels know `act`: in half precision the exact GELU has a form of its own."""
    return "gelu_half" if act == "gelu" and dtype != torch.float32 else act


@triton.jit
def activate(z, ACT: tl.constexpr):
    """(act(z), act'(z)); what the caller drops is not computed.

    All but the exact GELU are z sigmoid(p(z)), with derivative s + z s (1 - s) p'(z).

    "gelu_half" writes the normal distribution's tail as exp(-z^2 / 2) times a polynomial in t = 1 / (1 + p |z|), as
    Abramowitz and Stegun 7.1.26 do, but fitted for the relative error: 2e-5 for every z above -8.5, far below the
    roundoff of half precision. The derivative needs the same exponential, and with erf its kernel would spill.
    """
    if ACT == "gelu_half":
        bell = tl.exp(-0.5 * z * z)
        t = 1.0 / (1.0 + 0.3676955262170047 * tl.abs(z))
        tail = 0.22249517 + t * -0.09359554
        tail = 0.06587974 + t * tail
        tail = 0.15956056 + t * tail
        tail = 0.14565433 + t * tail
        tail = tail * t * bell
        cdf = tl.where(z < 0.0, tail, 1.0 - tail)
        return z * cdf, cdf + z * bell * 0.3989422804014327
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == "gelu_tanh":  # 0.5 (1 + tanh(u)) is sigmoid(2 u)
        square = z * z
        s = tl.sigmoid(z * (1.5957691216057308 + 0.07135481627159956 * square))
        return z * s, s + z * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881479867 * square)
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * z)
        return z * s, s + 1.702 * z * s * (1.0 - s)
    else:
        tl.static_assert(ACT == "silu")
        s = tl.sigmoid(z)
        return z * s, s + z * s * (1.0 - s)
