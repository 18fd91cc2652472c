"""Every registered operation, every implementation that runs here, dtype and layout, against the float64 reference.

An operation or an implementation that is added to the registry is tested here without being named, or fails
`test_every_operation_has_its_cases`. The statistics have theirs in test_statistics_operations.py, the Triton
kernels in the interpreted tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_statistics_operations as statistics
import torch
from layouts import LAYOUTS
from tolerances import kernel_tolerance

import skd_kernels as kernels

Inputs = list[torch.Tensor]
REGISTRY = kernels.build_info()["implementations"]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def draw(*shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=generator, dtype=torch.float64) / math.sqrt(max(s[-1], 1)) for s in shapes]


def mlps() -> Iterator[tuple[Inputs, int, dict[str, Any]]]:
    """Inputs, a width, and what else the call takes: several images, none, one token, odd sizes, full and empty."""
    for batch, tokens, channels, hidden, width in (
        (2, 67, 24, 40, 16),
        (0, 5, 8, 16, 8),
        (3, 1, 13, 7, 3),
        (1, 5, 8, 9, 0),
    ):
        yield (
            draw((batch, tokens, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,)),
            width,
            {},
        )
    yield draw((2, 9, 8), (32, 8), (32,), (8, 16), (8,)), 5, {"gated": True, "act": "silu"}


def attentions() -> Iterator[tuple[Inputs, int, dict[str, Any]]]:
    """As `mlps`, heads of 8 to 128 coordinates."""
    for batch, tokens, channels, heads, dims, width in (
        (2, 67, 24, 3, 8, 8),
        (1, 130, 16, 2, 64, 40),
        (2, 9, 16, 1, 128, 128),
        (0, 5, 8, 2, 8, 4),
        (3, 2, 13, 3, 7, 5),
        (1, 5, 8, 2, 8, 0),
    ):
        inner = heads * dims
        shapes = (batch, tokens, channels), (3 * inner, channels), (3 * inner,), (channels, inner), (channels,)
        yield draw(*shapes), width, {"num_heads": heads}


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], Any]]] = {
    "masked_mlp": (kernels.masked_mlp, mlps),
    "masked_attention": (kernels.masked_attention, attentions),
}


def test_every_operation_has_its_cases() -> None:
    assert set(REGISTRY) == set(CASES) | {"token_moments", "taylor_scores"}
    assert set(statistics.IMPLEMENTATIONS) == {*REGISTRY["token_moments"], *REGISTRY["taylor_scores"]}


def results(name: str, call: Any, inputs: Inputs, width: int, options: dict[str, Any]) -> Inputs:
    """The value, and the gradients of all inputs."""
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with kernels.use(name):
        out = call(*leaves, width, **options)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "implementation"), [(op, name) for op in CASES for name in REGISTRY[op]])
def test_masked(operation: str, implementation: str, dtype: torch.dtype, layout: str) -> None:
    call, cases = CASES[operation]
    ran = 0
    for inputs, width, options in cases():
        laid_out = [LAYOUTS[layout](t.to(dtype)) if t.ndim > 1 and t.numel() else t.to(dtype) for t in inputs]
        with kernels.use(implementation):
            try:
                kernels.explain(operation, *laid_out, width, **options)
            except ValueError as refusal:
                assert "no implementation accepts this call" in str(refusal)
                continue
        ran += 1
        expected, plain, found = (
            results(name, call, [tensor.detach().to(to) for tensor in laid_out], width, options)
            for name, to in (("reference", torch.float64), ("reference", dtype), (implementation, dtype))
        )
        for exact, other, own in zip(expected, plain, found, strict=True):
            assert own.dtype == dtype and own.shape == exact.shape
            norm = exact.norm()
            rounding = float((other.double() - exact).norm() / norm) if norm > 0 else 0.0
            tolerance = kernel_tolerance(rounding, dtype, int(exact.count_nonzero()))
            assert (own.double() - exact).norm() <= tolerance * norm, (own.shape, width, options)
    if not ran:
        pytest.skip(f"{implementation} refuses all of this on the CPU")
