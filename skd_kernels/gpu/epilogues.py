"""The epilogues of the matrix products: what happens to an accumulator tile before it leaves the registers.

products.py lists the epilogues. An epilogue handles the tile in slices of columns, one after the other, because the
temporaries of a slice (bias, slopes, converted results) need registers beside the accumulator.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from skd_kernels.gpu.activations import activate
from skd_kernels.gpu.tiles import halves, load_tile, store_tile


@triton.jit
def finish(
    total,
    other,
    bias,
    out,
    slopes,
    features,
    sums,
    keep,
    row,
    column,
    rows,
    columns,
    part_stride,
    stride_out,
    stride_slopes,
    stride_features,
    EPILOGUE: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    TYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Apply EPILOGUE to the tile at (row, column).

    `total` is the accumulator; `other` is the second one, that of a gated MLP's values, or None. The tile is cut into
    PIECES slices of columns: this function halves it and calls itself until PIECES is 1.
    """
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = halves(total, HEIGHT, WIDTH)
        if other is None:
            other_left = None
            other_right = None
        else:
            other_left, other_right = halves(other, HEIGHT, WIDTH)
        finish(
            left, other_left, bias, out, slopes, features, sums, keep, row, column, rows, columns, part_stride,
            stride_out, stride_slopes, stride_features, EPILOGUE, PARTS, ACT, TYPE, DESCRIBED, HEIGHT, HALF,
            PIECES // 2,
        )  # fmt: skip
        finish(
            right, other_right, bias, out, slopes, features, sums, keep, row, column + HALF, rows, columns,
            part_stride, stride_out, stride_slopes, stride_features, EPILOGUE, PARTS, ACT, TYPE, DESCRIBED, HEIGHT,
            HALF, PIECES // 2,
        )  # fmt: skip
    elif EPILOGUE == "linear":
        if bias is not None:
            shift = load_bias(bias, column, columns, TYPE, WIDTH)
            total += tl.where(keep > 0, shift, 0.0)[None, :]
        store_tile(out, total, row, column, rows, columns, stride_out, TYPE, HEIGHT, WIDTH, DESCRIBED)
    elif EPILOGUE == "activate":
        activate_tile(
            total, other, bias, out, slopes, row, column, rows, columns, part_stride, stride_out, stride_slopes,
            ACT, TYPE, DESCRIBED, HEIGHT, WIDTH,
        )  # fmt: skip
    else:
        tl.static_assert(EPILOGUE == "gradient")
        differentiate_tile(
            total, out, slopes, features, sums, row, column, rows, columns, part_stride, stride_out, stride_slopes,
            stride_features, PARTS, TYPE, DESCRIBED, HEIGHT, WIDTH,
        )  # fmt: skip


@triton.jit
def load_bias(bias, column, columns, TYPE: tl.constexpr, WIDTH: tl.constexpr):
    """The bias of one tile in float32, rounded to TYPE first, as a linear layer that computes in TYPE rounds it."""
    j = column + tl.arange(0, WIDTH)
    return tl.load(bias + j, mask=j < columns, other=0.0).to(TYPE).to(tl.float32)


@triton.jit
def activate_tile(
    gate,
    value,
    bias,
    out,
    slopes,
    row,
    column,
    rows,
    columns,
    part_stride,
    stride_out,
    stride_slopes,
    ACT: tl.constexpr,
    TYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write out = act(gate) and, unless `slopes` is None, the derivative act'(gate) into `slopes`.

    `gate` is the pre-activation. The backward pass only has to multiply by the saved derivative. In a gated MLP
    out = act(gate) value; `slopes` then holds two parts, the derivative with respect to the gate, act'(gate) value,
    and the derivative with respect to the value, act(gate).
    """
    if bias is not None:
        gate += load_bias(bias, column, columns, TYPE, WIDTH)[None, :]
    result, slope = activate(gate, ACT)
    if value is None:
        if slopes is not None:
            store_tile(slopes, slope, row, column, rows, columns, stride_slopes, TYPE, HEIGHT, WIDTH, DESCRIBED)
        store_tile(out, result, row, column, rows, columns, stride_out, TYPE, HEIGHT, WIDTH, DESCRIBED)
    else:
        if bias is not None:
            value += load_bias(bias, part_stride + column, part_stride + columns, TYPE, WIDTH)[None, :]
        if slopes is not None:
            end = part_stride + columns
            by_gate = slope * value
            store_tile(slopes, by_gate, row, column, rows, columns, stride_slopes, TYPE, HEIGHT, WIDTH, DESCRIBED)
            store_tile(
                slopes, result, row, part_stride + column, rows, end, stride_slopes, TYPE, HEIGHT, WIDTH, DESCRIBED
            )
        product = result * value
        store_tile(out, product, row, column, rows, columns, stride_out, TYPE, HEIGHT, WIDTH, DESCRIBED)


@triton.jit
def differentiate_tile(
    dh,
    out,
    slopes,
    features,
    sums,
    row,
    column,
    rows,
    columns,
    part_stride,
    stride_out,
    stride_slopes,
    stride_features,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write out = dh * slopes for each part, where `dh` is the gradient at the hidden features h (`features`).

    `sums` (rows of tiles, PARTS + 1, columns) float32 gets the column sums over this tile: of `out` for each part
    (the gradient of the bias), then of |dh * h| (the Taylor scores). `out`, `features` and `sums` may each be None;
    what they would hold is then not computed.
    """
    place = None
    if sums is not None:
        place = sums + row // HEIGHT * (PARTS + 1) * columns + column + tl.arange(0, WIDTH)
    for p in tl.static_range(PARTS):
        at = p * part_stride + column
        end = p * part_stride + columns
        slope = load_tile(slopes, row, at, rows, end, stride_slopes, HEIGHT, WIDTH, True, DESCRIBED)
        dz = dh * slope.to(tl.float32)
        if out is not None:
            store_tile(out, dz, row, at, rows, end, stride_out, TYPE, HEIGHT, WIDTH, DESCRIBED)
        if sums is not None:
            tl.store(place + p * columns, tl.sum(dz, 0))
    if features is not None:
        h = load_tile(features, row, column, rows, columns, stride_features, HEIGHT, WIDTH, True, DESCRIBED)
        tl.store(place + PARTS * columns, tl.sum(tl.abs(h.to(tl.float32) * dh), 0))
