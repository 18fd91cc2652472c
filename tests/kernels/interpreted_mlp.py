"""masked_mlp's Triton kernels, interpreted on the CPU; test_triton_mlp.py runs this in its own process.

The interpreter's device has three programs, so that persistent loops take several turns. Half precision is float16,
because the interpreter's bfloat16 products are wrong.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from every_operation import BOTH, HALF, Cases, Interpreted, in_dtypes, with_gradients
from operations import Mlp

import skd_kernels as kernels
from skd_kernels.gpu import mlp as operator
from skd_kernels.gpu.activations import ACTIVATIONS, activate
from skd_kernels.gpu.launch import watch

SHAPE = (2, 17, 40)


class TestMlp(Interpreted):
    small = Mlp((1, 9, 16), full=20)
    at_half = 5
    large = Mlp((1, 8, 16), full=256)
    # Buffers of three tiles of 128, or six of 64; the width takes the first two, or three.
    tiled = Mlp((1, 70, 80), full=300), Mlp((1, 70, 140), full=300, dtype=HALF, gated=True)
    at_tiles = 131
    repeated = Mlp((1, 70, 24), full=40), (29,)
    compiled = (Mlp((1, 5, 16), full=20),)
    controls = (0, 20, 13)
    cases: ClassVar[Cases] = {
        "activations": [
            (Mlp((1, 9, 24), full=40, act=act, gated=gated, dtype=dtype), 29)
            for act, (gated, dtype) in itertools.product(ACTIVATIONS, zip((False, True), BOTH, strict=True))
        ],
        "widths": [
            *in_dtypes(Mlp(SHAPE, full=72), (0, 63), (torch.float32,)),
            *in_dtypes(Mlp(SHAPE, full=72), (63, 72), (HALF,)),
        ],
        "widths of two parts": in_dtypes(Mlp(SHAPE, full=72, gated=True), (63,)),
        "parameters in float32": [(Mlp(SHAPE, full=72, gated=g, dtype=HALF, mixed=True), 45) for g in (False, True)],
        "several tiles": [
            (tiled[0], 131),
            (Mlp((2, 75, 144), full=256, dtype=HALF), 131),  # in float16, rows that a descriptor describes
        ],
        "whole tiles": in_dtypes(Mlp((2, 64, 128), full=128, bias=False), (128,), (HALF,)),
        "one of everything": in_dtypes(Mlp((1, 1, 1), full=1), (1,)),
        "nothing is a multiple of 8": [
            *in_dtypes(Mlp((3, 5, 45), full=7, gated=True), (5,)),
            *in_dtypes(Mlp((1, 33, 130), full=67, bias=False), (66,), (torch.float32,)),
        ],
        "every program works on the same tile": in_dtypes(Mlp((1, 300, 16), full=16), (9,), (torch.float32,)),
    }

    slow: ClassVar[Cases] = {
        "activations": [
            (Mlp((1, 9, 24), full=40, act=act, gated=gated, dtype=dtype), 29)
            for act, (gated, dtype) in itertools.product(ACTIVATIONS, zip((True, False), BOTH, strict=True))
        ],
        "widths": [
            *in_dtypes(Mlp(SHAPE, full=72), (8, 72), (torch.float32,)),
            *in_dtypes(Mlp(SHAPE, full=72), (0, 8), (HALF,)),
        ],
        "widths of two parts": in_dtypes(Mlp(SHAPE, full=72, gated=True), (0,)),
        "several tiles": [(tiled[1], 131), (Mlp((1, 70, 80), full=200, gated=True), 131)],
        "nothing is a multiple of 8": in_dtypes(Mlp((1, 33, 130), full=67, bias=False), (66,), (HALF,)),
        "whole tiles": in_dtypes(Mlp((2, 64, 128), full=128, bias=False), (128,), (torch.float32,)),
    }

    @pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_torch_library_accepts_the_operators(self, gated: bool) -> None:
        problem = Mlp((1, 5, 16), full=20, gated=gated)
        arguments = "gelu", gated, True
        self.check_operators(operator.mlp_forward, operator.mlp_backward, problem, arguments, (gated,))
        x, w1, _, w2, b2 = problem.inputs().values()
        call = x, w1, None, w2, b2, torch.tensor(5, dtype=torch.int32), None, "gelu", gated, False
        torch.library.opcheck(operator.mlp_forward, call, test_utils=("test_schema", "test_faketensor"))

    def test_slopes_are_saved_for_gradients_that_need_them_alone(self) -> None:
        leaves, saved = self.small.inputs(), []

        def look(name: str, arguments: dict[str, Any]) -> None:
            if arguments.get("EPILOGUE") == "activate":
                saved.append(arguments["slopes"] is not None)

        with kernels.use("triton"), watch(look):
            assert self.small.call(leaves, 5)[0].grad_fn is None
            leaves["w2"].requires_grad_()
            self.small.call(leaves, 5)
            leaves["x"].requires_grad_()
            with torch.no_grad():
                self.small.call(leaves, 5)
            self.small.call(with_gradients(self.small), 5)
        assert saved == [False, False, False, True]


@triton.jit
def evaluate(z, value, slope, SIZE: tl.constexpr, ACT: tl.constexpr = "gelu_half"):  # type: ignore[no-untyped-def]
    """The activation alone."""
    i = tl.arange(0, SIZE)
    found = activate(tl.load(z + i), ACT)
    tl.store(value + i, found[0])
    tl.store(slope + i, found[1])


def test_the_half_precision_gelu() -> None:
    """Below bfloat16's roundoff of 2e-3, in value and slope, and far out below that of what was there before."""
    z = torch.linspace(-12, 12, 4096)
    value, slope = torch.zeros(2, 4096)
    evaluate[(1,)](z, value, slope, SIZE=4096)
    x = z.double().requires_grad_()
    exact = 0.5 * x * torch.special.erfc(-x * 0.5**0.5)  # 1 + erf would cancel in the tail
    (derivative,) = torch.autograd.grad(exact.sum(), x)
    error = (value - exact).abs()
    assert (error <= 7e-5).all() and (error <= 6.5e-4 * exact.abs())[x > -4].all()
    terms = 0.5 * torch.special.erfc(-z.double() * 0.5**0.5) + z.double().abs() * torch.exp(-0.5 * z.double() ** 2)
    error = (slope - derivative).abs()
    assert (error <= 3e-4).all() and (error <= 1e-3 * terms)[x > -4].all()


@pytest.mark.parametrize("act", ["gelu_half", "gelu_tanh", "quick_gelu", "silu"])
def test_activations_far_out(act: str) -> None:
    """Values that leave float16's range, and infinity: the identity on the right, zero on the left."""
    z = torch.tensor([-1e18, -1e10, -65504.0, -100.0, 100.0, 65504.0, 1e10, torch.inf])
    value, slope = torch.zeros(2, 8)
    evaluate[(1,)](z, value, slope, SIZE=8, ACT=act)
    assert torch.equal(value, torch.where(z > 0, z, 0.0))
    assert torch.equal(slope[:-1], (z > 0).float()[:-1])
