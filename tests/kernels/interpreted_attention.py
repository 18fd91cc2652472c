"""masked_attention's Triton kernels, interpreted on the CPU; test_triton_attention.py runs this in its own process.

Shapes are tiny, yet every loop takes several turns: the interpreter's device has three programs. Half precision is
float16, because the interpreter's bfloat16 products are wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from every_operation import BOTH, HALF, Cases, Interpreted, in_dtypes
from operations import Attention, relative_error, run
from tolerances import UNIT_ROUNDOFF, kernel_tolerance

from skd_kernels.gpu import attention as operator

SINGLE = (torch.float32,)


class TestAttention(Interpreted):
    small = Attention((1, 9, 16), full=8, heads=2)
    at_half = 5
    large = Attention((1, 8, 16), full=64, heads=4, bias=False)
    # At 20 of 56 coordinates, 3 and 9 times 24 columns: no last tile is full, and those behind are NaN.
    tiled = Attention((2, 33, 40), full=56, heads=3), Attention((2, 65, 44), full=56, heads=3, dtype=HALF)
    at_tiles = 20
    repeated = Attention((1, 40, 16), full=8, heads=2), (5,)
    compiled = (Attention((1, 5, 16), full=8, heads=2),)
    controls = (0, 8)
    cases: ClassVar[Cases] = {
        "heads of 16": [
            *in_dtypes(Attention((2, 17, 24), full=16, heads=3), (0, 13), SINGLE),
            *in_dtypes(Attention((2, 17, 24), full=16, heads=3), (8,), (HALF,)),
        ],
        "heads of 40": [(Attention((1, 65, 48), full=40, bias=False), 33)],
        "heads of 64": in_dtypes(Attention((1, 65, 32), full=64), (64,), (HALF,)),
        "heads of 128": in_dtypes(Attention((1, 17, 32), full=128), (101,), SINGLE),
        "parameters in float32": [(Attention((2, 17, 24), full=16, heads=3, dtype=HALF, mixed=True), 11)],
        "several tiles": [(tiled[0], 20)],
        "one of everything": [(Attention((1, 1, 1), full=1), 1)],
        "nothing is a multiple of 8": [
            (Attention((3, 5, 45), full=9, heads=5, dtype=HALF), 7),
            (Attention((1, 33, 130), full=20), 3),
        ],
        # Blocks of 16 to 64 tokens: without a query, with some, with all; two images, so that rows may be confused.
        "few queries": [
            (Attention((2, 70, 16), full=12, heads=2, queries=1), 9),
            (Attention((2, 40, 16), full=16, queries=35), 5),
            (Attention((2, 20, 16), full=8, heads=2, queries=2), 0),
        ],
        # A plain mean, a negative scale, and one so large that all but one of the probabilities underflow.
        "scales": [(Attention((1, 40, 24), full=16, scale=scale), 11) for scale in (0.0, -0.3, 20.0)],
    }
    slow: ClassVar[Cases] = {
        "heads of 16": in_dtypes(Attention((2, 17, 24), full=16, heads=3), (16,), SINGLE),
        "heads of 40": [(Attention((1, 65, 48), full=40, heads=2, bias=False, dtype=HALF), 40)],
        "heads of 64": in_dtypes(Attention((1, 33, 32), full=64, heads=2), (29,), SINGLE),
        "heads of 128": in_dtypes(Attention((1, 17, 32), full=128), (17,), (HALF,)),
        "nothing is a multiple of 8": [(Attention((3, 5, 45), full=15, heads=3), 15)],
        "several tiles": [(tiled[1], 20)],
        "few queries": [(Attention((2, 70, 16), full=16, heads=2, queries=1, dtype=HALF), 13)],
        "many images": [(Attention((3, 33, 16), full=8), 5)],
    }

    def test_torch_library_accepts_the_operators(self) -> None:
        problem = replace(self.small, shape=(1, 5, 16), heads=1)
        operators = operator.attention_forward, operator.attention_backward
        self.check_operators(*operators, problem, (problem.heads, 0.3, 3), (0.3,))

    def test_work_shrinks_with_the_queries(self, multiplications: list[int]) -> None:
        """One query takes a block of 32 in the forward pass and for each key, and one of 16 for its own gradient."""
        work = []
        for queries in (1, 64):
            multiplications.clear()
            problem = Attention((1, 64, 16), full=16, queries=queries)
            run(problem, "triton", problem.inputs(), 16, wanted=("x",))
            work.append(sum(multiplications))
        one, every = work
        # Products of so many queries with all keys, at 16 coordinates: 2 forward, 3 for dq, 4 for dk and dv.
        assert every - one == (2 * (64 - 32) + 3 * (64 - 16) + 4 * (64 - 32)) * 64 * 16

    @pytest.mark.parametrize("dtype", BOTH)
    def test_one_token(self, dtype: torch.dtype) -> None:
        """Its only probability is 1, so q and k get no gradient but what rounding leaves.

        That is the difference of one sum of 11 products in two orders, 11 roundings each.
        """
        problem = Attention((2, 1, 24), full=16, heads=3, dtype=dtype)
        inputs, given = problem.inputs(), [torch.ones(problem.shape)]
        exact = {name: tensor.double() for name, tensor in inputs.items()}
        expected = run(problem, "reference", exact, 11, given)
        plain, found = (run(problem, name, inputs, 11, given) for name in ("slices", "triton"))
        for name, want in expected.items():
            tolerance = kernel_tolerance(relative_error(plain[name], want), dtype)
            assert relative_error(found[name], want) <= tolerance, name
        queries_and_keys, values = found["w_qkv"][: 2 * problem.inner], found["w_qkv"][2 * problem.inner :]
        assert queries_and_keys.norm() <= 22 * UNIT_ROUNDOFF[dtype] * values.norm()
