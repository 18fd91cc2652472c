"""The numerics policy of the tests: every tolerance against the float64 reference is made here."""

from __future__ import annotations

from typing import Any

import torch

# Options of torch.autograd.gradcheck: one random direction instead of every element, closer than by default, which
# allows more in this mode. An error of 1e-4 in one element of a gradient is found.
FAST_GRADCHECK: dict[str, Any] = {"fast_mode": True, "atol": 1e-8, "rtol": 1e-5}
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def statistics_tolerance(
    implementation: str, dtype: torch.dtype, device: str = "cpu", *, products: bool = False, alike: bool = False
) -> float:
    """Largest relative error (Frobenius norm) of weighted moments and Taylor scores.

    The inputs are exact; what differs is the arithmetic.

    * reference: float64 throughout. Sums of T terms in another order differ by at most T u; 1e-10 is far above that
      for any T here.
    * compiled, float64: the same, in blocks.
    * compiled, other dtypes, CPU: the weight is a product, a sum of D terms, a division and a square root in float32,
      the staged value one more subtraction and product: fewer than 16 roundings. The outer product is a sum of at
      most 128 terms in float32, whose roundings average out: 16 more. They need not where terms are `alike`, as those
      of a view of stride zero are: 127 more.
      Outer products (`products`) of bfloat16 input are of staged values rounded to bfloat16, where the processor has
      instructions for them: two roundings more, as in PyTorch's own products of that precision.
    * compiled, CUDA: the same, but sqrt(w) y is kept as two bfloat16 halves, 16 bits of significand together, twice
      in each product.
    """
    if implementation == "reference" or dtype == torch.float64:
        return 1e-10
    if device != "cpu":
        return 2 * 2.0**-17
    of_inputs = 2 * UNIT_ROUNDOFF[torch.bfloat16] if products and dtype == torch.bfloat16 else 0
    return of_inputs + (16 + (127 if alike else 16)) * UNIT_ROUNDOFF[torch.float32]


def sum_error(terms: int) -> float:
    """Relative error (root mean square) of a sum of `terms` products in float32, one after the other.

    The products are as often positive as negative, so the sum of the first i of them grows like sqrt(i). Each
    addition rounds it by at most u = 2^-24 of itself, by u / sqrt(3) in the root mean square, and roundings add up
    like a random walk: u / sqrt(3) sqrt(1 + 2 + ... + terms) / sqrt(terms) = u sqrt(terms / 6). A library that cuts
    the sum into pieces makes less.
    """
    return UNIT_ROUNDOFF[torch.float32] * (terms / 6) ** 0.5


def kernel_tolerance(
    pytorch_error: float, dtype: torch.dtype, elements: int = 64, *, terms: int = 0, logit: float = 0.0
) -> float:
    """Largest relative error (Frobenius norm) of a masked operation's kernels against the float64 reference.

    It is twice the error of PyTorch itself in the same precision, because both round the same intermediate results
    and differ only in the order of sums, plus two roundings, for results that PyTorch happens to get exactly. The
    error of fewer than 64 `elements` is a matter of luck, also for PyTorch: then it is eight roundings, one for each
    stage of the backward pass. In float64 there is no better reference: 1e-10, as for the statistics.

    Two terms that do not depend on PyTorch are added:

    * The kernels add up an element's products one after the other, in float32 whatever the `dtype`, `terms` of them
      at most. Three such sums lie between an input and a gradient, and their errors add up like a random walk:
      sqrt(3) `sum_error`.
    * The exponential of a logit is off by what the logit itself is off. Its product with the scale is rounded, so is
      the logarithm of the sum that is subtracted from it, which is as large: two roundings of the largest `logit`.
    """
    if dtype == torch.float64:
        return 1e-10
    of_float32 = 3**0.5 * sum_error(terms) + 2 * logit * UNIT_ROUNDOFF[torch.float32]
    return 2 * pytorch_error + (2 if elements >= 64 else 8) * UNIT_ROUNDOFF[dtype] + of_float32
