"""masked_mlp and masked_attention under torch.compile and torch.func, and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tolerances import FAST_GRADCHECK

import skd_kernels as kernels

B, N, C, H, D, HIDDEN = 2, 5, 8, 2, 4, 12


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


mlp, attention = kernels.masked_mlp, partial(kernels.masked_attention, num_heads=H)
CASES = {
    "mlp": (mlp, [randn(B, N, C), randn(HIDDEN, C), randn(HIDDEN), randn(C, HIDDEN), randn(C)], (HIDDEN,)),
    "attention": (attention, [randn(B, N, C), randn(3 * C, C), randn(3 * C), randn(C, C), randn(C)], (3, H, D)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor], tuple[int, ...]]:
    function, inputs, scores = CASES[request.param]
    return function, [tensor.clone().requires_grad_() for tensor in inputs], scores


@pytest.mark.parametrize("on_device", [False, True])
def test_scores_compile_as_one_graph(case: Any, on_device: bool) -> None:
    function, inputs, shape = case
    width = torch.tensor(3, dtype=torch.int32) if on_device else 3
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = torch.zeros(shape), torch.zeros(shape)
    for call, scores in ((compiled, found), (function, expected)):
        call(*inputs, width, scores=scores).square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.count_nonzero()


@pytest.mark.slow
def test_compiled_code_takes_width_zero_after_others(case: Any) -> None:
    function, inputs, _ = case
    torch._dynamo.reset()
    compiled = torch.compile(lambda width: function(*inputs, width))
    for width in (3, 0, 2):
        torch.testing.assert_close(compiled(width), function(*inputs, width))


def test_second_derivatives(case: Any) -> None:
    """The reference has those that the compiled attention says it has not."""
    function, inputs, _ = case
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with kernels.use("reference"):
        for width in (3, torch.tensor(3, dtype=torch.int32), 0):
            assert torch.autograd.gradgradcheck(
                lambda *tensors, w=width: function(*tensors, w), leaves, **FAST_GRADCHECK
            )


def test_forward_mode(case: Any) -> None:
    function, inputs, _ = case
    x, *rest = (tensor.detach().double() for tensor in inputs)
    step = 1e-6
    found = torch.func.jvp(lambda x: function(x, *rest, 3), (x,), (x,))[1]
    expected = (function(x * (1 + step), *rest, 3) - function(x * (1 - step), *rest, 3)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["slices", "reference"])
def test_width_zero_does_not_read_its_input(case: Any, implementation: str) -> None:
    function, inputs, _ = case
    x = inputs[0].detach().fill_(float("nan")).requires_grad_()
    for width in (0, torch.tensor(0, dtype=torch.int32)):
        with kernels.use(implementation):
            out = function(x, *inputs[1:], width)
        grads = torch.autograd.grad(out.sum(), [x, *inputs[1:]])
        assert out.eq(0).all() and all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("implementation", ["slices", "reference"])
def test_logits_beyond_the_range_of_float16(implementation: str) -> None:
    x = (40 * randn(1, 7, 64)).half()
    weights = torch.eye(64).half()
    inputs = [x, weights.repeat(3, 1), None, weights, None]
    with kernels.use(implementation):
        found = kernels.masked_attention(*inputs, 64, num_heads=1)
    assert torch.isfinite(found).all()
