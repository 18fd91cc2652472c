"""The gradients of weights whose rows or columns stop at the width: sums over tokens.

A weight's gradient has few tiles and a long sum: DeiT-Base gives 72 tiles of 128 x 256, an H100 has 132
multiprocessors, and at a small width most would idle. So the tokens are cut into as many parts as let the programs
finish soonest, and each program sums tiles over parts: all tiles of a part run together, and share its rows in the
L2 cache. (Cutting tiles and tokens into equal shares balances better, but its programs read different rows: 0.51 ms
against 0.103 at half of DeiT-Base's width on an H100.) The sums go to a workspace in float32; a second kernel adds
the parts of a tile in order, unpacks the rows or columns (packing.py) and writes zeros where nothing is kept. How the
work is cut follows from the width and the device alone: results repeat to the bit, and no atomic operation is used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.buffers import ceil_div, uninitialised
from skd_kernels.gpu.launch import device_of, launch
from skd_kernels.gpu.layout import Layout
from skd_kernels.gpu.tiles import (
    Config,
    described,
    halves,
    inner_step,
    load_tile,
    operand,
    precision,
    read_width,
    rounded,
    small_config,
    width_kernel,
)

FINISHED = 4096  # elements, a strip of a tile's rows, that one program of the second kernel writes
# What a part costs beside its steps, in steps: the first loads, which nothing hides, and the sums' way to memory.
OVERHEAD = 20


@triton.jit
def grid_of(
    keep, groups, rows, columns, PACKED: tl.constexpr, BY_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """(row tiles of one part, row tiles, column tiles) of the kept rows or columns."""
    size = groups * rounded(keep) if PACKED else keep
    if BY_ROWS:
        part_rows = tl.cdiv(size, M)
        return part_rows, part_rows if PACKED else part_rows * groups, tl.cdiv(columns, N)
    else:
        part_rows = tl.cdiv(rows, M)
        return part_rows, part_rows, tl.cdiv(size, N)


@triton.jit
def splits(tiles, steps, programs, OVERHEAD: tl.constexpr):
    """Into how many parts the sum is cut: what one wave of programs takes, or two waves if they end sooner."""
    tiles = tl.maximum(tiles, 1)
    one = tl.minimum(tl.maximum(programs // tiles, 1), steps)
    two = tl.minimum(tl.maximum(2 * programs // tiles, 1), steps)
    end_of_one = tl.cdiv(tiles * one, programs) * (tl.cdiv(steps, one) + OVERHEAD)
    end_of_two = tl.cdiv(tiles * two, programs) * (tl.cdiv(steps, two) + OVERHEAD)
    best = tl.where(end_of_two < end_of_one, two, one)
    return tl.cdiv(steps, tl.cdiv(steps, best))  # none is empty


@width_kernel
def weight_gradient_kernel(
    a,
    b,
    work,
    width,
    tokens,
    rows,
    columns,
    full,
    groups,
    part_stride,
    stride_a,
    stride_b,
    PACKED: tl.constexpr,
    BY_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """work (parts of the sum, tiles, BLOCK_M, BLOCK_N) = a^T b over the tokens of each part.

    BY_ROWS: the width limits a's columns, otherwise b's; the other's are masked unless WHOLE.
    """
    keep = read_width(width, full)
    part_rows, tall, across = grid_of(keep, groups, rows, columns, PACKED, BY_ROWS, BLOCK_M, BLOCK_N)
    steps = tl.cdiv(tokens, BLOCK_K)
    count = splits(tall * across, steps, tl.num_programs(0), OVERHEAD)
    share = tl.cdiv(steps, count)
    items = tall * across * count
    # A flattened loop computes the first item even if there is none: nothing is divided by zero.
    across = tl.maximum(across, 1)
    tiles = tl.maximum(tall * across, 1)
    part_rows = tl.maximum(part_rows, 1)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        tile = item % tiles
        row = tile // across
        top = row * BLOCK_M
        if BY_ROWS and not PACKED:
            top = row // part_rows * part_stride + row % part_rows * BLOCK_M
        left = tile % across * BLOCK_N
        first = item // tiles * share
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # The last part may go on past the last token, where zeros are read: loops of one length become one loop.
        for step in range(0, share):
            t = (first + step) * BLOCK_K
            a_tile = load_tile(a, t, top, tokens, rows, stride_a, BLOCK_K, BLOCK_M, WHOLE or BY_ROWS, DESCRIBED)
            b_tile = load_tile(
                b, t, left, tokens, columns, stride_b, BLOCK_K, BLOCK_N, WHOLE or not BY_ROWS, DESCRIBED
            )
            total = tl.dot(a_tile.T, b_tile, total, input_precision=PRECISION)
        store_sums(work + tl.cast(item, tl.int64) * (BLOCK_M * BLOCK_N), total, BLOCK_M, BLOCK_N, BLOCK_N, PIECES)


@triton.jit
def store_sums(place, total, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, PIECES: tl.constexpr):
    """Write a tile (HEIGHT, WIDTH) into rows of ROW elements, in PIECES of columns, to need less shared memory."""
    if PIECES > 1:
        left, right = halves(total, HEIGHT, WIDTH)
        store_sums(place, left, HEIGHT, WIDTH // 2, ROW, PIECES // 2)
        store_sums(place + WIDTH // 2, right, HEIGHT, WIDTH // 2, ROW, PIECES // 2)
    else:
        tl.store(place + (tl.arange(0, HEIGHT)[:, None] * ROW + tl.arange(0, WIDTH)[None, :]), total)


@width_kernel
def finish_kernel(
    work,
    out,
    width,
    tokens,
    rows,
    columns,
    full,
    groups,
    programs,
    PACKED: tl.constexpr,
    BY_ROWS: tl.constexpr,
    OVERHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIP: tl.constexpr,
):
    """out (rows, columns) = the sum over the parts; zeros where a row or a column is not kept.

    Program (x, y) writes strip x of the rows, and columns y of BLOCK_N.
    """
    keep = read_width(width, full)
    part_rows, tall, across = grid_of(keep, groups, rows, columns, PACKED, BY_ROWS, BLOCK_M, BLOCK_N)
    tiles = tall * across
    count = splits(tiles, tl.cdiv(tokens, BLOCK_K), programs, OVERHEAD)
    r = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Where the row and the column of each element lie in the workspace, and whether they do.
    group = (r if BY_ROWS else c) // full
    coordinate = (r if BY_ROWS else c) - group * full
    live = coordinate < keep
    if BY_ROWS:
        if PACKED:
            place = group * rounded(keep) + coordinate
        else:
            place = group * (part_rows * BLOCK_M) + coordinate
        row_tile = place // BLOCK_M
        row_in = place % BLOCK_M
        tile = row_tile[:, None] * across + (c // BLOCK_N)[None, :]
        inner = row_in[:, None] * BLOCK_N + (c % BLOCK_N)[None, :]
        kept = (r < rows)[:, None] & live[:, None] & (c < columns)[None, :]
    else:
        place = group * rounded(keep) + coordinate
        tile = (r // BLOCK_M)[:, None] * across + (place // BLOCK_N)[None, :]
        inner = (r % BLOCK_M)[:, None] * BLOCK_N + (place % BLOCK_N)[None, :]
        kept = (r < rows)[:, None] & live[None, :] & (c < columns)[None, :]
    total = tl.zeros((STRIP, BLOCK_N), tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        for split in range(0, count):
            places = (split * tiles + tile).to(tl.int64) * (BLOCK_M * BLOCK_N) + inner
            total += tl.load(work + places, mask=kept, other=0.0)
    stored = (r < rows)[:, None] & (c < columns)[None, :]
    places = out + r[:, None].to(tl.int64) * columns + c[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=stored)


def weight_gradient_config(like: torch.Tensor, channels: int, columns: int, by_descriptor: bool) -> Config:
    """On an H100 (prototypes, DeiT-Base): 0.103 and 0.064 ms at half and quarter width with 128 x 256.

    The prototype's loops over tiles and steps were not one, and it wrote the sums in one piece.
    """
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return small
    wide = by_descriptor and device_of(like).architecture < 120 and columns > 128
    if wide:
        return Config(128, 256, inner_step(like), warps=8, stages=3, pieces=4, flatten=True)
    return Config(128, 128, inner_step(like), warps=8, stages=3)


def weight_gradient(
    a: torch.Tensor,
    b: torch.Tensor,
    width: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    *,
    by_rows: bool,
) -> torch.Tensor:
    """out (R, C) = a^T b over the tokens, the kept rows or columns unpacked, exact zeros elsewhere.

    Args:
        a: (T, >= R), packed if `by_rows`. b: (T, >= C), packed otherwise.
        by_rows: whether the width limits the rows of `out` or its columns.
    """
    tokens, (rows, columns) = a.shape[0], out.shape
    by_descriptor = described(a, b)
    config = weight_gradient_config(a, columns if by_rows else rows, columns, by_descriptor).fitted(a)
    groups = layout.row_groups if by_rows else layout.column_groups
    high, wide = (a.shape[1], columns) if by_rows else (rows, b.shape[1])
    tiles = ceil_div(high, config.m) * ceil_div(wide, config.n)
    steps = ceil_div(tokens, config.k)
    programs = config.programs(a, tiles * steps)
    # At most two turns of all programs.
    work = uninitialised(a, max(tiles, min(2 * programs, tiles * steps)), config.m, config.n, dtype=torch.float32)
    even = columns % config.n == 0 if by_rows else rows % config.m == 0
    shapes: dict[str, Any] = {
        **{"work": work, "width": width, "tokens": tokens, "rows": rows, "columns": columns},
        **{"full": layout.full, "groups": groups, "PACKED": layout.packed, "BY_ROWS": by_rows},
        **{"OVERHEAD": OVERHEAD, "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k},
    }
    arguments: dict[str, Any] = {
        **{"a": operand(a, config.k, config.m, by_descriptor), "b": operand(b, config.k, config.n, by_descriptor)},
        **{"stride_a": a.stride(0), "stride_b": b.stride(0), "part_stride": layout.part_stride, "WHOLE": even},
        **{
            "DESCRIBED": by_descriptor,
            "PRECISION": precision(),
            "FLATTEN": config.flatten,
            "PIECES": config.pieces,
            **shapes,
        },
    }
    launch(weight_gradient_kernel, (programs,), arguments, **config.settings())
    strip = min(config.m, FINISHED // config.n)
    arguments = {"out": out, "programs": programs, "STRIP": strip, **shapes}
    grid = (ceil_div(rows, strip), ceil_div(columns, config.n))
    launch(finish_kernel, grid, arguments, num_warps=8, num_stages=1)
    return out
