"""masked_attention's kernels on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from every_operation import Cases, OnGpu, in_dtypes
from operations import Attention, relative_error
from tolerances import kernel_tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# C, heads, D and tokens.
SIZES = ((192, 3, 64, 197), (768, 12, 64, 197), (1024, 16, 64, 577), (1152, 16, 72, 256), (384, 6, 64, 1370))
ODD = (
    (Attention((1, 3, 4), full=1), 1),
    (Attention((3, 5, 45), full=15, heads=3), 15),
    (Attention((3, 5, 45), full=9, heads=5), 7),
    (Attention((1, 33, 130), full=20), 3),
    (Attention((2, 3000, 16), full=8, heads=2), 5),
    (Attention((70_000, 3, 16), full=8, heads=2), 8),  # more images than a grid's second dimension holds
)


class TestAttention(OnGpu):
    cases: ClassVar[Cases] = {
        "head widths": [
            case
            for full in (16, 32, 40, 64, 72, 80, 128)
            for bias in (True, False)
            for case in in_dtypes(
                Attention((2, 75, 144), full=full, heads=3, bias=bias),
                sorted({0, 1, 8, 16, min(17, full), full // 2, full - 1, full}),
                DTYPES,
            )
        ],
        "real sizes": [
            case
            for channels, heads, full, tokens in SIZES
            for case in in_dtypes(
                Attention((4, tokens, channels), full=full, heads=heads), (8, full // 4, full // 2, full), DTYPES
            )
        ],
        "odd shapes": [case for problem, at in ODD for case in in_dtypes(problem, (at,), DTYPES)],
        "scales": [(Attention((2, 100, 48), full=16, heads=3, scale=scale), 11) for scale in (0.0, -0.3, 20.0)],
        "parameters in float32": [
            (Attention((8, 197, 384), full=64, heads=6, dtype=dtype, mixed=True), 40) for dtype in DTYPES[1:]
        ],
    }
    repeated = Attention((16, 197, 384), full=64, heads=6, dtype=torch.bfloat16), (0, 40, 64)
    asynchronous = Attention((2, 50, 64), full=32, heads=2), 20
    compiled = (Attention((4, 50, 64), full=40, heads=2, dtype=torch.bfloat16),)
    controls = tuple(range(0, 41, 4))
    replayed = compiled[0]
    replays = (40, 0, 8, 23, 40)

    def test_runs_repeat_to_the_bit_in_deterministic_mode(self, at: Any) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            self.test_runs_repeat_to_the_bit(at)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_tf32_where_pytorch_allows_it(self) -> None:
        errors = self.check_tf32(Attention((8, 197, 384), full=64, heads=6), 40)
        assert max(error for error, _ in errors.values()) <= 8 * 2.0**-11

    @pytest.mark.xdist_group("memory")
    def test_more_than_two_billion_packed_elements(self) -> None:
        """Token offsets are 64-bit."""
        problem = Attention((2**14 + 1, 64, 16), full=64, heads=11, dtype=torch.bfloat16)
        assert 3 * problem.inner * problem.shape[0] * problem.shape[1] > 2**31
        assert self.check_last_rows(problem, 1) <= kernel_tolerance(0, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_core_is_as_exact_as_the_library(dtype: torch.dtype) -> None:
    """`attend` alone against F.scaled_dot_product_attention, at full width."""
    from skd_kernels.gpu.flash import attend

    images, tokens, heads, head_dim = 8, 197, 6, 64
    inner = heads * head_dim
    packed = torch.randn(images * tokens, 3 * inner, device="cuda").to(dtype)
    q, k, v = packed.view(images, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    out = torch.empty_like(packed[:, :inner])
    logsumexp = torch.empty(images, heads, tokens, device="cuda")
    width = torch.tensor(head_dim, dtype=torch.int32, device="cuda")
    attend(packed, out, logsumexp, width, head_dim, head_dim**-0.5)
    found = out.view(images, tokens, heads, head_dim).transpose(1, 2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    library = relative_error(F.scaled_dot_product_attention(q, k, v), exact)
    logit = float((q.double() @ k.double().mT * head_dim**-0.5).abs().max())
    assert relative_error(found, exact) <= kernel_tolerance(library, dtype, terms=tokens, logit=logit)
    sums = (q.double() @ k.double().mT * head_dim**-0.5).logsumexp(-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(logsumexp.double(), sums, rtol=1e-4, atol=1e-3)


def test_a_width_from_a_table_needs_no_second_compilation() -> None:
    """Elements of an int32 table start at any multiple of 4 bytes; a compilation inside a captured graph may fail."""
    from skd_kernels.gpu.flash import flash_forward

    problem = Attention((2, 50, 64), full=32, heads=2, device="cuda")
    inputs = problem.inputs()
    table = torch.tensor([32, 24, 16, 8, 20], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        problem.call(inputs, table[0])
        before = len(flash_forward.device_caches[torch.cuda.current_device()][0])
        for width in table:
            problem.call(inputs, width)
    assert len(flash_forward.device_caches[torch.cuda.current_device()][0]) == before
