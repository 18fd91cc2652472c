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
    stride_row,
    stride_part,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum `partial` (rows, PARTS + 1, >= columns) over its rows.

    The first PARTS sums go to `bias` (PARTS * columns,) and the last to `scores` (columns,); either may be None.
    Columns past the width get exact zeros; if WHOLE, all columns are kept unless the width is 0.
    """
    limit = read_width(width, columns)
    if WHOLE:
        limit = tl.where(limit > 0, columns, 0)
    part = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.program_id(0) * BLOCK_N < limit:
        for start in range(0, rows, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            places = i[:, None].to(tl.int64) * stride_row + part * stride_part + j[None, :]
            total += tl.load(partial + places, mask=(i < rows)[:, None] & (j < limit)[None, :], other=0.0)
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
    parts: int = 1,
    whole: bool = False,
) -> None:
    """Fill `bias` (parts * columns,) and `scores` (columns,) from `partial` (rows, parts [+ 1], >= columns)."""
    arguments: dict[str, Any] = {
        **{"partial": partial, "bias": bias, "scores": scores, "width": width, "rows": partial.shape[0]},
        **{"columns": columns, "stride_row": partial.stride(0), "stride_part": partial.stride(1)},
        **{"PARTS": parts, "WHOLE": whole, "BLOCK_M": 32, "BLOCK_N": 32},
    }
    launch(sums_kernel, (ceil_div(columns, 32), parts + (scores is not None)), arguments, num_warps=4, num_stages=1)


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
    sums(partial, columns, out, None, width, whole=True)
    return out


@width_kernel
def add_terms(partial, out, width, terms, columns, head_dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (columns,) = sum of partial (terms, columns), zero where coordinate ``column % head_dim`` is not kept."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (column % head_dim < read_width(width, head_dim)) & (column < columns)
    m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, terms, BLOCK_M):
        source = partial + (start + m).to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(source, mask=(start + m < terms)[:, None] & live[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < columns)


def sum_terms(partial: torch.Tensor, out: torch.Tensor, width: torch.Tensor, head_dim: int) -> None:
    """out (columns,) = partial (terms, columns) float32 summed, zero where ``column % head_dim`` is not kept."""
    terms, columns = partial.shape
    # A program takes few columns (64 bytes of a row), so that a few thousand columns still occupy the whole device.
    arguments: dict[str, Any] = {"partial": partial, "out": out, "width": width, "terms": terms, "columns": columns}
    arguments |= {"head_dim": head_dim, "BLOCK_M": 128, "BLOCK_N": 16}
    launch(add_terms, (ceil_div(columns, 16),), arguments, num_warps=4, num_stages=1)
