"""The CUDA kernels of the statistics on a device; skipped, with the reason, where there is none."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from statistics_checks import DTYPES, check_results, class_tokens_apart, error, exact_moments, pair
from tolerances import statistics_tolerance

import skd_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]


def compiled(name: str) -> Callable[..., Any]:
    """The compiled operation on CUDA, or skip; where SKD_CUDA=on says that there must be one, fail."""
    if not kernels.build_info().get("cuda"):
        unless = pytest.fail if os.environ.get("SKD_CUDA") == "on" else pytest.skip
        unless("the extension was built without CUDA")
    return getattr(torch.ops.skd_kernels, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [8, 13, 16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (997, 3), (25216, 36)])
def test_moments(tokens: int, groups: int, dims: int, dtype: torch.dtype) -> None:
    about, centred = compiled("token_moments"), compiled("centred_moments")
    x, grad = (tensor.cuda() for tensor in pair(tokens, groups, dims, dtype=dtype))
    shift = torch.full((groups, dims), 0.1, dtype=torch.float64, device="cuda")
    for operation, given in ((about, (shift,)), (centred, ())):
        found = operation(x, grad, *given)
        check_results(found, x, grad, *given or (None,))
        for first, second in zip(found, operation(x, grad, *given), strict=True):
            assert torch.equal(first, second)  # to the bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_about_what_float32_does_not_hold(dtype: torch.dtype) -> None:
    """10000.1 is 4e-4 from the nearest float32, which is what the kernel subtracts."""
    x, grad = pair(997, 3, 64)
    x, grad = (x + 1e4).to("cuda", dtype), grad.to("cuda", dtype)
    shift = torch.full((3, 64), 10000.1, dtype=torch.float64, device="cuda")
    check_results(compiled("token_moments")(x, grad, shift), x, grad, shift)


@pytest.mark.parametrize("dims", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 7, 30, 31, 32, 61, 62, 63])
def test_moments_of_few_tokens(tokens: int, dims: int) -> None:
    """Fewer than the sample that stands in for the mean, as many, a few more."""
    x, grad = (tensor.cuda() for tensor in pair(tokens, 2, dims))
    check_results(compiled("centred_moments")(x, grad), x, grad, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_views_and_of_nothing(dtype: torch.dtype) -> None:
    about, centred = compiled("token_moments"), compiled("centred_moments")
    x, grad = (tensor.cuda() for tensor in pair(6, 500, 131, dtype=dtype))
    shift = torch.zeros(6, 64, dtype=torch.float64, device="cuda")
    for start in (0, 1):
        views = [tensor[..., start : start + 64].transpose(0, 1) for tensor in (x, grad)]
        check_results(about(*views, shift), *views, shift)
        check_results(centred(*views), *views, None)
    for shape in [(0, 2, 8), (5, 0, 8), (5, 2, 0)]:
        empty = torch.zeros(shape, dtype=dtype, device="cuda")
        point = torch.ones(shape[1:], dtype=torch.float64, device="cuda")
        for (count, found, *sums), expected in ((about(empty, empty, point), 1), (centred(empty, empty), 0)):
            assert float(count) == len(empty) and found.eq(expected).all()
            assert found.numel() == 0 or found.data_ptr() != point.data_ptr()
            assert all(result.eq(0).all() for result in sums)
    with pytest.raises(RuntimeError, match="at most 128"):
        about(x, grad, torch.zeros(500, 131, dtype=torch.float64, device="cuda"))


def test_moments_keep_nan_in_its_group() -> None:
    compiled("token_moments")
    x, grad = (tensor.cuda() for tensor in pair(100, 2, 40))
    for group, token, bad in itertools.product((0, 1), (23, 70), (torch.nan, torch.inf)):  # token 23 is in the sample
        one = x.clone()
        one[token, group, 3] = bad
        for shift in (None, torch.zeros(2, 40, dtype=torch.float64, device="cuda")):
            moments = kernels.token_moments(one, grad, shift)
            assert moments.shift.isfinite().sum() == 80 - (shift is None)
            for found in (moments.weight, moments.plain_sum, moments.weighted_sum, moments.weighted_outer):
                assert found[1 - group].isfinite().all() and not found[group].isfinite().all()


@pytest.mark.parametrize("shape", [(997, 3, 64), (25216, 36, 64), (4, 197, 6, 40)])
def test_a_call_launches_two_kernels(shape: tuple[int, ...]) -> None:
    """PyTorch's small kernels before and after ours would take as long as ours do."""
    compiled("token_moments")
    x, grad = (tensor.cuda() for tensor in pair(*shape, dtype=torch.bfloat16))
    shift = torch.zeros(shape[-2:], dtype=torch.float64, device="cuda")
    calls: list[Callable[[], Any]] = [
        lambda: kernels.token_moments(x, grad),
        lambda: kernels.token_moments(x, grad, shift),
        lambda: kernels.weighted_covariance(x, grad),
    ]
    for call in calls:
        call()  # whatever is done once
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        on_device.sort(key=lambda event: event.time_range.start)
        names = [event.name for event in on_device if "Sync" not in event.name]  # waiting is no work
        assert len(names) == 2 and "moments_of_block" in names[0] and "moments_of_group" in names[1], names


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


@pytest.mark.xdist_group("memory")
def test_more_than_two_billion_elements() -> None:
    operation, scores = compiled("token_moments"), compiled("taylor_scores")
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of device memory")
    x = torch.zeros(2**21 + 5, 16, 64, dtype=torch.bfloat16, device="cuda")  # 2^31 and 5120 elements
    x[-1] = 2
    zero = torch.zeros(16, 64, dtype=torch.float64, device="cuda")
    count, _, weight, plain, _, outer = operation(x, x, zero)
    assert float(count) == len(x)
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
