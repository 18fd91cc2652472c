"""The tolerances are what their derivations say: the errors of real arithmetic are just below them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operations import Attention
from tolerances import UNIT_ROUNDOFF, kernel_tolerance, sum_error


@pytest.mark.parametrize("terms", [64, 768, 3072])
def test_sums_in_order_are_off_by_their_length(terms: int) -> None:
    """NumPy's cumulative sum adds one after the other, in float32."""
    products = np.random.default_rng(0).standard_normal((400, terms)).astype(np.float32)
    found = np.cumsum(products, axis=1, dtype=np.float32)[:, -1].astype(np.float64)
    exact = products.astype(np.float64).sum(1)
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert 0.3 * sum_error(terms) < error < sum_error(terms)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_exponentials_are_off_by_the_size_of_their_logits(scale: float) -> None:
    """A softmax in float32 of logits that are products with the scale, the logarithm of the sum subtracted."""
    generator = torch.Generator().manual_seed(0)
    products = 4 * torch.randn(2000, 100, generator=generator)
    logits = products * torch.tensor(scale)
    found = (logits - logits.logsumexp(-1, keepdim=True)).exp().double()
    exact = (products.double() * scale).softmax(-1)
    error = float((found - exact).norm() / exact.norm())
    logit = float(logits.abs().max())
    assert 0.01 * logit * UNIT_ROUNDOFF[torch.float32] < error < kernel_tolerance(0.0, torch.float32, logit=logit)


def test_half_precision_is_hardly_given_more() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        plain = kernel_tolerance(1e-3, dtype)
        assert kernel_tolerance(1e-3, dtype, terms=4304, logit=10.0) < 1.01 * plain
    # An operand of TensorFloat-32, cut off after 10 bits, is far outside.
    assert kernel_tolerance(1.6e-7, torch.float32, terms=4304) < 0.02 * 2.0**-10


def test_the_largest_logit_is_that_of_the_kept_coordinates() -> None:
    problem = Attention((2, 7, 12), full=4, heads=3, scale=20.0, dtype=torch.float64)
    inputs = problem.inputs()
    x, w_qkv, b_qkv, *_ = inputs.values()
    by_hand = 0.0
    for image in range(2):
        qkv = x[image] @ w_qkv.T + b_qkv
        for head in range(3):
            q, k = (qkv[:, part * 12 + head * 4 : part * 12 + head * 4 + 2] for part in (0, 1))
            by_hand = max(by_hand, float((20 * q @ k.T).abs().max()))
    assert problem.logit(inputs, 2) == pytest.approx(by_hand)
    assert problem.logit(inputs, 0) == 0.0
