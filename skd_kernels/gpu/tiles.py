"""What the matrix products share: launch configurations, and how tiles are found, read and written.

An operand is read in whole tiles. Where the device has descriptors of tensors (sm_90 and later), and the operand is
of half precision and begins at multiples of 16 bytes, a descriptor made by the host copies tiles: past the last row
and column it reads zeros and writes nothing. Elsewhere tiles are read and written through pointers, with the same
meaning. No loop selects elements by the width: whoever writes an operand writes zeros up to the end of its tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from skd_kernels.gpu.launch import device_of


@dataclass(frozen=True)
class Config:
    """One launch configuration of a matrix product.

    Attributes:
        m, n, k: rows and columns of the tile that a program computes, and the length of one inner step.
        warps, stages: as Triton defines them.
        resident: programs that fit on a multiprocessor together, by registers and shared memory.
        pieces: into how many pieces of columns the tile is cut for what follows the product: 1, 2 or 4.
        flatten: whether the loops over tiles and steps become one, so that the next tile's loads are under way
            while this tile is finished.
        registers: the most that a thread may take; None leaves it to ptxas.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int = 1
    pieces: int = 1
    flatten: bool = False
    registers: int | None = None

    def programs(self, like: torch.Tensor, tiles: int) -> int:
        """Programs of a persistent grid: they fill the device once and walk over the tiles of the current width."""
        return max(1, min(tiles, self.resident * device_of(like).multiprocessors))

    def settings(self) -> dict[str, Any]:
        """For `launch`."""
        launched = {"num_warps": self.warps, "num_stages": self.stages}
        return {**launched, "max_registers": self.registers, "resident": self.resident}

    def blocks(self) -> dict[str, Any]:
        """The constants of a kernel that loops over tiles."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "FLATTEN": self.flatten}

    def fitted(self, like: torch.Tensor) -> Config:
        """With as many stages as the device's shared memory holds beside the tile that leaves through it."""
        free = device_of(like).shared_memory - self.m * self.n // self.pieces * like.element_size()
        stages = free // ((self.m + self.n) * self.k * like.element_size())
        return replace(self, stages=max(1, min(self.stages, stages)))


def precision() -> str:
    """float32 products stay float32 unless PyTorch's own switch, in its old form or its new, allows TF32.

    Then the tensor cores read the operands as they lie in memory: the last 13 bits are cut off, not rounded.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def small_config(like: torch.Tensor, channels: int, by_descriptor: bool) -> Config | None:
    """The configuration of products on which the large tiles would spill, or None.

    float32 without TF32 runs on the ordinary cores, which keep their operands in registers. And where 16 does not
    divide `channels`, the length of the rows of x, pointers load element by element, with an address for each.
    """
    uneven = channels % 16 > 0 and not by_descriptor
    if like.element_size() == 4 and precision() == "ieee":
        if uneven:  # longer steps, or steps that overlap, would need more registers than ptxas finds
            return Config(32, 32, 32, warps=8, stages=1, registers=255)
        return Config(64, 64, 32, warps=8, stages=3, registers=255)  # left to itself, ptxas spills to fit in 128
    if uneven:
        return Config(64, 64, 32, warps=8, stages=3)
    return Config(128, 64, 32, warps=8, stages=3) if like.element_size() == 4 else None


def inner_step(like: torch.Tensor) -> int:
    """128 bytes of a row: what a swizzled tile in shared memory holds of it, and one cache line."""
    return 128 // like.element_size()


def described(*matrices: torch.Tensor | None) -> bool:
    """Whether descriptors can describe all of these matrices, as far as they are there."""
    there = [matrix for matrix in matrices if matrix is not None]
    even = all(matrix.element_size() == 2 and matrix.stride(0) % 8 == 0 for matrix in there)
    return even and device_of(there[0]).has_descriptors


def operand(matrix: torch.Tensor | None, rows: int, columns: int, by_descriptor: bool) -> Any:
    """`matrix` as a kernel takes it that reads or writes it in tiles of rows x columns.

    Its memory begins at a multiple of 16 bytes (`buffers.as_rows`).
    """
    if matrix is None or not by_descriptor:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def triton_type(dtype: torch.dtype) -> Any:
    """The element type `dtype` as kernels name it."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


# Triton would compile twice, for 16-byte-aligned and for other addresses. A width may be an element of a table, at
# any address, so kernels are not specialised on the alignment of the width's pointer.
width_kernel = triton.jit(do_not_specialize_on_alignment=["width"])


@triton.jit
def read_width(width, full):
    """Load the width and clamp it to the valid range: a wrong value must not address memory outside the buffers."""
    return tl.minimum(tl.maximum(tl.load(width), 0), full)


@triton.jit
def rounded(kept):
    """Kept coordinates of one group, with the zeros behind them up to a multiple of UNIT."""
    return (kept + 7) // 8 * 8


@triton.jit
def tile_of(index, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile: bands of GROUP rows, column by column, so that neighbours share operands in L2."""
    # A flattened loop computes the first tile even if there is none: nothing is divided by zero.
    band = GROUP * tl.maximum(columns, 1)
    first = index // band * GROUP
    height = tl.maximum(tl.minimum(rows - first, GROUP), 1)
    return first + index % band % height, index % band // height


@triton.jit
def load_tile(
    matrix,
    row,
    column,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """The tile of `matrix` (rows, columns) that begins at (row, column); zeros past its end.

    WHOLE: no tile ends past the last column. A mask along the contiguous dimension forbids asynchronous copies.
    """
    if DESCRIBED:
        return matrix.load([row, column])
    else:
        i = tl.arange(0, HEIGHT)
        j = tl.arange(0, WIDTH)
        # One scalar pointer, and a register of 32 bits for each address: a tensor of pointers would take two.
        start = matrix + tl.cast(row, tl.int64) * stride + column
        inside = (i < rows - row)[:, None]
        if not WHOLE:
            inside = inside & (j < columns - column)[None, :]
        return tl.load(start + (i[:, None] * stride + j[None, :]), mask=inside, other=0.0)


@triton.jit
def store_tile(
    matrix,
    value,
    row,
    column,
    rows,
    columns,
    stride,
    TYPE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Write a tile of float32 values as TYPE; what lies past the end of `matrix` is left out."""
    if DESCRIBED:
        matrix.store([row, column], value.to(TYPE))
    else:
        i = tl.arange(0, HEIGHT)
        j = tl.arange(0, WIDTH)
        start = matrix + tl.cast(row, tl.int64) * stride + column
        inside = (i < rows - row)[:, None] & (j < columns - column)[None, :]
        tl.store(start + (i[:, None] * stride + j[None, :]), value.to(TYPE), mask=inside)


@triton.jit
def halves(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tile.reshape((HEIGHT, 2, WIDTH // 2)).permute((0, 2, 1)).split()
