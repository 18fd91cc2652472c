"""The matrix products of the masked operations, all but the gradients of weights: one kernel, three epilogues.

    result (rows, columns) = a (rows, depth) b + what the epilogue makes of it

either the columns or the inner dimension stop at a width that the kernel reads on the device:

    epilogue      masked_mlp                        masked_attention            stops at the width
    "linear"                                        qkv = x W_qkv^T + bias      columns
                                                    do = dy W_proj              columns
                  y = h W_2^T + bias                y = o W_proj^T + bias       depth
                  dx = dz W_1                       dx = dqkv W_qkv             depth
    "activate"    h = act(x W_1^T + bias)                                       columns
    "gradient"    dz = (dy W_2) act'                                            columns

Weights come packed (packing.py): kept coordinates side by side, and zeros from there to the end of the tile. So do
the activations that these kernels write themselves, which is why no loop selects anything, and whatever lies further
behind is never read. A grid of programs that fills the device once walks over the tiles of the present width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.activations import in_kernel
from skd_kernels.gpu.buffers import ceil_div
from skd_kernels.gpu.epilogues import finish
from skd_kernels.gpu.launch import device_of, launch
from skd_kernels.gpu.tiles import (
    Config,
    described,
    inner_step,
    load_tile,
    operand,
    precision,
    read_width,
    rounded,
    small_config,
    tile_of,
    triton_type,
)


@dataclass(frozen=True)
class Width:
    """What stops at the width: `groups` times the kept ones of `full` coordinates.

    Attributes:
        value: 0-d int32 tensor on the device.
        full: F, or D of every head.
        groups: 1, or the number of heads; for qkv three times that.
    """

    value: torch.Tensor
    full: int
    groups: int = 1


def name_in_profiles(specialization: Any) -> str:
    """product_linear, product_activate or product_gradient."""
    return f"product_{specialization.constants['EPILOGUE']}"


@triton.jit(do_not_specialize_on_alignment=["width"], repr=name_in_profiles)  # as tiles.width_kernel, and named
def product_kernel(
    a,
    b,
    bias,
    out,
    kept,
    features,
    sums,
    width,
    rows,
    columns,
    depth,
    b_rows,
    full,
    groups,
    part,
    stride_a,
    stride_b,
    stride_out,
    stride_kept,
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
    """out = epilogue(a b), or a b^T if TRANSPOSED; `columns`, `depth` and `b_rows` are those of the buffers.

    PARTS: 2 for gated MLPs, whose parts lie `part` columns, in weights `part` rows, apart. The other operands are the
    epilogues'. WHOLE: `depth` is a multiple of BLOCK_K.
    """
    keep = groups * rounded(read_width(width, full))
    wide = keep if RAGGED_COLUMNS else columns
    steps = tl.cdiv(depth if RAGGED_COLUMNS else keep, BLOCK_K)
    tall = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(wide, BLOCK_N)
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
                k = step // steps * part + step % steps * BLOCK_K
            left = load_tile(a, row, k, rows, depth, stride_a, BLOCK_M, BLOCK_K, WHOLE, DESCRIBED)
            if TRANSPOSED:
                right = load_tile(b, column, k, b_rows, depth, stride_b, BLOCK_N, BLOCK_K, True, DESCRIBED)
                total = tl.dot(left, right.T, total, input_precision=PRECISION)
                if TWO:
                    right = load_tile(b, column + part, k, b_rows, depth, stride_b, BLOCK_N, BLOCK_K, True, DESCRIBED)
                    other = tl.dot(left, right.T, other, input_precision=PRECISION)
            else:
                right = load_tile(b, k, column, b_rows, columns, stride_b, BLOCK_K, BLOCK_N, True, DESCRIBED)
                total = tl.dot(left, right, total, input_precision=PRECISION)
        if not TWO:
            other = None
        finish(
            total, other, bias, out, kept, features, sums, keep, row, column, rows, columns, part, stride_out,
            stride_kept, stride_features, EPILOGUE, PARTS, ACT, TYPE, DESCRIBED, BLOCK_M, BLOCK_N, PIECES,
        )  # fmt: skip


# Launch configurations -------------------------------------------------------------------------------


def linear_config(like: torch.Tensor, channels: int, columns: int, depth: int, by_descriptor: bool) -> Config:
    """For "linear". On an H100 (prototypes, DeiT-Base): 687 TFLOP/s with 128 x 256 and 4 stages, flattened.

    Other widths of a network than multiples of 256 take the widest tile that wastes nothing. sm_80 feeds its tensor
    cores from registers, and sm_120 has 99 KiB of shared memory: 128 x 128 at most.
    """
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return small
    step = inner_step(like)
    if by_descriptor and device_of(like).architecture < 120:
        if depth <= 384:  # few steps: another program's product runs beside this one's epilogue
            return Config(128, 128 if columns > 64 else 64, step, warps=4, stages=3, resident=2, pieces=2)
        if columns % 256 == 0 or columns > 1024:
            return Config(128, 256, step, warps=8, stages=4, pieces=2, flatten=True)
        if columns % 128 == 0 or columns > 256:
            return Config(128, 128, step, warps=4, stages=4, pieces=2, flatten=True)
        return Config(128, 64, step, warps=4, stages=4, resident=2)
    return Config(128, 128, step, warps=8, stages=3)


def activate_config(like: torch.Tensor, channels: int, gated: bool, by_descriptor: bool) -> Config:
    """For "activate". On an H100 (prototypes, DeiT-Base) 0.279 ms, the stores alone 0.261; in 2 pieces 0.372.

    Gated, a program computes two tiles, of half the columns.
    """
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return replace(small, n=32, stages=min(small.stages, 2)) if gated else small
    if gated:
        return Config(128, 64, inner_step(like), warps=8, stages=3, resident=2, pieces=2)
    return Config(128, 128, inner_step(like), warps=8, stages=3, resident=2, pieces=4, flatten=True)


def gradient_config(like: torch.Tensor, channels: int, gated: bool, by_descriptor: bool) -> Config:
    """For "gradient", with the columns of `activate_config`: what that wrote is what this reads.

    On an H100 (prototypes, DeiT-Base) 0.263 ms, with scores 0.340. Without wgmma, or with addresses of pointers, the
    registers of 4 warps are too few.
    """
    n = activate_config(like, channels, gated, by_descriptor).n
    small = small_config(like, channels, by_descriptor)
    if small is not None:
        return replace(small, m=min(small.m, 64), n=n, registers=255)
    fits = by_descriptor and device_of(like).architecture < 120
    return Config(128, n, inner_step(like), warps=4 if fits else 8, stages=3, resident=2 if fits else 1, pieces=2)


def gradient_rows(dy: torch.Tensor, gated: bool) -> int:
    """Rows of tiles of "gradient" on dy (T, C), each of which has sums of its own."""
    return ceil_div(dy.shape[0], gradient_config(dy, dy.shape[1], gated, described(dy)).m)


# Launches ------------------------------------------------------------------------------------------


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    width: Width,
    *,
    epilogue: str = "linear",
    ragged_columns: bool,
    transposed: bool,
    parts: int = 1,
    part: int = 0,
    act: str = "",
    kept: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    columns: int,
) -> None:
    """Start `product_kernel` on matrices whose memory begins at multiples of 16 bytes.

    Args:
        a: (rows, depth), with `parts` of them side by side where the sum goes over both parts.
        b: (depth, columns), or if `transposed` (columns, depth): packed, and as long as whole tiles are.
        bias: (columns,), or None; with `ragged_columns` packed like b.
        out: (rows, columns), in two parts side by side for the "gradient" of a gated MLP.
        part: the distance of the parts, in columns of activations and in rows of weights.
        columns: of the result, or of one of its parts.
    """
    rows, depth = a.shape
    by_descriptor = described(a, b, out, kept, features)
    channels, gated = depth if ragged_columns else columns, parts == 2
    most = width.groups * width.full  # kept; buffers are padded
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
        **{"a": operand(a, m, k, by_descriptor), "bias": bias, "sums": sums, "width": width.value},
        **{"b": operand(b, n, k, by_descriptor) if transposed else operand(b, k, n, by_descriptor)},
        **{"out": operand(out, m, piece, by_descriptor), "kept": operand(kept, m, piece, by_descriptor)},
        **{"features": operand(features, m, piece, by_descriptor)},
        **{"rows": rows, "columns": columns, "depth": depth, "b_rows": b.shape[0]},
        **{"full": width.full, "groups": width.groups, "part": part},
        **{"stride_a": a.stride(0), "stride_b": b.stride(0), "stride_out": 0 if out is None else out.stride(0)},
        **{"stride_kept": 0 if kept is None else kept.stride(0)},
        **{"stride_features": 0 if features is None else features.stride(0)},
        **{"EPILOGUE": epilogue, "RAGGED_COLUMNS": ragged_columns, "TRANSPOSED": transposed, "PARTS": parts},
        **{"ACT": act and in_kernel(act, a.dtype), "TYPE": triton_type(a.dtype), "WHOLE": depth % k == 0},
        **{"DESCRIBED": by_descriptor, "PRECISION": precision(), "PIECES": config.pieces, "GROUP": 8},
        **config.blocks(),
    }
    launch(product_kernel, (config.programs(a, tall * across),), arguments, **config.settings())
