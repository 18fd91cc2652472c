"""Weights as the products read them: cast, the kept coordinates side by side, zeros from there to the end of a tile.

A masked operation has a weight into its coordinates, whose rows are kept (W_1, W_qkv), with a bias, and one out of
them, whose columns are (W_2, W_proj). Coordinates come in groups. Those of attention, the heads' q, k and v, are
packed: of each group the kept ones, rounded up to a multiple of 8, then at once the next group's. The parts of a
gated MLP stay where they are, `part` rows apart. The rounding keeps pieces of 16 bytes whole at every width.

One launch casts and packs what an operation needs. What lies past the width is written as zeros as far as the
products' tiles reach, and left as it is behind that: NaN in a weight that is not kept does no harm.
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

ROWS, COLUMNS = 16, 256  # that one program copies


@triton.jit
def source_of(place, keep, full, groups, part, PACKED: tl.constexpr):
    """(the coordinate that lies at `place`, counted through all groups; whether there is one)."""
    pitch = tl.maximum(rounded(keep), 8) if PACKED else part
    group = place // pitch
    coordinate = place - group * pitch
    return group * full + coordinate, (coordinate < keep) & (group < groups)


@triton.jit
def reach(keep, groups, PACKED: tl.constexpr, PAD: tl.constexpr):
    """How far the products read: the kept coordinates, up to the end of a tile; of each part if not PACKED."""
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
    part,
    pitch_inward,
    pitch_outward,
    inward_programs,
    PACKED: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Programs up to `inward_programs` copy rows of `inward` and its bias, the others columns of `outward`."""
    keep = read_width(width, full)
    program = tl.program_id(0)
    if program < inward_programs:
        across = tl.cdiv(pitch_inward, COLUMNS)
        first = program // across * ROWS
        r = first + tl.arange(0, ROWS)
        c = program % across * COLUMNS + tl.arange(0, COLUMNS)
        begin = first if PACKED else first % part
        if begin < reach(keep, row_groups, PACKED, PAD):
            source, live = source_of(r, keep, full, row_groups, part, PACKED)
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
            source, live = source_of(c, keep, full, column_groups, part, PACKED)
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
    """Fill `packed` from a weight (rows full, C), its bias or None, and a weight (C, columns full), of any dtype."""
    packed_inward, packed_bias, packed_outward = packed
    channels = outward.shape[0]
    inward, outward = contiguous(inward), contiguous(outward)
    inward_programs = ceil_div(layout.row_pitch, ROWS) * ceil_div(packed_inward.shape[1], COLUMNS)
    outward_programs = ceil_div(channels, ROWS) * ceil_div(layout.column_pitch, COLUMNS)
    arguments: dict[str, Any] = {
        **{"inward": inward, "bias": None if bias is None else contiguous(bias), "outward": outward},
        **{"packed_inward": packed_inward, "packed_bias": packed_bias, "packed_outward": packed_outward},
        **{"width": width, "channels": channels, "full": layout.full, "row_groups": layout.rows},
        **{"column_groups": layout.columns, "part": layout.part, "pitch_inward": packed_inward.shape[1]},
        **{"pitch_outward": packed_outward.shape[1], "inward_programs": inward_programs},
        **{"PACKED": layout.packed, "PAD": PAD, "ROWS": ROWS, "COLUMNS": COLUMNS},
    }
    launch(pack_kernel, (inward_programs + outward_programs,), arguments, num_warps=4, num_stages=1)
