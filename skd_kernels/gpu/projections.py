"""Matrix products between full and packed coordinates: the projections into and out of the heads, and gradients.

A packed tensor holds the kept coordinates of every head side by side: row r, head g, coordinate d is element
``r * (groups * pitch) + g * pitch + d``, where the pitch is the width rounded up to a multiple of 8. That padding is
what lets whole 16-byte pieces be read and copied asynchronously at every legal width, without a hint that would be
wrong at some; it is written as exact zeros, and it costs nothing at the widths in use, which are multiples of 8.
Packed tensors live in buffers of the full width, whose remainder is never read.

`weight` is a matrix of rows (groups, head_dim) and `channels` columns: W_qkv with 3 H groups, or the transposed
W_proj with H groups (`transpose_kept`). With that, one kernel goes into the heads (``x W^T``: qkv, and the gradient
at the attention's output), one goes out of them (``packed W``: the output, and the gradient at x), one gives both
weight gradients, and W is gathered in the kernel: packed column n is row ``(n // pitch) * head_dim + n % pitch``.

Every kernel reads the width from `width`, a 0-d int32 tensor on the device, and works on that many coordinates. All
sums have a fixed order. The configurations compile without spills. Timed on an H100 in bfloat16 at DeiT-Base
(benchmarks/results/h100-sweep.json), others are up to 1.2 times as fast for the products, and more than twice as fast
for the weight gradients.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.launch import device_of, launch
from skd_kernels.gpu.tiles import Config, precision, width_kernel

PIECE = 8  # coordinates in a column block of the small kernels; divides every pitch


def product_config(like: torch.Tensor, channels: int) -> Config:
    """For the products with activations.

    Half precision: at the full rate of an H100's tensor cores tiles of 128 x 128 would read 12 TB/s through the L2
    cache, tiles of 128 x 256 read 9, within 144 KiB of shared memory; an A100 has a third of that rate, and takes
    more registers for its operands. Rows that do not start at multiples of 16 elements are read one element at a
    time, through so many pointers that larger tiles spill. Single precision runs on the ordinary cores unless TF32 is
    allowed: small tiles, or they spill (64 x 64 take more than the 255 registers that a thread can have), and for
    them ptxas aims at fewer registers than it needs unless told not to.
    """
    if like.dtype == torch.float32:
        return Config(64, 64 if precision() == "tf32" else 32, 16, warps=4, stages=3, registers=255)
    if channels % 16:
        return Config(64, 64, 32, warps=4, stages=3, registers=255)
    if 90 <= device_of(like).architecture < 120:
        return Config(128, 256, 64, warps=8, stages=3)
    return Config(128, 128, 32, warps=8, stages=3)


def gradient_config(like: torch.Tensor, channels: int) -> Config:
    """For the weight gradients, whose output is small and whose sum is long: smaller tiles fill the device."""
    if like.dtype == torch.float32:
        return Config(64, 32, 16, warps=4, stages=3, registers=255)
    if channels % 16:
        return Config(64, 64, 32, warps=4, stages=3, registers=255)
    return Config(128, 128, 64 if 90 <= device_of(like).architecture < 120 else 32, warps=8, stages=3)


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def kept(width, head_dim):
    """Load the width and clamp it to the valid range: a wrong value must not address memory outside the buffers."""
    return tl.minimum(tl.maximum(tl.load(width), 0), head_dim)


@triton.jit
def padded(width):
    """The pitch of packed coordinates. The compiler sees that it is a multiple of 8, hence so is every row stride."""
    return (width + 7) // 8 * 8


@triton.jit
def head_of(position, pitch):
    """``position // pitch`` in four instructions, where the integer division that this would be takes twenty.

    The distance of (position + 1/2) / pitch from an integer is at least 1 / (2 pitch), and its error, of a reciprocal
    and a product, below 2^-21 of itself: the integer part is right below 2^20, to the end of the last tile
    (attention.LARGEST_PACKED).
    """
    return ((position.to(tl.float32) + 0.5) * (1.0 / pitch)).to(tl.int32)


@width_kernel
def into_heads(
    x,
    weight,
    bias,
    out,
    width,
    rows,
    channels,
    groups,
    head_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (rows, packed) = x (rows, channels) W^T + bias, at the kept coordinates; zeros in the padding."""
    keep = kept(width, head_dim)
    pitch = padded(keep)
    total = groups * pitch
    # At width 0 there are no tiles; compilers may still move the divisions out of the loop.
    pitch = tl.maximum(pitch, 8)
    tiles_n = tl.cdiv(total, BLOCK_N)
    # Columns fastest: programs that run together share rows of x, and all of W stays in the L2 cache. Moving what all
    # tiles share out of the loop over them costs 50 registers, more than there are.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * tiles_n, tl.num_programs(0), disable_licm=True):
        first = tile // tiles_n * BLOCK_M
        m = tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        head = head_of(n, pitch)
        coordinate = n - head * pitch
        live = (coordinate < keep) & (n < total)
        source = tl.where(live, head * head_dim + coordinate, 0)
        left = x + first.to(tl.int64) * channels + tl.minimum(m, rows - 1 - first)[:, None] * channels + k[None, :]
        right = weight + source[:, None] * channels + k[None, :]
        total_mn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, channels, BLOCK_K):
            inside = (k < channels - start)[None, :]
            a = tl.load(left + start, mask=inside, other=0.0)
            # Selected here and not after the loop, which would keep `live` in the result's layout: 60 registers.
            b = tl.load(right + start, mask=inside & live[:, None], other=0.0)
            total_mn = tl.dot(a, b.T, total_mn, input_precision=PRECISION)
        if bias is not None:
            total_mn += tl.load(bias + source, mask=live, other=0.0).to(tl.float32)[None, :]
        target = out + first.to(tl.int64) * total + m[:, None] * total + n[None, :]
        tl.store(target, total_mn.to(out.dtype.element_ty), mask=(m < rows - first)[:, None] & (n < total)[None, :])


@width_kernel
def out_of_heads(
    packed,
    weight,
    bias,
    out,
    width,
    rows,
    channels,
    groups,
    head_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (rows, channels) = packed (rows, packed) W + bias; the sum ends at the kept coordinates; 0 at width 0."""
    keep = kept(width, head_dim)
    pitch = padded(keep)
    total = groups * pitch
    pitch = tl.maximum(pitch, 8)  # as in into_heads
    tiles_n = tl.cdiv(channels, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * tiles_n, tl.num_programs(0), disable_licm=True):
        first = tile // tiles_n * BLOCK_M
        m = tl.arange(0, BLOCK_M)
        n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        left = packed + first.to(tl.int64) * total + tl.minimum(m, rows - 1 - first)[:, None] * total
        inside = n < channels
        total_mn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, total, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            head = head_of(k, pitch)
            coordinate = k - head * pitch
            live = (coordinate < keep) & (k < total)
            source = tl.where(live, head * head_dim + coordinate, 0)
            a = tl.load(left + k[None, :], mask=(k < total)[None, :], other=0.0)
            # The padding of `packed` is zero, but W may be NaN there.
            b = tl.load(
                weight + source[:, None] * channels + n[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            total_mn = tl.dot(a, b, total_mn, input_precision=PRECISION)
        if bias is not None:
            shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
            total_mn += tl.where(keep > 0, shift, 0.0)[None, :]
        target = out + first.to(tl.int64) * channels + m[:, None] * channels + n[None, :]
        tl.store(target, total_mn.to(out.dtype.element_ty), mask=(m < rows - first)[:, None] & inside[None, :])


@triton.jit
def split_count(tiles, programs):
    """Into how many parts the long sum of a weight gradient is cut, so that its few tiles occupy all programs.

    As many as fit in one wave of programs, or in two where that leaves fewer programs idle.
    """
    one = tl.maximum(programs // tiles, 1)
    two = tl.maximum(2 * programs // tiles, 1)
    return tl.where((two > 2 * one) & (one < 4), two, one)


@width_kernel
def weight_gradient(
    packed,
    x,
    partial,
    width,
    rows,
    channels,
    groups,
    head_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (splits * tiles, BLOCK_M, BLOCK_N) float32: tiles of packed^T x, each over one part of the rows."""
    total = groups * padded(kept(width, head_dim))
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tiles = tl.cdiv(total, BLOCK_M) * tiles_n
    splits = split_count(tl.maximum(tiles, 1), tl.num_programs(0))
    part = tl.cdiv(tl.cdiv(rows, splits), BLOCK_K) * BLOCK_K
    # Tiles fastest: programs that run together march over the same rows, which then come from the L2 cache. Cutting
    # tiles x rows into equal pieces (stream-K) would balance better, but its programs read different rows.
    for item in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), disable_licm=True):
        tile = item % tiles
        m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        first = item // tiles * part
        last = tl.minimum(first + part, rows)
        left = packed + first.to(tl.int64) * total + k[:, None] * total + m[None, :]
        right = x + first.to(tl.int64) * channels + k[:, None] * channels + n[None, :]
        total_mn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(first, last, BLOCK_K):
            inside = (k < last - start)[:, None]
            a = tl.load(left, mask=inside & (m < total)[None, :], other=0.0)
            b = tl.load(right, mask=inside & (n < channels)[None, :], other=0.0)
            total_mn = tl.dot(a.T, b, total_mn, input_precision=PRECISION)
            left += BLOCK_K * total
            right += BLOCK_K * channels
        inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partial + tl.cast(item, tl.int64) * (BLOCK_M * BLOCK_N) + inner, total_mn)


@width_kernel
def finish_weight_gradient(
    partial,
    out,
    width,
    channels,
    groups,
    head_dim,
    row_stride,
    column_stride,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """out[row * row_stride + column * column_stride] = the sum of its partial tiles; zero past the width.

    One program has `PIECE` coordinates of one group, which lie in one tile since PIECE divides the pitch.
    """
    keep = kept(width, head_dim)
    pitch = padded(keep)
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tiles = tl.cdiv(groups * pitch, BLOCK_M) * tiles_n
    splits = split_count(tl.maximum(tiles, 1), programs)
    pieces = tl.cdiv(head_dim, PIECE)
    group = tl.program_id(0) // pieces
    coordinate = tl.program_id(0) % pieces * PIECE + tl.arange(0, PIECE)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = group * pitch + tl.program_id(0) % pieces * PIECE
    tile = position // BLOCK_M * tiles_n + tl.program_id(1)
    inner = (position % BLOCK_M + tl.arange(0, PIECE))[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    live = (coordinate < keep)[:, None] & (column < channels)[None, :]
    total = tl.zeros((PIECE, BLOCK_N), tl.float32)
    for split in range(0, splits):
        item = (split * tiles + tile).to(tl.int64)
        total += tl.load(partial + item * (BLOCK_M * BLOCK_N) + inner, mask=live, other=0.0)
    target = (group * head_dim + coordinate)[:, None] * row_stride + column[None, :] * column_stride
    mask = (coordinate < head_dim)[:, None] & (column < channels)[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=mask)


@width_kernel
def transpose_kept(weight, out, width, channels, groups, head_dim, BLOCK_N: tl.constexpr, PIECE: tl.constexpr):
    """out (groups * head_dim, channels) = weight (channels, groups * head_dim)^T at the kept coordinates only."""
    pieces = tl.cdiv(head_dim, PIECE)
    group = tl.program_id(0) // pieces
    coordinate = tl.program_id(0) % pieces * PIECE + tl.arange(0, PIECE)
    live = coordinate < kept(width, head_dim)
    row = group * head_dim + coordinate
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < channels
    source = weight + column[:, None] * (groups * head_dim) + row[None, :]
    value = tl.load(source, mask=inside[:, None] & live[None, :], other=0.0)
    tl.store(out + row[:, None] * channels + column[None, :], value.T, mask=live[:, None] & inside[None, :])


@width_kernel
def add_terms(partial, out, width, terms, columns, head_dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (columns,) = sum of partial (terms, columns), zero where coordinate ``column % head_dim`` is not kept."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (column % head_dim < kept(width, head_dim)) & (column < columns)
    m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, terms, BLOCK_M):
        source = partial + (start + m).to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(source, mask=(start + m < terms)[:, None] & live[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < columns)


# Launches ------------------------------------------------------------------------------------------


def project(
    into: bool,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    width: torch.Tensor,
    head_dim: int,
) -> torch.Tensor:
    """Start `into_heads` or `out_of_heads`.

    Args:
        into: which of them.
        source: x (rows, channels), or a packed buffer of `rows` rows. `out`: the other of the two.
        weight: (groups * head_dim, channels). bias: (groups * head_dim,) or (channels,), or None.
        width: 0-d int32 tensor on the device.
        head_dim: full width of a head.

    Returns:
        `out`.
    """
    inner, channels = weight.shape
    rows = (source if into else out).shape[0]
    config = product_config(source, channels)
    tiles = triton.cdiv(rows, config.m) * triton.cdiv(inner if into else channels, config.n)
    arguments: dict[str, Any] = {
        "x" if into else "packed": source,
        "weight": weight,
        "bias": bias,
        "out": out,
        "width": width,
        "rows": rows,
        "channels": channels,
        "groups": inner // head_dim,
        "head_dim": head_dim,
        **config.blocks(),
        "PRECISION": precision(),
    }
    kernel = into_heads if into else out_of_heads
    grid = (config.programs(source, tiles),)
    launch(kernel, grid, arguments, **config.settings())
    return out


def transpose_weight(weight: torch.Tensor, out: torch.Tensor, width: torch.Tensor, groups: int) -> None:
    """out (groups * head_dim, channels) = the kept columns of `weight` as rows; the other rows are not written."""
    channels, inner = weight.shape
    pieces = 2 * PIECE
    arguments: dict[str, Any] = {"weight": weight, "out": out, "width": width, "channels": channels, "groups": groups}
    arguments |= {"head_dim": inner // groups, "BLOCK_N": 64, "PIECE": pieces}
    grid = (groups * triton.cdiv(inner // groups, pieces), triton.cdiv(channels, 64))
    launch(transpose_kept, grid, arguments, num_warps=4, num_stages=1)


def differentiate_weight(
    packed: torch.Tensor, x: torch.Tensor, out: torch.Tensor, width: torch.Tensor, groups: int, *, transposed: bool
) -> None:
    """out = packed^T x, the gradient of a weight; zero past the width.

    Args:
        packed: packed buffer of as many rows as x. x: (rows, channels).
        out: (groups * head_dim, channels), or (channels, groups * head_dim) if `transposed`.
        width: 0-d int32 tensor on the device.
        groups: 3 H or H.
    """
    rows, channels = x.shape
    inner = out.numel() // channels
    config = gradient_config(x, channels)
    pitch = triton.cdiv(inner // groups, 8) * 8
    tiles = triton.cdiv(groups * pitch, config.m) * triton.cdiv(channels, config.n)
    programs = config.resident * device_of(x).multiprocessors
    # Two waves at most, see split_count: splits * tiles is at most the larger of tiles and 2 * programs.
    partial = x.new_empty(max(tiles, 2 * programs), config.m, config.n, dtype=torch.float32)
    shared: dict[str, Any] = {
        "partial": partial,
        "width": width,
        "channels": channels,
        "groups": groups,
        "head_dim": inner // groups,
    }
    arguments: dict[str, Any] = {
        "packed": packed,
        "x": x,
        "rows": rows,
        **shared,
        **config.blocks(),
        "PRECISION": precision(),
    }
    launch(weight_gradient, (programs,), arguments, **config.settings())
    strides = (
        {"row_stride": 1, "column_stride": inner} if transposed else {"row_stride": channels, "column_stride": 1}
    )
    arguments = {"out": out, **shared, **strides, "programs": programs, "PIECE": PIECE}
    arguments |= {"BLOCK_M": config.m, "BLOCK_N": config.n}
    grid = (groups * triton.cdiv(inner // groups, PIECE), triton.cdiv(channels, config.n))
    launch(finish_weight_gradient, grid, arguments, num_warps=4, num_stages=1)


def sum_terms(partial: torch.Tensor, out: torch.Tensor, width: torch.Tensor, head_dim: int) -> None:
    """out (columns,) = partial (terms, columns) float32 summed, zero where ``column % head_dim`` is not kept."""
    terms, columns = partial.shape
    # 64-byte pieces of rows: few columns a program, so that a few thousand columns still occupy the device.
    arguments: dict[str, Any] = {"partial": partial, "out": out, "width": width, "terms": terms, "columns": columns}
    arguments |= {"head_dim": head_dim, "BLOCK_M": 128, "BLOCK_N": 16}
    launch(add_terms, (triton.cdiv(columns, 16),), arguments, num_warps=4, num_stages=1)
