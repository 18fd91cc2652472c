"""residual_norm's kernels on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from every_operation import Cases, OnGpu
from norm_checks import OF_A_BRANCH, Norm
from operations import relative_error
from tolerances import kernel_tolerance

import skd_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = torch.bfloat16
KINDS = ("layer", "rms")
BATCH = (16, 197, 768)


class TestNorm(OnGpu):
    cases: ClassVar[Cases] = {
        "several turns of every program": [
            *((Norm(BATCH, kind=kind, dtype=dtype), None) for kind in KINDS for dtype in DTYPES),
            *((Norm(BATCH, kind=kind, dtype=dtype, mixed=True), None) for kind in KINDS for dtype in DTYPES[1:]),
        ],
        # Between two layers, with the second one's bias or without, at the start of a network, and with all there is.
        "real sizes": [
            (problem, control)
            for channels in (192, 384, 768, 1152, 2048, 4096, 200, 45)
            for kind in KINDS
            for problem, control in (
                (Norm((16, 197, channels), kind=kind, dtype=HALF, mixed=True, without=OF_A_BRANCH), None),
                (
                    Norm((16, 197, channels), kind=kind, dtype=HALF, mixed=True, without=("branch", *OF_A_BRANCH)),
                    None,
                ),
                (Norm((16, 197, channels), kind=kind, dtype=HALF, mixed=True, without=("scale", "mask")), None),
                (Norm((16, 197, channels), kind=kind), None),
                (Norm((16, 197, channels), kind=kind), 0),
            )
        ],
        "odd shapes": [
            (Norm(shape, kind=kind, dtype=dtype, without=without), None)
            for dtype in (torch.float32, HALF)
            for shape in ((1, 1, 13), (3, 5, 45), (1, 3001, 17), (7, 1, 130))
            for kind, without in (("layer", ()), ("rms", ("weight", "bias", "mask")))
        ],
    }
    repeated = Norm((64, 197, 384), dtype=HALF), (3, 0)
    asynchronous = Norm((2, 50, 64)), 3
    compiled = tuple(Norm((4, 50, 64), kind=kind, dtype=HALF, mixed=True) for kind in KINDS)
    controls = (3, 0)
    replayed = compiled[0]
    replays = tuple(
        (width, *mask) for mask in ((2, 0, 2, 2), (0, 0, 0, 0), (1, 0, 4, 0), (2, 2, 2, 2)) for width in (3, 0)
    )


@pytest.mark.xdist_group("memory")
def test_more_than_two_billion_elements() -> None:
    """Places of rows are 64-bit, in both kernels."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of device memory")
    rows, channels = 2**20 + 64, 2048
    branch = torch.randn(1, rows, channels, dtype=torch.bfloat16, device="cuda").requires_grad_()
    x = torch.zeros(1, 1, channels, dtype=torch.bfloat16, device="cuda").expand(1, rows, channels)
    out = kernels.residual_norm(x, branch, None, None, eps=1e-6)[1]
    (found,) = torch.autograd.grad(out, branch, branch.detach())
    last = branch.detach()[:, -64:].clone().requires_grad_()
    want = kernels.residual_norm(x[:, -64:], last, None, None, eps=1e-6)[1]
    assert torch.equal(out[:, -64:], want)
    (expected,) = torch.autograd.grad(want, last, last.detach())
    assert relative_error(found[:, -64:], expected) <= kernel_tolerance(0, torch.bfloat16)
