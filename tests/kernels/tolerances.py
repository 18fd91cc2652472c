"""The numerics policy of the tests: every tolerance against the float64 reference is made here."""

from __future__ import annotations

import torch

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


def kernel_tolerance(pytorch_error: float, dtype: torch.dtype, elements: int = 64) -> float:
    """Largest relative error (Frobenius norm) of a masked operation's kernels against the float64 reference.

    Twice what PyTorch itself makes in the same precision, since both round the same intermediate results and differ
    in the order of sums; and two roundings, for results that PyTorch happens to get exactly. The error of fewer than
    64 `elements` is a matter of luck, PyTorch's too: eight roundings, one for each stage of the backward pass. In
    float64 the reference has no better to be compared with: 1e-10, as for the statistics.
    """
    if dtype == torch.float64:
        return 1e-10
    return 2 * pytorch_error + (2 if elements >= 64 else 8) * UNIT_ROUNDOFF[dtype]
