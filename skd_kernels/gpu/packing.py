"""Packing: the weights are cast to the dtype of the products, and their kept rows or columns put side by side.

A masked operation has two weights around its coordinates. The inward weight (W_1, W_qkv) has a row for each
coordinate, and a bias; the outward weight (W_2, W_proj) has a column for each. Coordinates come in groups:

* In attention, q, k and v of each head are a group, and groups are packed: each keeps its first `width` coordinates,
  zeros round them up to a multiple of 8, and the next group follows at once. The rounding makes every group start at
  a multiple of 16 bytes in half precision, at any width.
* In an MLP the hidden neurons are one group. The gates and the values of a gated MLP are two groups of rows, which
  stay where they are, `part_stride` rows apart.

Zeros follow the last kept coordinate up to the next multiple of 128, so that the products load whole tiles without
masks. What lies behind these zeros is never read. Nothing is multiplied by a weight that is not kept, so that NaN in
such a weight does no harm. One launch packs all that an operation needs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.buffers import PAD, ceil_div, contiguous
from skd_kernels.gpu.launch import launch
from skd_kernels.gpu.layout import Layout
from skd_kernels.gpu.tiles import read_width, rounded, width_kernel

ROWS, COLUMNS = 16, 256  # the tile of a packed weight that one program writes


@triton.jit
def source_of(place, keep, full, groups, part_stride, PACKED: tl.constexpr):
    """(index, live): which row or column of the original weight belongs at `place` of the packed one.

    Where `live` is false, `place` is padding, and the index means nothing.
    """
    pitch = tl.maximum(rounded(keep), 8) if PACKED else part_stride
    group = place // pitch
    coordinate = place - group * pitch
    return group * full + coordinate, (coordinate < keep) & (group < groups)


@triton.jit
def reach(keep, groups, PACKED: tl.constexpr, PAD: tl.constexpr):
    """How many rows or columns of the packed weight the products read: the kept ones, rounded up to whole tiles.

    If not PACKED it is the number in each part.
    """
    size = groups * rounded(keep) if PACKED else keep
    return tl.cdiv(size, PAD) * PAD


@width_kernel
def pack_kernel(
    inward,
    bias,
    outward,
    packed_inward,
    packed_bias,
    packed_outward,
    width,
    channels,
    full,
    row_groups,
    column_groups,
    part_stride,
    pitch_inward,
    pitch_outward,
    inward_programs,
    PACKED: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first `inward_programs` programs pack rows of `inward` and its bias, the others columns of `outward`."""
    keep = read_width(width, full)
    program = tl.program_id(0)
    if program < inward_programs:
        across = tl.cdiv(pitch_inward, COLUMNS)
        first = program // across * ROWS
        r = first + tl.arange(0, ROWS)
        c = program % across * COLUMNS + tl.arange(0, COLUMNS)
        begin = first if PACKED else first % part_stride
        if begin < reach(keep, row_groups, PACKED, PAD):
            source, live = source_of(r, keep, full, row_groups, part_stride, PACKED)
            inside = live[:, None] & (c < channels)[None, :]
            value = tl.load(inward + source[:, None] * channels + c[None, :], mask=inside, other=0.0)
            place = packed_inward + r.to(tl.int64)[:, None] * pitch_inward + c[None, :]
            tl.store(place, value.to(packed_inward.dtype.element_ty), mask=(c < pitch_inward)[None, :])
            if bias is not None:  # noqa: SIM102  (known at compile time)
                if program % across == 0:
                    shift = tl.load(bias + source, mask=live, other=0.0)
                    tl.store(packed_bias + r, shift.to(packed_bias.dtype.element_ty))
    else:
        program -= inward_programs
        across = tl.cdiv(pitch_outward, COLUMNS)
        r = program // across * ROWS + tl.arange(0, ROWS)
        first = program % across * COLUMNS
        c = first + tl.arange(0, COLUMNS)
        if first < reach(keep, column_groups, PACKED, PAD):
            source, live = source_of(c, keep, full, column_groups, part_stride, PACKED)
            inside = (r < channels)[:, None] & live[None, :]
            moved = tl.load(outward + r[:, None] * (column_groups * full) + source[None, :], mask=inside, other=0.0)
            place = packed_outward + r.to(tl.int64)[:, None] * pitch_outward + c[None, :]
            stored = (r < channels)[:, None] & (c < pitch_outward)[None, :]
            tl.store(place, moved.to(packed_outward.dtype.element_ty), mask=stored)


def pack(
    inward: torch.Tensor,
    bias: torch.Tensor | None,
    outward: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    width: torch.Tensor,
    layout: Layout,
) -> None:
    """Fill `packed` (inward weight, its bias or None, outward weight) from the parameters of an operation.

    Args:
        inward: (row_groups * full, C), of any dtype.
        bias: (row_groups * full,), or None.
        outward: (C, column_groups * full).
    """
    packed_inward, packed_bias, packed_outward = packed
    channels = outward.shape[0]
    inward, outward = contiguous(inward), contiguous(outward)
    inward_programs = ceil_div(layout.row_pitch, ROWS) * ceil_div(packed_inward.shape[1], COLUMNS)
    outward_programs = ceil_div(channels, ROWS) * ceil_div(layout.column_pitch, COLUMNS)
    arguments: dict[str, Any] = {
        **{"inward": inward, "bias": None if bias is None else contiguous(bias), "outward": outward},
        **{"packed_inward": packed_inward, "packed_bias": packed_bias, "packed_outward": packed_outward},
        **{"width": width, "channels": channels, "full": layout.full, "row_groups": layout.row_groups},
        **{
            "column_groups": layout.column_groups,
            "part_stride": layout.part_stride,
            "pitch_inward": packed_inward.shape[1],
        },
        **{"pitch_outward": packed_outward.shape[1], "inward_programs": inward_programs},
        **{"PACKED": layout.packed, "PAD": PAD, "ROWS": ROWS, "COLUMNS": COLUMNS},
    }
    launch(pack_kernel, (inward_programs + outward_programs,), arguments, num_warps=4, num_stages=1)
