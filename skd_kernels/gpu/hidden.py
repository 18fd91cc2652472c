"""The kernels of masked_mlp at the hidden features. The products around them are in linear.py, weight_gradient.py.

    hidden     z = x w1^T + b1 and h = act(z), or act(gate) * value      the first `width` columns
    gradient   dh = dy w2, dz = dh act'(z), and while both are in registers the column sums of dz (the gradient of b1)
               and of |h dh| (the Taylor scores)

Every kernel reads the width from the device and walks over the tiles below it; later tiles are neither read nor
written. z and dz are (tokens, parts, padded F) with parts = 2 (gate, value) when gated, h is (tokens, padded F).
Sums over tokens are written per row of tiles and added up by `weight_gradient.sums`, so their order, and with it the
result, never changes.

The configurations compile without spills (`python -m benchmarks.registers`). Timed on an H100 in bfloat16 at
DeiT-Base (benchmarks/results/h100-sweep.json), the fastest of 15 others takes a tenth less at most: both kernels stay
at less than half the speed of the library's product alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.activations import activate, in_kernel
from skd_kernels.gpu.buffers import ceil_div, uninitialised
from skd_kernels.gpu.launch import launch
from skd_kernels.gpu.tiles import (
    Config,
    dot_nn,
    dot_nt,
    inner_step,
    precision,
    read_width,
    small_config,
    tile_of,
    width_kernel,
)


@width_kernel
def hidden_kernel(
    x,
    w,
    bias,
    z,
    h,
    width,
    tokens,
    channels,
    hidden,
    stride_x,
    stride_w,
    stride_z,
    stride_h,
    part_z,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """h, and z unless it is None, up to the end of the tile that the width falls into; zeros past the width."""
    limit = read_width(width, hidden)
    rows = tl.cdiv(tokens, BLOCK_M)
    columns = tl.cdiv(limit, BLOCK_N)
    for index in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        row, column = tile_of(index, rows, columns, GROUP)
        m = tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end repeat the last one: no mask in the loop, and their results are not kept.
        x_tile = x + (row * BLOCK_M).to(tl.int64) * stride_x
        x_rows = (tl.minimum(m, tokens - 1 - row * BLOCK_M) * stride_x)[:, None]
        w_rows = (tl.minimum(n, hidden - 1) * stride_w)[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if GATED:
            value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            gate, value = dot_nt_pair(
                gate, value, x_tile, x_rows, w, w_rows, hidden * stride_w, channels, BLOCK_K, EVEN_C, PRECISION
            )
        else:
            gate = dot_nt(
                gate,
                x_tile,
                x_rows,
                w,
                w_rows,
                channels,
                channels,
                BLOCK_K,
                not EVEN_C,
                EVEN_C,
                False,
                PRECISION,
            )
        if bias is not None:
            gate += tl.load(bias + n, mask=n < limit, other=0.0).to(tl.float32)[None, :]
        keep = (n < limit)[None, :]
        gate = tl.where(keep, gate, 0.0)
        result, _ = activate(gate, ACT)
        stored = (row * BLOCK_M + m < tokens)[:, None]
        start = (row * BLOCK_M).to(tl.int64)
        z_places = z + start * stride_z + (m * stride_z)[:, None] + n[None, :] if z is not None else None
        if z is not None:
            tl.store(z_places, gate.to(h.dtype.element_ty), mask=stored)
        if GATED:
            if bias is not None:
                value += tl.load(bias + hidden + n, mask=n < limit, other=0.0).to(tl.float32)[None, :]
            value = tl.where(keep, value, 0.0)
            result *= value
            if z is not None:
                tl.store(z_places + part_z, value.to(h.dtype.element_ty), mask=stored)
        h_places = h + start * stride_h + (m * stride_h)[:, None] + n[None, :]
        tl.store(h_places, result.to(h.dtype.element_ty), mask=stored)


@triton.jit
def dot_nt_pair(
    first,
    second,
    a,
    a_rows,
    b,
    b_rows,
    apart,
    depth,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dot_nt` of a with b and with what lies `apart` elements after b, in one pass over a."""
    k = tl.arange(0, BLOCK_K)[None, :]
    whole = depth // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        left = tl.load(a + start + (a_rows + k))
        first = tl.dot(left, tl.load(b + start + (b_rows + k)).T, first, input_precision=PRECISION)
        second = tl.dot(left, tl.load(b + apart + start + (b_rows + k)).T, second, input_precision=PRECISION)
    if not EVEN:
        there = whole + k < depth
        left = tl.load(a + whole + (a_rows + k), mask=there, other=0.0)
        right = tl.load(b + whole + (b_rows + k), mask=there, other=0.0)
        first = tl.dot(left, right.T, first, input_precision=PRECISION)
        right = tl.load(b + apart + whole + (b_rows + k), mask=there, other=0.0)
        second = tl.dot(left, right.T, second, input_precision=PRECISION)
    return first, second


@width_kernel
def gradient_kernel(
    dy,
    w,
    z,
    dz,
    partial,
    width,
    tokens,
    channels,
    hidden,
    stride_dy,
    stride_w,
    stride_z,
    part_z,
    stride_partial,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dz (laid out as z), and partial (rows of tiles, parts + 1, padded F): its column sums, then those of |h dh|.

    dz or partial may be None. The epilogue takes the tile in two halves: in one piece its registers would spill.
    """
    limit = read_width(width, hidden)
    rows = tl.cdiv(tokens, BLOCK_M)
    columns = tl.cdiv(limit, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    for index in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        row, column = tile_of(index, rows, columns, GROUP)
        m = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - row * BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        dy_tile = dy + (row * BLOCK_M).to(tl.int64) * stride_dy
        dy_rows = (m * stride_dy)[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        inside = (n < hidden)[None, :]
        total = dot_nn(
            total,
            dy_tile,
            dy_rows,
            w,
            n[None, :],
            stride_w,
            inside,
            channels,
            BLOCK_K,
            EVEN_C,
            False,
            EVEN_F,
            PRECISION,
        )
        left, right = total.reshape((BLOCK_M, 2, HALF)).permute((0, 2, 1)).split()
        partial_row = partial + row * stride_partial if partial is not None else None
        start = column * BLOCK_N
        apply_gradient(
            left, z, dz, partial_row, row, start, limit, tokens, stride_z, part_z, ACT, GATED, BLOCK_M, HALF
        )
        apply_gradient(
            right, z, dz, partial_row, row, start + HALF, limit, tokens, stride_z, part_z, ACT, GATED, BLOCK_M, HALF
        )


@triton.jit
def apply_gradient(
    dh,
    z,
    dz,
    partial,
    row,
    start,
    limit,
    tokens,
    stride_z,
    part_z,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue on columns start ... start + BLOCK_N. dh is chosen, not multiplied, away: z and w may be NaN."""
    m = tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, BLOCK_N)
    rows_inside = (row * BLOCK_M + m < tokens)[:, None]
    inside = rows_inside & (n < limit)[None, :]
    places = (row * BLOCK_M).to(tl.int64) * stride_z + (m * stride_z)[:, None] + n[None, :]
    dh = tl.where(inside, dh, 0.0)
    gate = tl.load(z + places, mask=rows_inside, other=0.0).to(tl.float32)
    gate = tl.where((n < limit)[None, :], gate, 0.0)
    h, slope = activate(gate, ACT)
    if GATED:
        value = tl.load(z + part_z + places, mask=rows_inside, other=0.0).to(tl.float32)
        value = tl.where((n < limit)[None, :], value, 0.0)
        dvalue = dh * h
        h *= value
        slope *= value
        if dz is not None:
            tl.store(dz + part_z + places, dvalue.to(dz.dtype.element_ty), mask=rows_inside)
        if partial is not None:
            tl.store(partial + part_z + n, tl.sum(dvalue, 0))
    dgate = dh * slope
    if dz is not None:
        tl.store(dz + places, dgate.to(dz.dtype.element_ty), mask=rows_inside)
    if partial is not None:
        tl.store(partial + n, tl.sum(dgate, 0))
        last = 2 if GATED else 1
        tl.store(partial + last * part_z + n, tl.sum(tl.abs(h * dh), 0))


def hidden_config(x: torch.Tensor, w: torch.Tensor, gated: bool) -> Config:
    """z and h leave from the same registers as the sums: 128 x 256, or 4 warps, would spill.

    Gated, a program computes two tiles: half the columns, in float32 a quarter, or registers spill with triton 3.6.
    """
    config = Config(128, 64 if gated else 128, inner_step(x), warps=8, stages=3)
    config = small_config(x, x.stride(0), w.stride(0)) or config
    if gated and x.dtype == torch.float32:
        return replace(config, n=32)
    return config


def gradient_config(dy: torch.Tensor, w: torch.Tensor, gated: bool) -> Config:
    """Half the columns where twice as much is read and written for each sum (gated) or loaded (TF32)."""
    narrow = gated or dy.dtype == torch.float32
    config = Config(128, 64 if narrow else 128, inner_step(dy), warps=8, stages=3)
    return small_config(dy, dy.stride(0), w.stride(0)) or config


def hidden_features(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    width: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor | None,
    act: str,
    gated: bool,
) -> None:
    """Fill h (M, padded F) and z (M, parts, padded F) or None, from x (M, C) and w1 (parts * F, C)."""
    tokens, channels = x.shape
    hidden = w1.shape[0] // (2 if gated else 1)
    config = hidden_config(x, w1, gated)
    tiles = ceil_div(tokens, config.m) * ceil_div(hidden, config.n)
    arguments: dict[str, Any] = {
        **{"x": x, "w": w1, "bias": b1, "z": z, "h": h, "width": width},
        **{"tokens": tokens, "channels": channels, "hidden": hidden},
        **{"stride_x": x.stride(0), "stride_w": w1.stride(0), "stride_h": h.stride(0)},
        **{"stride_z": 0 if z is None else z.stride(0), "part_z": h.stride(0)},
        **{
            "ACT": in_kernel(act, h.dtype),
            "GATED": gated,
            "EVEN_C": channels % config.k == 0,
            "PRECISION": precision(),
        },
        **{**config.blocks(), "GROUP": 8},
    }
    grid = (config.programs(x, tiles),)
    launch(hidden_kernel, grid, arguments, **config.settings())


def hidden_gradient(
    dy: torch.Tensor,
    w2: torch.Tensor,
    z: torch.Tensor,
    width: torch.Tensor,
    act: str,
    *,
    keep: bool,
    add_up: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dz (M, parts, padded F) if `keep`; if `add_up` what `gradient_kernel` sums over the rows of every tile."""
    tokens, parts, pitch = z.shape
    (channels, hidden), gated = w2.shape, parts == 2
    config = gradient_config(dy, w2, gated)
    rows = ceil_div(tokens, config.m)
    dz = uninitialised(z, *z.shape) if keep else None
    partial = uninitialised(z, rows, parts + 1, pitch, dtype=torch.float32) if add_up else None
    arguments: dict[str, Any] = {
        **{"dy": dy, "w": w2, "z": z, "dz": dz, "partial": partial, "width": width},
        **{"tokens": tokens, "channels": channels, "hidden": hidden},
        **{"stride_dy": dy.stride(0), "stride_w": w2.stride(0), "stride_z": z.stride(0), "part_z": pitch},
        **{
            "stride_partial": (parts + 1) * pitch,
            "ACT": in_kernel(act, z.dtype),
            "GATED": gated,
            "EVEN_C": channels % config.k == 0,
        },
        **{"EVEN_F": hidden % config.n == 0, "PRECISION": precision(), **config.blocks(), "GROUP": 8},
    }
    grid = (config.programs(dy, rows * ceil_div(hidden, config.n)),)
    launch(gradient_kernel, grid, arguments, **config.settings())
    return dz, partial
