"""The kernels of weights' gradients by themselves, interpreted; test_triton_mlp.py runs this in its own process.

The operations' own tests reach few of the ways to cut the work: the interpreter's device has three programs.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from operations import relative_error
from tolerances import kernel_tolerance

from skd_kernels.gpu.buffers import PAD, ceil_div
from skd_kernels.gpu.launch import INTERPRETED_DEVICE
from skd_kernels.gpu.layout import Layout
from skd_kernels.gpu.weight_gradient import OVERHEAD, splits, weight_gradient

pytestmark = pytest.mark.usefixtures("poisoned")
MLP, GATED = (
    Layout(70, row_groups=1, column_groups=1, packed=False),
    Layout(70, row_groups=2, column_groups=1, packed=False),
)
HEADS = Layout(12, row_groups=15, column_groups=5, packed=True)


@triton.jit
def evaluate_splits(found, tiles, steps, programs, OVERHEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """`splits` alone."""
    tl.store(found, splits(tiles, steps, programs, OVERHEAD))


@pytest.mark.parametrize(
    ("tiles", "steps", "programs", "expected"),
    [
        (0, 5, 3, 3),  # nothing is kept
        (1, 2, 3, 2),  # fewer steps than programs
        (1, 10, 3, 3),  # one turn of all programs
        (2, 10, 3, 1),  # one turn, in which one idles
        (2, 70, 3, 3),  # two turns, which end sooner than one
        (4, 70, 3, 1),  # more tiles than programs
        (72, 394, 132, 3),  # DeiT-Base on an H100, whole and at half of its width
        (36, 394, 132, 3),
    ],
)
def test_how_a_sum_is_cut(tiles: int, steps: int, programs: int, expected: int) -> None:
    found = torch.zeros((), dtype=torch.int32)
    evaluate_splits[(1,)](found, tiles, steps, programs, OVERHEAD=OVERHEAD)
    assert int(found) == expected
    turns = ceil_div(max(tiles, 1) * expected, programs)
    others = (1, max(1, min(steps, programs // max(tiles, 1))))
    length = turns * (ceil_div(steps, expected) + OVERHEAD)
    assert all(length <= ceil_div(max(tiles, 1) * n, programs) * (ceil_div(steps, n) + OVERHEAD) for n in others)


def placed(values: torch.Tensor, width: int, layout: Layout, pitch: int) -> torch.Tensor:
    """Coordinates (tokens, groups, full) as the kernels have them: zeros to the end of the tile, NaN behind it."""
    tokens, groups, _ = values.shape
    out = values.new_full((tokens, pitch), torch.nan)
    apart = ceil_div(width, 8) * 8 if layout.packed else layout.part_stride
    for first, size in [(0, groups * apart)] if layout.packed else [(g * apart, width) for g in range(groups)]:
        out[:, first : first + ceil_div(size, PAD) * PAD] = 0.0
    for group in range(groups):
        out[:, group * apart : group * apart + width] = values[:, group, :width]
    return out


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    ("layout", "width", "tokens", "channels", "dtype"),
    [
        (MLP, 33, 300, 24, torch.float32),  # one tile in three parts
        (MLP, 33, 2020, 72, torch.float32),  # two tiles in two turns
        (GATED, 33, 300, 24, torch.float32),
        (GATED, 69, 100, 140, torch.float16),  # rows that no descriptor describes
        (HEADS, 11, 300, 24, torch.float32),  # packed, with tails of tiles
        (HEADS, 5, 200, 136, torch.float16),
        (HEADS, 0, 40, 24, torch.float16),
    ],
)
def test_weight_gradients(
    layout: Layout, width: int, tokens: int, channels: int, dtype: torch.dtype, by_rows: bool
) -> None:
    """Over rows with a stride, too: they are parts of rows twice as long, the other half NaN."""
    generator = torch.Generator().manual_seed(0)
    groups = layout.row_groups if by_rows else layout.column_groups
    inner = torch.randn(tokens, groups, layout.full, generator=generator).to(dtype)
    outer = torch.randn(tokens, channels, generator=generator).to(dtype)
    coordinates = placed(inner, width, layout, layout.row_pitch if by_rows else layout.column_pitch)
    rows = torch.cat([outer, torch.full_like(outer, torch.nan)], 1)[:, :channels]
    expected = torch.einsum("tgd,tc->gdc", inner.double(), outer.double())
    expected[:, width:] = 0
    expected = expected.flatten(0, 1) if by_rows else expected.flatten(0, 1).T
    out = torch.full(expected.shape, torch.nan)
    operands = (coordinates, rows) if by_rows else (rows, coordinates)
    found = weight_gradient(*operands, torch.tensor(width, dtype=torch.int32), out, layout, by_rows=by_rows)
    assert found is out and out[expected == 0].eq(0).all()
    assert relative_error(out, expected) <= kernel_tolerance(0.0, torch.float32, terms=tokens)


def test_the_device_has_few_programs() -> None:
    """What the cases above rely on."""
    assert INTERPRETED_DEVICE.multiprocessors == 3
