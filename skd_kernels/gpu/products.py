"""All matrix products of the masked operations except the gradients of weights: one kernel with three epilogues.

    result (rows, columns) = epilogue(a (rows, depth) b)

The kernel reads the width on the device. Either the columns of the result or the inner dimension end at that width:

    epilogue      masked_mlp                        masked_attention            ends at the width
    "linear"                                        qkv = x W_qkv^T + bias      columns
                                                    do = dy W_proj              columns
                  y = h W_2^T + bias                y = o W_proj^T + bias       depth
                  dx = dz W_1                       dx = dqkv W_qkv             depth
    "activate"    h = act(x W_1^T + bias)                                       columns
    "gradient"    dz = (dy W_2) act'                                            columns

Weights come packed (packing.py): the kept coordinates side by side, then zeros up to the end of the last tile that is
read. Activations are written in the same form. Therefore the inner loops need no mask for the width, and the memory
behind the zeros, which may hold NaN, is never read. The kernel is persistent: a grid that fills the device once loops
over the tiles of the current width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.activations import in_kernel
from skd_kernels.gpu.buffers import ceil_div
from skd_kernels.gpu.epilogues import finish
from skd_kernels.gpu.launch import launch
from skd_kernels.gpu.layout import Layout
from skd_kernels.gpu.tiles import (
    Config,
    described,
    inner_step,
    large_tiles_fit,
    load_tile,
    operand,
    precision,
    read_width,
    rounded,
    small_config,
    tile_of,
    triton_type,
)


def name_in_profiles(specialization: Any) -> str:
    """The name that profilers show: product_linear, product_activate or product_gradient."""
    return f"product_{specialization.constants['EPILOGUE']}"


@triton.jit(do_not_specialize_on_alignment=["width"], repr=name_in_profiles)  # tiles.width_kernel with a name
def product_kernel(
    a,
    b,
    bias,
    out,
    slopes,
    features,
    sums,
    width,
    rows,
    columns,
    depth,
    b_rows,
    full,
    groups,
    part_stride,
    stride_a,
    stride_b,
    stride_out,
    stride_slopes,
    stride_features,
    EPILOGUE: tl.constexpr,
    RAGGED_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = epilogue(a b), or epilogue(a b^T) if TRANSPOSED.

    `columns`, `depth` and `b_rows` are sizes of the buffers; the width may end a dimension earlier: the columns if
    RAGGED_COLUMNS, otherwise the depth. PARTS is 2 for gated MLPs: the values begin `part_stride` after the gates,
    counted in columns of activations and in rows of the first weight. WHOLE: `depth` is a multiple of BLOCK_K.
    epilogues.py explains bias, slopes, features and sums.
    """
    keep = groups * rounded(read_width(width, full))
    wide = keep if RAGGED_COLUMNS else columns
    steps = tl.cdiv(depth if RAGGED_COLUMNS else keep, BLOCK_K)
    tall = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(wide, BLOCK_N)
    # For a gated MLP, "activate" accumulates the tile of the gates and that of the values side by side (TWO), and the
    # dx product sums first over the gates, then over the values (TURNS).
    TWO: tl.constexpr = PARTS == 2 and EPILOGUE == "activate"
    TURNS: tl.constexpr = PARTS if EPILOGUE == "linear" else 1
    for index in tl.range(tl.program_id(0), tall * across, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_of(index, tall, across, GROUP)
        row *= BLOCK_M
        column *= BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TWO:
            other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, TURNS * steps):
            k = step * BLOCK_K
            if TURNS == 2:
                k = step // steps * part_stride + step % steps * BLOCK_K
            left = load_tile(a, row, k, rows, depth, stride_a, BLOCK_M, BLOCK_K, WHOLE, DESCRIBED)
            if TRANSPOSED:
                right = load_tile(b, column, k, b_rows, depth, stride_b, BLOCK_N, BLOCK_K, True, DESCRIBED)
                total = tl.dot(left, right.T, total, input_precision=PRECISION)
                if TWO:
                    right = load_tile(
                        b, column + part_stride, k, b_rows, depth, stride_b, BLOCK_N, BLOCK_K, True, DESCRIBED
                    )
                    other = tl.dot(left, right.T, other, input_precision=PRECISION)
            else:
                right = load_tile(b, k, column, b_rows, columns, stride_b, BLOCK_K, BLOCK_N, True, DESCRIBED)
                total = tl.dot(left, right, total, input_precision=PRECISION)
        if not TWO:
            other = None
        finish(
            total, other, bias, out, slopes, features, sums, keep, row, column, rows, columns, part_stride,
            stride_out, stride_slopes, stride_features, EPILOGUE, PARTS, ACT, TYPE, DESCRIBED, BLOCK_M, BLOCK_N,
            PIECES,
        )  # fmt: skip


# Launch configurations -------------------------------------------------------------------------------


def linear_config(like: torch.Tensor, channels: int, columns: int, depth: int, by_descriptor: bool) -> Config:
    """The configuration of "linear" products.

    A prototype of the kernel reached 687 TFLOP/s on an H100 at DeiT-Base, with tiles of 128 x 256, 4 stages and the
    flattened loop. Where 256 does not divide a small number of columns, the widest tile that wastes no columns is
    used. Tiles are at most 128 x 128 on sm_80, whose tensor cores read their operands from registers, and on sm_120,
    which has only 99 KiB of shared memory.
    """
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return small
    step = inner_step(like)
    if large_tiles_fit(like, by_descriptor):
        if depth <= 384:  # few steps: two resident programs overlap one's product with the other's epilogue
            return Config(128, 128 if columns > 64 else 64, step, warps=4, stages=3, resident=2, pieces=2)
        if columns % 256 == 0 or columns > 1024:
            return Config(128, 256, step, warps=8, stages=4, pieces=2, flatten=True)
        if columns % 128 == 0 or columns > 256:
            return Config(128, 128, step, warps=4, stages=4, pieces=2, flatten=True)
        return Config(128, 64, step, warps=4, stages=4, resident=2)
    return Config(128, 128, step, warps=8, stages=3)


def activate_config(like: torch.Tensor, channels: int, gated: bool, by_descriptor: bool) -> Config:
    """The configuration of "activate" products.

    A prototype of the kernel took 0.279 ms on an H100 at DeiT-Base, and 0.372 ms with 2 pieces instead of 4; its
    stores alone take 0.261 ms. In a gated MLP a program accumulates two tiles, so each has half the columns.
    """
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return replace(small, n=32, stages=min(small.stages, 2)) if gated else small
    resident = 2 if large_tiles_fit(like, by_descriptor) else 1
    if gated:
        return Config(128, 64, inner_step(like), warps=8, stages=3, resident=resident, pieces=2)
    return Config(128, 128, inner_step(like), warps=8, stages=3, resident=resident, pieces=4, flatten=True)


def gradient_config(like: torch.Tensor, channels: int, gated: bool, by_descriptor: bool) -> Config:
    """The configuration of "gradient" products.

    The tile has as many columns as in `activate_config`, because this kernel reads up to the end of the tiles that
    "activate" wrote. A prototype took 0.263 ms on an H100 at DeiT-Base, and 0.340 ms with scores. Without wgmma, or
    where pointers replace descriptors, 4 warps do not have enough registers, so that 8 are used.
    """
    n = activate_config(like, channels, gated, by_descriptor).n
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return replace(small, m=min(small.m, 64), n=n, registers=255)
    fits = large_tiles_fit(like, by_descriptor)
    return Config(128, n, inner_step(like), warps=4 if fits else 8, stages=3, resident=2 if fits else 1, pieces=2)


def gradient_rows(dy: torch.Tensor, gated: bool) -> int:
    """The number of rows of tiles of "gradient" on dy (T, C), which is the number of partial sums that it writes."""
    return ceil_div(dy.shape[0], gradient_config(dy, dy.shape[1], gated, described(dy)).m)


# Launches ------------------------------------------------------------------------------------------


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    width: torch.Tensor,
    layout: Layout,
    *,
    epilogue: str = "linear",
    ragged_columns: bool,
    transposed: bool,
    by_rows: bool,
    act: str = "",
    slopes: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """Start `product_kernel` on matrices whose memory begins at multiples of 16 bytes.

    Args:
        a: (rows, depth); the dx product of a gated MLP sums over the gates and the values, which are side by side.
        b: (depth, columns), or (columns, depth) if `transposed`; packed, and padded to whole tiles.
        bias: (columns,), or None; packed like b if `ragged_columns`.
        out: (rows, columns); for the "gradient" of a gated MLP it has two such parts side by side.
        width: the width, a 0-d int32 tensor.
        ragged_columns: whether the columns end at the width; otherwise the depth does. Without them, `out` is given.
        by_rows: whether the dimension that ends at the width is laid out as the rows of the inward weight (qkv, the
            pre-activations of an MLP); otherwise as the columns of the outward one.
    """
    rows, depth = a.shape
    groups, parts = layout.groups(by_rows), layout.parts(by_rows)
    columns = layout.columns(by_rows) if ragged_columns or out is None else out.shape[1]
    by_descriptor = described(a, b, out, slopes, features)
    channels, gated = depth if ragged_columns else columns, parts == 2
    most = groups // parts * layout.full  # kept coordinates of a part at full width, without the buffers' padding
    wide, deep = (most, depth) if ragged_columns else (columns, parts * most)
    if epilogue == "linear":
        config = linear_config(a, channels, wide, deep, by_descriptor)
    elif epilogue == "activate":
        config = activate_config(a, channels, gated, by_descriptor)
    else:
        config = gradient_config(a, channels, gated, by_descriptor)
    config = config.fitted(a)
    m, n, k, piece = config.m, config.n, config.k, config.n // config.pieces
    tall, across = ceil_div(rows, m), ceil_div(columns, n)
    arguments: dict[str, Any] = {
        **{"a": operand(a, m, k, by_descriptor), "bias": bias, "sums": sums, "width": width},
        **{"b": operand(b, n, k, by_descriptor) if transposed else operand(b, k, n, by_descriptor)},
        **{"out": operand(out, m, piece, by_descriptor), "slopes": operand(slopes, m, piece, by_descriptor)},
        **{"features": operand(features, m, piece, by_descriptor)},
        **{"rows": rows, "columns": columns, "depth": depth, "b_rows": b.shape[0]},
        **{"full": layout.full, "groups": groups // parts, "part_stride": layout.part_stride},
        **{"stride_a": a.stride(0), "stride_b": b.stride(0), "stride_out": 0 if out is None else out.stride(0)},
        **{"stride_slopes": 0 if slopes is None else slopes.stride(0)},
        **{"stride_features": 0 if features is None else features.stride(0)},
        **{"EPILOGUE": epilogue, "RAGGED_COLUMNS": ragged_columns, "TRANSPOSED": transposed, "PARTS": parts},
        **{"ACT": act and in_kernel(act, a.dtype), "TYPE": triton_type(a.dtype), "WHOLE": depth % k == 0},
        **{"DESCRIBED": by_descriptor, "PRECISION": precision(), "PIECES": config.pieces, "GROUP": 8},
        **config.blocks(),
    }
    launch(product_kernel, (config.programs(a, tall * across),), arguments, **config.settings())
