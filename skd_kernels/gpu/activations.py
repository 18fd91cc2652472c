"""Activations and their derivatives, in registers and float32."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


@triton.jit
def activate(z, ACT: tl.constexpr):
    """(act(z), act'(z)); what the caller drops is not computed.

    All but the exact GELU are z sigmoid(p(z)), with derivative s + z s (1 - s) p'(z).
    """
    if ACT == "gelu":
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
