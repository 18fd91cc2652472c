"""Products whose inner dimension stops at a width on the device: a linear layer's output and its input's gradient."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from skd_kernels.gpu.buffers import ceil_div
from skd_kernels.gpu.launch import device_of, launch
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
def output_kernel(
    a,
    w,
    bias,
    y,
    width,
    tokens,
    channels,
    size,
    stride_a,
    stride_w,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = a[:, :width] w[:, :width]^T + bias; zeros, without the bias, at width 0. a is PADDED, see `dot_nt`."""
    depth = read_width(width, size)
    rows = tl.cdiv(tokens, BLOCK_M)
    columns = tl.cdiv(channels, BLOCK_N)
    for index in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        row, column = tile_of(index, rows, columns, GROUP)
        # Rows past the end repeat the last one: no mask in the loop, and their results are not stored.
        m = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - row * BLOCK_M)
        c = column * BLOCK_N + tl.arange(0, BLOCK_N)
        a_tile = a + (row * BLOCK_M).to(tl.int64) * stride_a
        a_rows = (m * stride_a)[:, None]
        w_rows = (tl.minimum(c, channels - 1) * stride_w)[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = dot_nt(total, a_tile, a_rows, w, w_rows, depth, size, BLOCK_K, True, EVEN, True, PRECISION)
        if bias is not None:
            total += tl.where(depth > 0, tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32), 0.0)[None, :]
        t = row * BLOCK_M + tl.arange(0, BLOCK_M)
        places = y + (row * BLOCK_M).to(tl.int64) * channels + tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
        tl.store(places, total.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (c < channels)[None, :])


@width_kernel
def input_gradient_kernel(
    dz,
    w,
    dx,
    width,
    tokens,
    channels,
    size,
    stride_dz,
    stride_w,
    part_dz,
    PARTS: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx = sum over PARTS of dz[part, :, :width] w[part, :width]; parts are `part_dz` columns, `size` rows apart."""
    depth = read_width(width, size)
    rows = tl.cdiv(tokens, BLOCK_M)
    columns = tl.cdiv(channels, BLOCK_N)
    for index in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        row, column = tile_of(index, rows, columns, GROUP)
        m = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - row * BLOCK_M)
        c = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (c < channels)[None, :]
        dz_tile = dz + (row * BLOCK_M).to(tl.int64) * stride_dz
        dz_rows = (m * stride_dz)[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            total = dot_nn(
                total,
                dz_tile + part * part_dz,
                dz_rows,
                w + part * size * stride_w,
                c[None, :],
                stride_w,
                inside,
                depth,
                BLOCK_K,
                False,
                True,
                EVEN_C,
                PRECISION,
            )
        t = row * BLOCK_M + tl.arange(0, BLOCK_M)
        places = dx + (row * BLOCK_M).to(tl.int64) * channels + tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
        tl.store(places, total.to(dx.dtype.element_ty), mask=(t < tokens)[:, None] & inside)


def linear_config(a: torch.Tensor, w: torch.Tensor, channels: int) -> Config:
    """For both kernels. A thread holds m * n / (32 * warps) float32 sums.

    Half precision on sm_90 and sm_100: 128 x 256 wants the fewest bytes from L2 for each product, and compiles
    without spills where no columns are masked. sm_80 feeds its tensor cores from registers, and sm_120 has 99 KiB of
    shared memory. TF32: 128 x 128 spills on sm_80.
    """
    large = 90 <= device_of(a).architecture < 120 and channels % 256 == 0
    columns = 64 if a.element_size() == 4 else 256 if large else 128
    config = Config(128, columns, inner_step(a), warps=8, stages=3)
    return small_config(a, w.stride(0), channels) or config


def output(
    a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, width: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """y (M, C) = a[:, :width] (M, >= F) @ w[:, :width]^T (C, F) + bias; a's rows are padded to whole tiles."""
    tokens, (channels, size) = a.shape[0], w.shape
    config = linear_config(a, w, channels)
    tiles = ceil_div(tokens, config.m) * ceil_div(channels, config.n)
    arguments: dict[str, Any] = {
        **{"a": a, "w": w, "bias": bias, "y": y, "width": width},
        **{"tokens": tokens, "channels": channels, "size": size, "stride_a": a.stride(0), "stride_w": w.stride(0)},
        **{"EVEN": size % config.k == 0, "PRECISION": precision(), **config.blocks(), "GROUP": 8},
    }
    grid = (config.programs(a, tiles),)
    launch(output_kernel, grid, arguments, **config.settings())
    return y


def input_gradient(dz: torch.Tensor, w: torch.Tensor, width: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    """dx (M, C) from dz (M, parts, padded F) and w (parts * F, C)."""
    parts = dz.shape[1]
    tokens, channels = dx.shape
    config = linear_config(dz, w, channels)
    tiles = ceil_div(tokens, config.m) * ceil_div(channels, config.n)
    arguments: dict[str, Any] = {
        **{"dz": dz, "w": w, "dx": dx, "width": width, "tokens": tokens, "channels": channels},
        **{"size": w.shape[0] // parts, "stride_dz": dz.stride(0), "stride_w": w.stride(0), "part_dz": dz.stride(1)},
        **{"PARTS": parts, "EVEN_C": channels % config.n == 0, "PRECISION": precision()},
        **{**config.blocks(), "GROUP": 8},
    }
    grid = (config.programs(dz, tiles),)
    launch(input_gradient_kernel, grid, arguments, **config.settings())
    return dx
