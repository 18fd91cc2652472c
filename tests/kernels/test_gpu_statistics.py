"""The CUDA kernels of the statistics on a device; skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from statistics_checks import DTYPES, check_moments, class_tokens_apart, error, exact_moments, pair
from tolerances import statistics_tolerance

import skd_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]


def compiled(name: str) -> Callable[..., Any]:
    """The compiled operation on CUDA, or skip."""
    if not kernels.build_info().get("cuda"):
        pytest.skip("the extension was built without CUDA")
    return getattr(torch.ops.skd_kernels, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [8, 13, 16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (997, 3), (25216, 36)])
def test_moments(tokens: int, groups: int, dims: int, dtype: torch.dtype) -> None:
    operation = compiled("token_moments")
    x, grad = (tensor.cuda() for tensor in pair(tokens, groups, dims, dtype=dtype))
    shift = torch.full((groups, dims), 0.4375, dtype=torch.float64, device="cuda")
    found = operation(x, grad, shift)
    check_moments(found, x, grad, shift)
    for first, second in zip(found, operation(x, grad, shift), strict=True):
        assert torch.equal(first, second)  # to the bit
    assert torch.equal(found[3], found[3].mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_views_and_of_nothing(dtype: torch.dtype) -> None:
    operation = compiled("token_moments")
    x, grad = (tensor.cuda() for tensor in pair(6, 500, 131, dtype=dtype))
    shift = torch.zeros(6, 64, dtype=torch.float64, device="cuda")
    for start in (0, 1):
        views = [tensor[..., start : start + 64].transpose(0, 1) for tensor in (x, grad)]
        for found, expected in zip(operation(*views, shift), exact_moments(*views, shift), strict=True):
            assert error(found, expected) < 1e-5
    for shape in [(0, 2, 8), (5, 0, 8), (5, 2, 0)]:
        empty = torch.zeros(shape, dtype=dtype, device="cuda")
        for found in operation(empty, empty, torch.zeros(shape[1:], dtype=torch.float64, device="cuda")):
            assert found.eq(0).all()
    with pytest.raises(RuntimeError, match="at most 128"):
        operation(x, grad, torch.zeros(500, 131, dtype=torch.float64, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("tokens", "dims"), [(0, 5), (5, 0), (1, 1), (997, 45), (25216, 3072), (200_000, 16)])
def test_taylor(tokens: int, dims: int, power: int, dtype: torch.dtype) -> None:
    operation = compiled("taylor_scores")
    x, grad = (tensor.cuda() for tensor in pair(tokens, dims, dtype=dtype))
    found = operation(x, grad, power)
    expected = (x.double() * grad.double()).abs().pow(power).sum(0)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)
    assert torch.equal(found, operation(x, grad, power))
    view = operation(x[::2, 1:], grad[::2, 1:], power)
    torch.testing.assert_close(
        view, (x[::2, 1:].double() * grad[::2, 1:].double()).abs().pow(power).sum(0), rtol=3e-6, atol=0
    )


def test_more_than_two_billion_elements() -> None:
    operation, scores = compiled("token_moments"), compiled("taylor_scores")
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of device memory")
    x = torch.zeros(2**21 + 5, 16, 64, dtype=torch.bfloat16, device="cuda")  # 2^31 and 5120 elements
    x[-1] = 2
    zero = torch.zeros(16, 64, dtype=torch.float64, device="cuda")
    weight, plain, _, outer = operation(x, x, zero)
    assert weight.eq(4).all() and plain.eq(2).all() and outer.eq(16).all()
    assert scores(x.flatten(1), x.flatten(1), 1).eq(4).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["reference", "compiled"])
def test_without_a_shift_moments_are_about_the_mean(implementation: str, dtype: torch.dtype) -> None:
    """Also where what some tokens are like says little of all; and `weighted_covariance` is summed about it."""
    if implementation == "compiled":
        compiled("token_moments")
    x, grad = (tensor.cuda() for tensor in pair(3000, 6, 64, dtype=dtype))
    x[:750] += 100
    with kernels.use(implementation):
        found, covariance = kernels.token_moments(x, grad), kernels.weighted_covariance(x, grad)
    mean, spread = x.double().mean(0), x.double().abs().mean(0)
    weight, _, _, outer = exact_moments(x, grad, mean)
    tolerance = statistics_tolerance(implementation, dtype, "cuda")
    assert ((found.shift - mean).abs() <= tolerance * spread).all()
    assert (found.plain_sum.abs() <= tolerance * len(x) * spread).all()
    assert error(found.weight, weight) <= tolerance
    assert error(covariance, outer) <= tolerance
    assert torch.equal(covariance, found.weighted_outer)


@pytest.mark.parametrize("batch", [2, 16, 31, 62, 93, 128])
def test_the_mean_of_class_tokens_stands_for_nothing_else(batch: int) -> None:
    compiled("token_moments")
    x, grad = (tensor.cuda() for tensor in class_tokens_apart(batch, 6, 64))
    outer = exact_moments(x, grad, x.double().mean(0))[3]
    # One of the tokens that are sampled may be a class token; of more, errors are thousands of times as large.
    tolerance = 50 * statistics_tolerance("compiled", x.dtype, "cuda")
    assert error(kernels.weighted_covariance(x, grad), outer) <= tolerance
