"""What the matrix products share: the order of tiles, the loops over the inner dimension, launch configurations.

The inner loops load whole tiles without a mask along the contiguous dimension, which would forbid asynchronous
copies. Only the last, incomplete step is selected in registers; selected and not multiplied, since whatever lies past
the width may be NaN.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.launch import device_of


@dataclass(frozen=True)
class Config:
    """One launch configuration of a matrix product.

    Attributes:
        m, n, k: rows and columns of the tile that a program computes, and the length of one inner step.
        warps, stages: as Triton defines them.
        resident: programs that fit on a multiprocessor together, by registers and shared memory.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int = 1

    def programs(self, like: torch.Tensor, tiles: int) -> int:
        """Programs of a persistent grid: they fill the device once and walk over the tiles of the current width."""
        return max(1, min(tiles, self.resident * device_of(like).multiprocessors))

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


def precision() -> str:
    """float32 products stay float32 unless PyTorch's own switch, in its old form or its new, allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def tile_of(index, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile: bands of GROUP rows, column by column, so that neighbours share operands in L2."""
    band = GROUP * columns
    first = index // band * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + index % band % height, index % band // height


@triton.jit
def dot_nt(
    total,
    a,
    b,
    depth,
    size,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + a[:, :depth] b[:, :depth]^T, both contiguous along the inner dimension.

    a (rows, 1) and b (columns, 1) are pointers to the rows. `size` is how much of b's rows may be read; EVEN: it is a
    multiple of BLOCK_K. PADDED: a is zero from depth to the end of the step. TAIL False: depth is a multiple of
    BLOCK_K.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    whole = depth // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        left = tl.load(a + (start + k))
        right = tl.load(b + (start + k))
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    if TAIL:  # noqa: SIM102  (known at compile time)
        if whole < depth:
            rest = whole + k
            if EVEN:
                right = tl.load(b + rest)
            else:
                right = tl.load(b + rest, mask=rest < size, other=0.0)
            if PADDED:
                left = tl.load(a + rest)
            else:
                left = tl.load(a + rest, mask=rest < depth, other=0.0)
            right = tl.where(rest < depth, right, 0.0)
            total = tl.dot(left, right.T, total, input_precision=PRECISION)
    return total


@triton.jit
def dot_nn(
    total,
    a,
    b,
    stride_b,
    inside,
    depth,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + a[:, :depth] b[:depth], a contiguous along the inner dimension and b along its columns.

    a (rows, 1) points to the rows, b (1, columns) to the first row's columns; `inside` (1, columns) says which of
    those exist, EVEN_N that all do. WHOLE: depth is a multiple of BLOCK_K. PADDED: as in `dot_nt`. A mask on b's rows
    is the same along the contiguous dimension, so it forbids nothing.
    """
    k = tl.arange(0, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        if WHOLE or PADDED:
            left = tl.load(a + (start + k)[None, :])
        else:
            left = tl.load(a + (start + k)[None, :], mask=(start + k)[None, :] < depth, other=0.0)
        places = b + (start + k)[:, None] * stride_b
        if WHOLE and EVEN_N:
            right = tl.load(places)
        elif EVEN_N:
            right = tl.load(places, mask=(start + k)[:, None] < depth, other=0.0)
        else:
            right = tl.load(places, mask=((start + k)[:, None] < depth) & inside, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total
