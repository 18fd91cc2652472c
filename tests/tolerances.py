"""The numerics policy of the tests: every tolerance against the float64 reference is made here."""

from __future__ import annotations

import torch

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def statistics_tolerance(implementation: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """Largest relative error (Frobenius norm) of weighted moments and Taylor scores.

    The inputs are exact; what differs is the arithmetic.

    * reference: float64 throughout. Sums of T terms in another order differ by at most T u; 1e-10 is far above that
      for any T here.
    * compiled, float64: the same, in blocks.
    * compiled, other dtypes, CPU: the weight is a product, a sum of D terms, a division and a square root in float32,
      the staged value one more subtraction and product, the outer product a sum of at most 128 terms in float32:
      fewer than 16 roundings that do not average out, since sums of terms of one sign keep their relative error.
    * compiled, CUDA: the same, but sqrt(w) y is kept as two bfloat16 halves, 16 bits of significand together, twice
      in each product.
    """
    if implementation == "reference" or dtype == torch.float64:
        return 1e-10
    return 16 * UNIT_ROUNDOFF[torch.float32] if device == "cpu" else 2 * 2.0**-17
