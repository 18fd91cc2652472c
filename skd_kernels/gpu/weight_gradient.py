"""The gradients of weights whose rows or columns end at the width, as split-K products: K is the tokens.

A weight's gradient has few tiles and a long sum: DeiT-Base has 72 tiles of 128 x 256, but an H100 has 132
multiprocessors, most of which would idle at a small width. Therefore the tokens are split into parts, as many as make
the last program finish earliest, and a work item is one tile summed over one part. All tiles of a part run at the
same time, so that they share its rows in the L2 cache. (Stream-K, with an equal share of steps for every program,
would balance better, but its programs read different rows at the same time: 0.51 ms against 0.103 ms on an H100 at
half of DeiT-Base's width.) The partial sums go to a float32 workspace. A second kernel adds the parts of each tile in
order, unpacks the rows or columns (packing.py) and writes zeros for coordinates that are not kept. The split depends
on the shapes, the width and the device alone, and there are no atomics, so results are bitwise reproducible.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.buffers import ceil_div, uninitialised
from skd_kernels.gpu.launch import launch
from skd_kernels.gpu.layout import Layout
from skd_kernels.gpu.tiles import (
    Config,
    described,
    halves,
    inner_step,
    large_tiles_fit,
    load_tile,
    load_transposed,
    operand,
    precision,
    read_width,
    rounded,
    small_config,
    width_kernel,
)

FINISHED = 4096  # elements that one program of the second kernel writes: a strip of some rows of a tile
# The fixed cost of a work item, in units of inner steps: its first loads, which nothing hides, and the store of its
# partial sums.
OVERHEAD = 20


@triton.jit
def grid_of(
    keep, groups, rows, columns, PACKED: tl.constexpr, BY_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The numbers of tiles that cover what is kept: (row tiles of one group, all row tiles, column tiles).

    Only the rows of a gated MLP's first weight have several groups that are tiled separately (not PACKED).
    """
    size = groups * rounded(keep) if PACKED else keep
    if BY_ROWS:
        part_rows = tl.cdiv(size, M)
        return part_rows, part_rows if PACKED else part_rows * groups, tl.cdiv(columns, N)
    else:
        part_rows = tl.cdiv(rows, M)
        return part_rows, part_rows, tl.cdiv(size, N)


@triton.jit
def splits(tiles, steps, programs, OVERHEAD: tl.constexpr):
    """The number of parts into which the tokens are split: as many as fill one wave of programs, or two if faster."""
    tiles = tl.maximum(tiles, 1)
    one = tl.minimum(tl.maximum(programs // tiles, 1), steps)
    two = tl.minimum(tl.maximum(2 * programs // tiles, 1), steps)
    end_of_one = tl.cdiv(tiles * one, programs) * (tl.cdiv(steps, one) + OVERHEAD)
    end_of_two = tl.cdiv(tiles * two, programs) * (tl.cdiv(steps, two) + OVERHEAD)
    best = tl.where(end_of_two < end_of_one, two, one)
    return tl.cdiv(steps, tl.cdiv(steps, best))  # fewer where the last parts would be empty


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
    """work (parts, tiles, BLOCK_M, BLOCK_N) = a^T b, summed over the tokens of each part.

    BY_ROWS: the width limits the columns of a (rows of the result), otherwise those of b. The other operand is not
    padded: its columns are masked unless WHOLE, which says that they fill whole tiles.
    """
    keep = read_width(width, full)
    part_rows, tall, across = grid_of(keep, groups, rows, columns, PACKED, BY_ROWS, BLOCK_M, BLOCK_N)
    steps = tl.cdiv(tokens, BLOCK_K)
    count = splits(tall * across, steps, tl.num_programs(0), OVERHEAD)
    share = tl.cdiv(steps, count)
    items = tall * across * count
    # A flattened loop computes the indices of its first item even if there is no item (width 0), and must not divide
    # by zero.
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
        # Every part has `share` steps, because loops can be flattened only if the inner one has a constant length.
        # The last part may continue past the last token, where loads give zeros.
        for step in range(0, share):
            t = (first + step) * BLOCK_K
            a_tile = load_transposed(a, t, top, tokens, rows, stride_a, BLOCK_K, BLOCK_M, WHOLE or BY_ROWS, DESCRIBED)
            b_tile = load_tile(
                b, t, left, tokens, columns, stride_b, BLOCK_K, BLOCK_N, WHOLE or not BY_ROWS, DESCRIBED
            )
            total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
        store_sums(work + tl.cast(item, tl.int64) * (BLOCK_M * BLOCK_N), total, BLOCK_M, BLOCK_N, BLOCK_N, PIECES)


@triton.jit
def store_sums(place, total, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, PIECES: tl.constexpr):
    """Store a tile (HEIGHT, WIDTH) as rows that are ROW elements apart.

    The tile is stored in PIECES slices of columns, since a store changes the layout through shared memory, and a
    slice takes less of it.
    """
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
    """out (rows, columns) = the sum over the parts, with zeros in rows or columns that are not kept.

    Program (x, y) writes the x-th strip of STRIP rows and the y-th block of BLOCK_N columns.
    """
    keep = read_width(width, full)
    part_rows, tall, across = grid_of(keep, groups, rows, columns, PACKED, BY_ROWS, BLOCK_M, BLOCK_N)
    tiles = tall * across
    count = splits(tiles, tl.cdiv(tokens, BLOCK_K), programs, OVERHEAD)
    r = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Find each element's tile and its place within the tile in the workspace, and whether its coordinate is kept.
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
    """The configuration of the first kernel.

    A prototype with tiles of 128 x 256 took 0.103 ms at half and 0.064 ms at a quarter of DeiT-Base's width on an
    H100. Unlike this configuration, it did not flatten its loops, and stored a tile in one piece.
    """
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return small
    if columns > 128 and large_tiles_fit(like, by_descriptor):
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
    """out (R, C) = a^T b, summed over the T tokens: kept rows or columns are unpacked, the others are exact zeros.

    Args:
        a: (T, >= R), packed if `by_rows`.
        b: (T, >= C), packed unless `by_rows`.
        by_rows: whether the width limits the rows of `out`; otherwise it limits the columns.
    """
    tokens, (rows, columns) = a.shape[0], out.shape
    by_descriptor = described(a, b)
    config = weight_gradient_config(a, columns if by_rows else rows, columns, by_descriptor).fitted(a)
    groups = layout.groups(by_rows)
    high, wide = (a.shape[1], columns) if by_rows else (rows, b.shape[1])
    tiles = ceil_div(high, config.m) * ceil_div(wide, config.n)
    steps = ceil_div(tokens, config.k)
    programs = config.programs(a, tiles * steps)
    # `splits` makes at most two items per program, or one item per tile where there are more tiles than that.
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
