"""Gradients summed over tokens: of a weight whose rows or columns stop at the width, and of biases.

The weight gradient has few tiles and a long sum: DeiT-Base gives 144 tiles of 128 x 128, an H100 has 132
multiprocessors, and at a small width most would idle. So the tiles left over after full waves (all of them, when
there are fewer tiles than programs) are cut along the tokens into equal shares, one for each program ("stream-K"). A
share may end one tile and begin another; both pieces go to a workspace in float32, and a second kernel adds the
pieces of a tile in the order of the tokens. How the work is cut follows from the width and the device alone: results
repeat to the bit, and no atomic operation is used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.buffers import ceil_div, uninitialised
from skd_kernels.gpu.launch import device_of, launch
from skd_kernels.gpu.tiles import Config, inner_step, precision, read_width, small_config, tile_of, width_kernel

STRIP = 16  # rows of a tile that one program of the second kernel finishes


@triton.jit
def grid_of(limit, rows, columns, PARTS: tl.constexpr, BY_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(row tiles of one part, row tiles, column tiles) below the width, which limits the rows or the columns."""
    if BY_ROWS:
        part_rows = tl.cdiv(limit, M)
        tiles_across = tl.cdiv(columns, N)
    else:
        part_rows = tl.cdiv(rows, M)
        tiles_across = tl.cdiv(limit, N)
    return part_rows, part_rows * PARTS, tiles_across


@width_kernel
def weight_gradient_kernel(
    a,
    b,
    out,
    work,
    width,
    tokens,
    rows,
    columns,
    stride_a,
    stride_b,
    part_a,
    PARTS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out (PARTS * rows, columns) = a[:, part]^T b, whole tiles to `out` and pieces to `work` (programs, 2, tile).

    BY_ROWS: the width limits the rows of each part, and b's columns are masked unless EVEN; otherwise the columns
    of out, and a's are. EVEN_T: the number of tokens is a multiple of BLOCK_K.
    """
    limit = read_width(width, rows if BY_ROWS else columns)
    part_rows, tall, across = grid_of(limit, rows, columns, PARTS, BY_ROWS, BLOCK_M, BLOCK_N)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = tl.cdiv(tokens, BLOCK_K)
    shared = tall * across % programs
    share = tl.cdiv(shared * steps, programs)
    begin = tl.minimum(program * share, shared * steps)
    end = tl.minimum(begin + share, shared * steps)
    first = begin // steps
    whole_tiles = (tall * across - shared) // programs
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for turn in range(0, 2 + whole_tiles):
        # Turns 0 and 1: the two pieces of this program's share, perhaps empty. Then whole tiles.
        is_piece = turn < 2
        tile = tl.where(is_piece, first + turn, shared + program + (turn - 2) * programs)
        low = tl.where(is_piece, tl.maximum(begin, tile * steps), tile * steps) - tile * steps
        high = tl.where(is_piece, tl.minimum(end, (tile + 1) * steps), (tile + 1) * steps) - tile * steps
        if low < high:
            row, column = tile_of(tile, tall, across, GROUP)
            part = row // part_rows
            top = row % part_rows * BLOCK_M
            left = column * BLOCK_N
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(low, high):
                t = step * BLOCK_K
                a_places = (
                    a + part * part_a + t.to(tl.int64) * stride_a + (k[:, None] * stride_a + (top + i)[None, :])
                )
                b_places = b + t.to(tl.int64) * stride_b + (k[:, None] * stride_b + (left + j)[None, :])
                there = (k < tokens - t)[:, None]
                a_there = there if EVEN or BY_ROWS else there & (top + i < rows)[None, :]
                b_there = there & (left + j < columns)[None, :] if BY_ROWS and not EVEN else there
                if EVEN_T and (EVEN or BY_ROWS):
                    a_tile = tl.load(a_places)
                else:
                    a_tile = tl.load(a_places, mask=a_there, other=0.0)
                if EVEN_T and (EVEN or not BY_ROWS):
                    b_tile = tl.load(b_places)
                else:
                    b_tile = tl.load(b_places, mask=b_there, other=0.0)
                total = tl.dot(a_tile.T, b_tile, total, input_precision=PRECISION)
            if is_piece:
                place = work + (program * 2 + turn).to(tl.int64) * (BLOCK_M * BLOCK_N)
                tl.store(place + i[:, None] * BLOCK_N + j[None, :], total)
            else:
                store_tile(out, total, part * rows, top, left, limit, rows, columns, BY_ROWS, BLOCK_M, BLOCK_N)


@triton.jit
def store_tile(
    out,
    total,
    part_row,
    top,
    left,
    limit,
    rows,
    columns,
    BY_ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows top ... of a part of `out`, columns left ...; exact zeros past the width."""
    i = top + tl.arange(0, HEIGHT)
    j = left + tl.arange(0, WIDTH)
    kept = (i < limit)[:, None] if BY_ROWS else (j < limit)[None, :]
    places = out + (part_row + i).to(tl.int64)[:, None] * columns + j[None, :]
    total = tl.where(kept, total, 0.0).to(out.dtype.element_ty)
    tl.store(places, total, mask=(i < rows)[:, None] & (j < columns)[None, :])


@width_kernel
def finish_kernel(
    out,
    work,
    width,
    tokens,
    rows,
    columns,
    programs,
    PARTS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Add the pieces of every tile that was shared, and write zeros into the tiles past the width.

    Program (x, y) takes strip y of tile x, counted in the grid of the full width.
    """
    limit = read_width(width, rows if BY_ROWS else columns)
    part_rows, tall, across = grid_of(limit, rows, columns, PARTS, BY_ROWS, BLOCK_M, BLOCK_N)
    full_part_rows = tl.cdiv(rows, BLOCK_M)
    full_across = tl.cdiv(columns, BLOCK_N)
    index = tl.program_id(0)
    part = index // (full_part_rows * full_across)
    row = index // full_across % full_part_rows
    column = index % full_across
    strip = tl.program_id(1) * STRIP
    total = tl.zeros((STRIP, BLOCK_N), tl.float32)
    # The position of this tile in the order of `tile_of`.
    r = part * part_rows + row
    height = tl.minimum(tall - r // GROUP * GROUP, GROUP)
    tile = r // GROUP * GROUP * across + column * height + r % GROUP
    shared = tall * across % programs
    active = (row < part_rows) & (column < across)
    if active & (tile < shared):
        steps = tl.cdiv(tokens, BLOCK_K)
        share = tl.cdiv(shared * steps, programs)
        i = strip + tl.arange(0, STRIP)
        places = i[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        for program in range(tile * steps // share, ((tile + 1) * steps - 1) // share + 1):
            piece = tile - program * share // steps
            place = work + (program * 2 + piece).to(tl.int64) * (BLOCK_M * BLOCK_N)
            total += tl.load(place + places)
    if (active == 0) | (tile < shared):
        store_tile(
            out,
            total,
            part * rows,
            row * BLOCK_M + strip,
            column * BLOCK_N,
            limit,
            rows,
            columns,
            BY_ROWS,
            STRIP,
            BLOCK_N,
        )


def weight_gradient_config(a: torch.Tensor, b: torch.Tensor) -> Config:
    return small_config(a, a.stride(0), b.stride(0)) or Config(128, 128, inner_step(a), warps=8, stages=3)


def weight_gradient(
    a: torch.Tensor,
    b: torch.Tensor,
    width: torch.Tensor,
    out: torch.Tensor,
    *,
    by_rows: bool,
    parts: int = 1,
) -> torch.Tensor:
    """out (parts * R, C) = a^T b over the tokens, and exact zeros past the width.

    Args:
        a: (T, parts * (>= R)). b: (T, >= C).
        by_rows: the width limits the R rows of every part, and a's columns are padded to whole tiles; otherwise it
            limits the C columns, and b's are padded.
    """
    config = weight_gradient_config(a, b)
    tokens, rows, columns = a.shape[0], out.shape[0] // parts, out.shape[1]
    tiles = parts * ceil_div(rows, config.m) * ceil_div(columns, config.n)
    # Not bounded by the tiles: that is what the shares are for. One piece is at least one step.
    programs = config.programs(a, tiles * ceil_div(tokens, config.k))
    work = uninitialised(a, programs, 2, config.m, config.n, dtype=torch.float32)
    even = columns % config.n == 0 if by_rows else rows % config.m == 0
    shapes: dict[str, Any] = {"tokens": tokens, "rows": rows, "columns": columns, "PARTS": parts, "BY_ROWS": by_rows}
    shapes |= {"width": width, "out": out, "work": work, **config.blocks(), "GROUP": 8}
    arguments: dict[str, Any] = {
        **{"a": a, "b": b, "stride_a": a.stride(0), "stride_b": b.stride(0), "part_a": a.shape[1] // parts},
        **{"EVEN": even, "EVEN_T": tokens % config.k == 0, "PRECISION": precision(), **shapes},
    }
    launch(weight_gradient_kernel, (programs,), arguments, **config.settings())
    arguments = {"programs": programs, "STRIP": STRIP, **shapes}
    launch(finish_kernel, (tiles, config.m // STRIP), arguments, num_warps=4, num_stages=1)
    return out


# Sums over tokens ----------------------------------------------------------------------------------


@width_kernel
def column_sums_kernel(
    a, partial, width, tokens, columns, stride_a, chunk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """partial (chunks, columns): sums over `chunk` rows each; nothing at width 0."""
    if tl.load(width) > 0:
        j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        begin = tl.program_id(1) * chunk
        count = tl.minimum(chunk, tokens - begin)
        base = a + begin.to(tl.int64) * stride_a + j[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, count, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            mask = (i < count)[:, None] & (j < columns)[None, :]
            total += tl.load(base + i[:, None] * stride_a, mask=mask, other=0.0).to(tl.float32)
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
    """Add `partial` (rows, PARTS + 1, >= columns) over its rows: to `bias` (PARTS * columns,), the last to `scores`.

    Exact zeros past the width. WHOLE: all columns are kept unless the width is 0.
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
    # Four programs on every multiprocessor keep enough loads in flight.
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
