"""What the matrix products share: the order of tiles, the loops over the inner dimension, launch configurations.

The inner loops load whole tiles without a mask along the contiguous dimension, which would forbid asynchronous
copies. Only the last, incomplete step is selected in registers; selected and not multiplied, since whatever lies past
the width may be NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        registers: the most that a thread may take; None leaves it to ptxas.
        resident: programs that fit on a multiprocessor together, by registers and shared memory.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int | None = None
    resident: int = 1

    def programs(self, like: torch.Tensor, tiles: int) -> int:
        """Programs of a persistent grid: they fill the device once and walk over the tiles of the current width."""
        return max(1, min(tiles, self.resident * device_of(like).multiprocessors))

    def settings(self) -> dict[str, Any]:
        """For `launch`."""
        return {"num_warps": self.warps, "num_stages": self.stages, "max_registers": self.registers}

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


def precision() -> str:
    """float32 products stay float32 unless PyTorch's own switch, in its old form or its new, allows TF32.

    Then the tensor cores read the operands as they lie in memory: the last 13 bits are cut off, not rounded.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def small_config(like: torch.Tensor, *strides: int) -> Config | None:
    """The configuration of products on which the large tiles would spill, or None.

    float32 without TF32 runs on the ordinary cores, which keep their operands in registers. And Triton asks of a row
    length only whether 16 divides it: otherwise it loads element by element, with an address for each.
    """
    uneven = any(stride % 16 for stride in strides)
    if like.dtype == torch.float32 and precision() == "ieee":
        if uneven:  # longer steps, or steps that overlap, would need more registers than ptxas finds
            return Config(32, 32, 32, warps=8, stages=1, registers=255)
        return Config(64, 64, 32, warps=8, stages=3, registers=168)  # left to itself, ptxas spills to fit in 128
    return Config(64, 64, 32, warps=8, stages=3) if uneven else None


def inner_step(like: torch.Tensor) -> int:
    """128 bytes of a row: what a swizzled tile in shared memory holds of it, and one cache line.

    Every tile of hidden features has a multiple of that many columns: a step that begins in a tile ends in it.
    """
    return 128 // like.element_size()


# Triton would compile twice, for 16-byte-aligned and for other addresses. A width may be an element of a table, at
# any address, so kernels are not specialised on the alignment of the width's pointer.
width_kernel = triton.jit(do_not_specialize_on_alignment=["width"])


@triton.jit
def read_width(width, full):
    """Load the width and clamp it to the valid range: a wrong value must not address memory outside the buffers."""
    return tl.minimum(tl.maximum(tl.load(width), 0), full)


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
    a_rows,
    b,
    b_rows,
    depth,
    size,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + a[:, :depth] b[:, :depth]^T, both contiguous along the inner dimension.

    a_rows (rows, 1) and b_rows (columns, 1) are where the rows begin, counted from the scalar pointers a and b: one
    32-bit register for each address, which a tensor of pointers would double. `size` is how much of b's rows may be
    read; EVEN: it is a multiple of BLOCK_K. PADDED: a is zero from depth to the end of the step. TAIL False: depth is
    a multiple of BLOCK_K.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    whole = depth // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        left = tl.load(a + start + (a_rows + k))
        right = tl.load(b + start + (b_rows + k))
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    if TAIL:  # noqa: SIM102  (known at compile time)
        if whole < depth:
            rest = whole + k
            if EVEN:
                right = tl.load(b + whole + (b_rows + k))
            else:
                right = tl.load(b + whole + (b_rows + k), mask=rest < size, other=0.0)
            if PADDED:
                left = tl.load(a + whole + (a_rows + k))
            else:
                left = tl.load(a + whole + (a_rows + k), mask=rest < depth, other=0.0)
            right = tl.where(rest < depth, right, 0.0)
            total = tl.dot(left, right.T, total, input_precision=PRECISION)
    return total


@triton.jit
def dot_nn(
    total,
    a,
    a_rows,
    b,
    b_columns,
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

    a, a_rows, PADDED: as in `dot_nt`. b_columns (1, columns) are places in b's first row; `inside` (1, columns) says
    which of them exist, EVEN_N that all do. WHOLE: depth is a multiple of BLOCK_K. A mask on b's rows is the same
    along the contiguous dimension, so it forbids nothing.
    """
    k = tl.arange(0, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        if WHOLE or PADDED:
            left = tl.load(a + start + (a_rows + k[None, :]))
        else:
            left = tl.load(a + start + (a_rows + k[None, :]), mask=k[None, :] < depth - start, other=0.0)
        places = b + start * stride_b + (k[:, None] * stride_b + b_columns)
        if WHOLE and EVEN_N:
            right = tl.load(places)
        elif EVEN_N:
            right = tl.load(places, mask=k[:, None] < depth - start, other=0.0)
        else:
            right = tl.load(places, mask=(k[:, None] < depth - start) & inside, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total
