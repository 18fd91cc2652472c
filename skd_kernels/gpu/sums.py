"""Sums over tokens: gradients of biases and Taylor scores, from the partial sums that other kernels have stored.

Every sum has a fixed order, so that results are bitwise reproducible. Coordinates that are not kept get exact zeros.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from skd_kernels.gpu.buffers import ceil_div, uninitialised
from skd_kernels.gpu.launch import device_of, launch
from skd_kernels.gpu.tiles import read_width, width_kernel


@width_kernel
def column_sums_kernel(
    a, partial, width, tokens, columns, stride_a, chunk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """partial (chunks, columns) = the sum of `a` over each chunk of `chunk` rows; nothing is written at width 0."""
    if tl.load(width) > 0:
        j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        begin = tl.program_id(1) * chunk
        count = tl.minimum(chunk, tokens - begin)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, count, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            mask = (i < count)[:, None] & (j < columns)[None, :]
            inner = tl.arange(0, BLOCK_M)[:, None] * stride_a + j[None, :]
            places = a + tl.cast(begin + start, tl.int64) * stride_a + inner
            total += tl.load(places, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial + tl.program_id(1) * columns + j, tl.sum(total, 0), mask=j < columns)


@width_kernel
def sums_kernel(
    partial,
    bias,
    scores,
    width,
    rows,
    columns,
    full,
    stride_row,
    stride_part,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum `partial` (rows, parts, >= columns) over its rows.

    The first PARTS sums go to `bias` (PARTS * columns,) and the last to `scores` (columns,); either may be None. A
    column gets an exact zero if its coordinate, ``column % full``, is not kept.
    """
    part = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (j % full < read_width(width, full)) & (j < columns)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        for start in range(0, rows, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            places = i[:, None].to(tl.int64) * stride_row + part.to(tl.int64) * stride_part + j[None, :]
            total += tl.load(partial + places, mask=(i < rows)[:, None] & live[None, :], other=0.0)
    result = tl.sum(total, 0)
    if bias is not None:  # noqa: SIM102  (one is known at compile time)
        if part < PARTS:
            tl.store(bias + part * columns + j, result.to(bias.dtype.element_ty), mask=j < columns)
    if scores is not None:  # noqa: SIM102
        if part == PARTS:
            tl.store(scores + j, result, mask=j < columns)


def sums(
    partial: torch.Tensor,
    columns: int,
    bias: torch.Tensor | None,
    scores: torch.Tensor | None,
    width: torch.Tensor,
    *,
    full: int,
) -> None:
    """Fill `bias` (parts * columns,) and `scores` (columns,) with sums over the rows of `partial`.

    Args:
        partial: (rows, parts [+ 1], >= columns) float32: the parts of bias, then one for scores. If either is None,
            its parts are not read.
        full: the coordinates of a group of columns, of which the width keeps the first; the others get zeros. 1: a
            width above 0 keeps all columns.
    """
    parts = 0 if bias is None else bias.numel() // columns
    if bias is None:
        partial = partial[:, -1:]
    # A program takes few columns (64 bytes of a row), so that a few thousand columns still occupy the whole device.
    arguments: dict[str, Any] = {
        **{"partial": partial, "bias": bias, "scores": scores, "width": width, "rows": partial.shape[0]},
        **{"columns": columns, "full": full, "stride_row": partial.stride(0), "stride_part": partial.stride(1)},
        **{"PARTS": parts, "BLOCK_M": 128, "BLOCK_N": 16},
    }
    launch(sums_kernel, (ceil_div(columns, 16), parts + (scores is not None)), arguments, num_warps=4, num_stages=1)


def column_sums(a: torch.Tensor, width: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out (C,) = the sum of a (T, C) over its rows; zeros at width 0."""
    tokens, columns = a.shape
    block = 64
    # Four programs per multiprocessor keep enough loads in flight.
    chunks = max(1, min(ceil_div(tokens, 64), 4 * device_of(a).multiprocessors // ceil_div(columns, block)))
    chunk = ceil_div(tokens, chunks)
    chunks = ceil_div(tokens, chunk)
    partial = uninitialised(a, chunks, 1, columns, dtype=torch.float32)
    arguments: dict[str, Any] = {
        **{"a": a, "partial": partial, "width": width, "tokens": tokens, "columns": columns},
        **{"stride_a": a.stride(0), "chunk": chunk, "BLOCK_M": 64, "BLOCK_N": block},
    }
    launch(column_sums_kernel, (ceil_div(columns, block), chunks), arguments, num_warps=4, num_stages=1)
    sums(partial, columns, out, None, width, full=1)
    return out
