"""token_moments, weighted_covariance and taylor_scores against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from tolerances import statistics_tolerance

import skd_kernels as kernels


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return draw[0], draw[1]


def covariance_by_loops(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """METHOD 1, one token and one group at a time."""
    groups, dims = x.shape[-2:]
    x, grad = x.reshape(-1, groups, dims).double(), grad.reshape(-1, groups, dims).double()
    result = torch.zeros(groups, dims, dims, dtype=torch.float64)
    for group in range(groups):
        mean = x[:, group].mean(0)
        for token in range(len(x)):
            centred = x[token, group] - mean
            weight = (x[token, group] * grad[token, group]).abs().mean()
            result[group] += weight * torch.outer(centred, centred)
    return result


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 4),
    dims=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_covariance_is_its_definition(batch: int, tokens: int, groups: int, dims: int, seed: int) -> None:
    x, grad = pair(batch, tokens, groups, dims, seed=seed)
    torch.testing.assert_close(
        kernels.weighted_covariance(x, grad), covariance_by_loops(x, grad), rtol=1e-10, atol=1e-12
    )


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STATISTICS = {
    "weighted_covariance": kernels.weighted_covariance,
    "moments about a shift": lambda x, g: kernels.token_moments(x, g, torch.ones(x.shape[-2:])).weighted_outer,
    "weight": lambda x, g: kernels.token_moments(x, g).weight,
    "weighted_sum": lambda x, g: kernels.token_moments(x, g, torch.ones(x.shape[-2:])).weighted_sum,
    "plain_sum": lambda x, g: kernels.token_moments(x, g, torch.ones(x.shape[-2:])).plain_sum,
    "taylor_scores": lambda x, g: kernels.taylor_scores(x, g),
    "squared taylor_scores": lambda x, g: kernels.taylor_scores(x, g, power=2),
}
PRODUCTS = ("weighted_covariance", "moments about a shift")
IMPLEMENTATIONS = tuple(kernels.build_info()["implementations"]["token_moments"])
assert set(IMPLEMENTATIONS) == set(kernels.build_info()["implementations"]["taylor_scores"])


def check_statistic(name: str, x: torch.Tensor, grad: torch.Tensor, implementation: str) -> None:
    """Against float64, by the policy of tolerances.py; and the same bits again."""
    with kernels.use("reference"):
        expected = STATISTICS[name](x.double(), grad.double())
    with kernels.use(implementation):
        found = STATISTICS[name](x, grad)
        again = STATISTICS[name](x, grad)
    assert found.dtype == torch.float64 and torch.equal(found, again)
    scale = expected.norm()
    if name == "weighted_covariance":  # centred: what cancels is as large as the moment itself
        scale = scale + x.double().square().sum() * 1e-2
    alike = any(
        step == 0 < size - 1 for tensor in (x, grad) for step, size in zip(tensor.stride(), x.shape, strict=True)
    )
    tolerance = statistics_tolerance(implementation, x.dtype, products=name in PRODUCTS, alike=alike)
    assert (found - expected).norm() <= tolerance * scale, (name, x.shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STATISTICS)
def test_every_layout(name: str, layout: str, dtype: torch.dtype, implementation: str) -> None:
    for shape in ((3, 5, 2, 8), (2, 150, 3, 16), (1, 1, 1, 1), (7, 1, 5, 13), (2, 3, 1, 128), (0, 4, 2, 8)):
        x, grad = (LAYOUTS[layout](tensor + 3).to(dtype) for tensor in pair(*shape))
        check_statistic(name, x, grad, implementation)


@st.composite
def statistics_inputs(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, grad) of any shape, dtype, order of dimensions, step along each and offset; some tokens without weight."""
    shape = draw(st.tuples(st.integers(0, 300), st.integers(1, 5), st.integers(1, 130)))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    tensors = []
    for tensor in pair(*shape, seed=seed):
        steps, order = draw(st.tuples(*[st.integers(1, 3)] * 3)), draw(st.permutations(range(3)))
        sizes = [size * step for size, step in zip(shape, steps, strict=True)]
        offset = draw(st.integers(0, 3))
        memory = torch.full((offset + math.prod(sizes),), float("nan"), dtype=dtype)  # between and before: not read
        whole = (
            memory[offset:].reshape([sizes[axis] for axis in order]).permute([order.index(axis) for axis in range(3)])
        )
        view = whole[:: steps[0], :: steps[1], :: steps[2]]
        tensors.append(view.copy_(tensor + 3))
    x, grad = tensors
    grad[draw(st.integers(0, 3)) :: draw(st.integers(1, 4))] = 0
    return x, grad


@settings(max_examples=60, deadline=None)
@given(inputs=statistics_inputs(), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_any_shape_and_stride(inputs: tuple[torch.Tensor, torch.Tensor], implementation: str) -> None:
    for name in STATISTICS:
        check_statistic(name, *inputs, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_propagate(dtype: torch.dtype, implementation: str) -> None:
    for bad in (float("nan"), float("inf")):
        x, grad = pair(200, 3, 8, dtype=dtype)
        x[130, 1, 5] = bad
        with kernels.use(implementation):
            moments = kernels.token_moments(x, grad)
            scores = kernels.taylor_scores(x.flatten(1), grad.flatten(1))
        assert not moments.weight[1].isfinite() and moments.weight[[0, 2]].isfinite().all()
        assert not moments.covariance()[1].isfinite().all() and moments.covariance()[[0, 2]].isfinite().all()
        assert not scores[13].isfinite() and scores.isfinite().sum() == 23


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_of_small_products_do_not_underflow(dtype: torch.dtype, implementation: str) -> None:
    """1e-15 times 1e-15, squared, is below the smallest float32."""
    x, grad = (1e-15 * tensor.double() for tensor in pair(200, 8))
    with kernels.use(implementation):
        found = kernels.taylor_scores(x.to(dtype), grad.to(dtype), power=2)
    expected = (x.to(dtype).double() * grad.to(dtype).double()).square().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    x, grad = pair(9000, 5, 24, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            moments = kernels.token_moments(x, grad)
            results.append((moments.weighted_outer, kernels.taylor_scores(x.flatten(1), grad.flatten(1))))
    finally:
        torch.set_num_threads(before)
    for outer, scores in results[1:]:
        assert torch.equal(outer, results[0][0]) and torch.equal(scores, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, grad = pair(6, 3, 8, dtype=dtype)
    shift = torch.zeros(3, 8, dtype=torch.float64)
    torch.library.opcheck(torch.ops.skd_kernels.token_moments.default, (x, grad, shift))
    torch.library.opcheck(torch.ops.skd_kernels.centred_moments.default, (x, grad))
    torch.library.opcheck(torch.ops.skd_kernels.taylor_scores.default, (x[:, 0], grad[:, 0], 1))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Counts need 64 bits: a zero-stride view has 2.2e9 elements without their memory."""
    row, grad = pair(1, 1, 64, dtype=torch.float32)
    tokens = 34_000_000
    x, g = row.expand(tokens, 1, 64), grad.expand(tokens, 1, 64)
    found = kernels.token_moments(x, g, torch.zeros(1, 64))
    one = kernels.token_moments(row, grad, torch.zeros(1, 64))
    torch.testing.assert_close(found.weighted_outer, tokens * one.weighted_outer, rtol=1e-5, atol=0)
    big = torch.zeros(2**31 + 4096, dtype=torch.bfloat16).reshape(-1, 4096)
    big[-1] = 1
    assert kernels.taylor_scores(big, big).eq(1).all()


def test_offsets_beyond_two_to_the_31() -> None:
    """Tokens that are 2^30 elements apart, in memory of which nothing else is touched."""
    memory = torch.empty(2**31 + 256, dtype=torch.bfloat16)
    x = memory.as_strided((3, 2, 64), (2**30, 128, 1))
    x.copy_(pair(3, 2, 64, dtype=torch.bfloat16)[0])
    grad = pair(3, 2, 64, dtype=torch.bfloat16)[1]
    assert torch.equal(kernels.weighted_covariance(x, grad), kernels.weighted_covariance(x.clone(), grad))
    assert torch.equal(
        kernels.taylor_scores(x[:, 1], x[:, 1]), kernels.taylor_scores(x[:, 1].clone(), x[:, 1].clone())
    )


@pytest.mark.parametrize("function", [kernels.weighted_covariance, kernels.taylor_scores])
def test_statistics_gradcheck(function: Any) -> None:
    x, grad = (tensor.requires_grad_() for tensor in pair(5, 2, 4))
    assert torch.autograd.gradcheck(function, (x, grad))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_taylor_scores_are_their_definition(power: int, dtype: torch.dtype) -> None:
    x, grad = pair(3, 5, 7, dtype=dtype)
    expected = sum((x[b, n].double() * grad[b, n].double()).abs() ** power for b in range(3) for n in range(5))
    tolerance = statistics_tolerance("compiled", dtype)
    torch.testing.assert_close(kernels.taylor_scores(x, grad, power=power), expected, rtol=tolerance, atol=0)


def test_taylor_scores_of_nothing_are_zero() -> None:
    assert kernels.taylor_scores(torch.zeros(0, 3), torch.zeros(0, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: kernels.taylor_scores(torch.zeros(2, 3), torch.zeros(2, 4)), "grad has shape"),
        (lambda: kernels.taylor_scores(torch.zeros(2, 3), torch.zeros(2, 3).double()), "grad is torch.float64"),
        (lambda: kernels.taylor_scores(torch.zeros(2, 3), torch.zeros(2, 3, device="meta")), "on meta"),
        (lambda: kernels.token_moments(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")), "on meta"),
        (lambda: kernels.taylor_scores(torch.zeros(2, 3).long(), torch.zeros(2, 3).long()), "x has dtype"),
        (lambda: kernels.taylor_scores(torch.zeros(2, 3), torch.zeros(2, 3), power=3), "power is 3"),
        (lambda: kernels.taylor_scores(torch.tensor(1.0), torch.tensor(1.0)), "no dimension"),
        (lambda: kernels.token_moments(torch.zeros(3), torch.zeros(3)), r"\(\.\.\., G, D\)"),
        (
            lambda: kernels.token_moments(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(4)),
            "shift has shape",
        ),
        (
            lambda: kernels.token_moments(*torch.zeros(2, 3, 2, 4), torch.zeros(2, 4, device="meta")),
            "shift is on meta",
        ),
        (lambda: kernels.taylor_scores(torch.zeros(2, 3), torch.zeros(2, 3), power=1.0), "power is 1.0"),
        (lambda: kernels.taylor_scores(*[torch.zeros(2, 3).to_sparse()] * 2), "must be a dense tensor"),
        (lambda: kernels.weighted_covariance(None, torch.zeros(3, 2, 4)), "x is a NoneType"),
    ],
)
def test_statistics_reject(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
