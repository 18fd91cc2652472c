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

Inputs = dict[str, torch.Tensor]
REGISTRY = kernels.build_info()["implementations"]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def draw(**shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes.values())))
    return {
        name: torch.randn(s, generator=generator, dtype=torch.float64) / math.sqrt(max(s[-1], 1))
        for name, s in shapes.items()
    }


def mlps() -> Iterator[tuple[Inputs, dict[str, Any]]]:
    """Inputs, and what else the call takes: several images, none, one token, odd sizes, full and empty."""
    for batch, tokens, channels, hidden, width in (
        (2, 67, 24, 40, 16),
        (0, 5, 8, 16, 8),
        (3, 1, 13, 7, 3),
        (1, 5, 8, 9, 0),
    ):
        weights = {"w1": (hidden, channels), "b1": (hidden,), "w2": (channels, hidden), "b2": (channels,)}
        yield draw(x=(batch, tokens, channels), **weights), {"width": width}
    gated = draw(x=(2, 9, 8), w1=(32, 8), b1=(32,), w2=(8, 16), b2=(8,))
    yield gated, {"width": 5, "gated": True, "act": "silu"}


def attentions() -> Iterator[tuple[Inputs, dict[str, Any]]]:
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
        weights = {"w_qkv": (3 * inner, channels), "b_qkv": (3 * inner,), "w_proj": (channels, inner)}
        inputs = draw(x=(batch, tokens, channels), **weights, b_proj=(channels,))
        yield inputs, {"width": width, "num_heads": heads}


def norms() -> Iterator[tuple[Inputs, dict[str, Any]]]:
    """Both kinds of norm, with all arguments; without a branch, without parameters, without images; odd sizes."""
    for kind in ("layer", "rms"):
        for batch, tokens, channels in ((2, 67, 24), (0, 5, 8), (3, 1, 13)):
            streams = {"x": (batch, tokens, channels), "branch": (batch, tokens, channels)}
            vectors = dict.fromkeys(("weight", "bias", "scale", "branch_bias"), (channels,))
            everything = draw(**streams, **vectors, mask=(batch,))
            for width in (None, torch.tensor(7, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)):
                yield everything, {"eps": 1e-6, "kind": kind, "branch_width": width}
        alone = draw(x=(2, 9, 16), weight=(16,), bias=(16,))
        yield alone, {"branch": None, "eps": 1e-6, "kind": kind}
        yield draw(x=(2, 9, 16), branch=(2, 9, 16)), {"weight": None, "bias": None, "eps": 1e-6, "kind": kind}


CASES: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "masked_mlp": (kernels.masked_mlp, mlps),
    "masked_attention": (kernels.masked_attention, attentions),
    "residual_norm": (kernels.residual_norm, norms),
}


def test_every_operation_has_its_cases() -> None:
    assert set(REGISTRY) == set(CASES) | {"token_moments", "taylor_scores"}
    assert set(statistics.IMPLEMENTATIONS) == {*REGISTRY["token_moments"], *REGISTRY["taylor_scores"]}


def results(name: str, call: Any, inputs: Inputs, options: dict[str, Any]) -> list[torch.Tensor]:
    """The value or values, and the gradients of all inputs but masks, which are plain factors."""
    leaves = {key: tensor.requires_grad_(key != "mask") for key, tensor in inputs.items()}
    with kernels.use(name):
        out = call(**leaves, **options)
    values = [out] if isinstance(out, torch.Tensor) else list(out)
    weights = [
        torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape).to(value.dtype)
        for value in values
    ]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return [*(value.detach() for value in values), *torch.autograd.grad(values, wanted, weights)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "implementation"), [(op, name) for op in CASES for name in REGISTRY[op]])
def test_operation(operation: str, implementation: str, dtype: torch.dtype, layout: str) -> None:
    call, cases = CASES[operation]
    # Only the residual stream is kept in another dtype than the inputs have.
    dtypes = {dtype, torch.promote_types(dtype, torch.float32)} if operation == "residual_norm" else {dtype}
    ran = 0
    for inputs, options in cases():
        laid_out = {
            name: LAYOUTS[layout](t.to(dtype)) if t.ndim > 1 and t.numel() else t.to(dtype)
            for name, t in inputs.items()
        }
        with kernels.use(implementation):
            try:
                kernels.explain(operation, **laid_out, **options)
            except ValueError as refusal:
                assert "no implementation accepts this call" in str(refusal)
                continue
        ran += 1
        expected, plain, found = (
            results(name, call, {key: tensor.detach().to(to) for key, tensor in laid_out.items()}, options)
            for name, to in (("reference", torch.float64), ("reference", dtype), (implementation, dtype))
        )
        for exact, other, own in zip(expected, plain, found, strict=True):
            assert own.dtype in dtypes and own.dtype == other.dtype and own.shape == exact.shape
            norm = exact.norm()
            rounding = float((other.double() - exact).norm() / norm) if norm > 0 else 0.0
            tolerance = kernel_tolerance(rounding, dtype, int(exact.count_nonzero()))
            assert (own.double() - exact).norm() <= tolerance * norm, (own.shape, options)
    if not ran:
        pytest.skip(f"{implementation} refuses all of this on the CPU")
