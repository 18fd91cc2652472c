"""masked_mlp's kernels on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from every_operation import Cases, OnGpu, in_dtypes
from operations import Mlp
from tolerances import kernel_tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((192, 768), (384, 1536), (768, 3072), (1152, 4304), (200, 500))
ODD = (((1, 1, 1), 1, 1), ((3, 5, 45), 7, 5), ((1, 33, 130), 67, 66), ((1, 3000, 16), 16, 9))


class TestMlp(OnGpu):
    cases: ClassVar[Cases] = {
        "activations": [
            case
            for act in ("gelu", "gelu_tanh", "quick_gelu", "silu")
            for gated in (False, True)
            for case in in_dtypes(Mlp((2, 75, 144), full=256, act=act, gated=gated), (0, 8, 45, 200, 256), DTYPES)
        ],
        "real sizes": [
            case
            for channels, full in SIZES
            for problem in (
                Mlp((8, 197, channels), full=full),
                Mlp((3, 197, channels), full=full, bias=False, gated=True),
            )
            for case in in_dtypes(problem, (1, full // 4, full // 2 + 3, full), DTYPES)
        ],
        "odd shapes": [case for shape, full, at in ODD for case in in_dtypes(Mlp(shape, full=full), (at,), DTYPES)],
        "parameters in float32": [
            (Mlp((8, 197, 384), full=1536, dtype=dtype, mixed=True), 700) for dtype in DTYPES[1:]
        ],
    }
    repeated = Mlp((16, 197, 384), full=1536, dtype=torch.bfloat16), (0, 700, 1536)
    asynchronous = Mlp((2, 50, 64), full=128), 70
    compiled = (Mlp((4, 50, 64), full=160, dtype=torch.bfloat16),)
    controls = tuple(range(0, 161, 8))
    replayed = compiled[0]
    replays = (160, 0, 8, 77, 160)

    def test_tf32_where_pytorch_allows_it(self) -> None:
        for error, plain in self.check_tf32(Mlp((8, 197, 384), full=1536), 700).values():
            assert error <= 2 * plain + 2 * 2.0**-10  # two operands, cut off after 10 bits

    @pytest.mark.xdist_group("memory")
    def test_more_than_two_billion_hidden_features(self) -> None:
        """Row offsets of the slopes and of h are 64-bit."""
        problem = Mlp((1, 2**20 + 64, 16), full=2048, dtype=torch.bfloat16)
        assert self.check_last_rows(problem, 64) <= kernel_tolerance(0, torch.bfloat16)
