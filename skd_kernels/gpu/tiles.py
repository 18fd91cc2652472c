"""What the matrix products share: launch configurations, and how tiles are found, read and written.

Operands are read in whole tiles. On devices with tensor descriptors (TMA, sm_90 and later), half-precision operands
whose rows begin at multiples of 16 bytes are read and written through descriptors that the host makes: past the last
row and column these read zeros and write nothing. Otherwise tiles are read and written through pointers, with masks
of the same effect. No loop masks elements by the width, because the kernel that writes an operand also writes zeros
up to the end of the last tile.
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
        pieces: the number of slices of columns, 1, 2 or 4, in which the epilogue handles the tile.
        flatten: whether Triton merges the loops over tiles and inner steps into one, so that the loads of the next
            tile are in flight during the epilogue of this one.
        registers: the limit of a thread's registers; None leaves it to ptxas.
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
        """The size of a persistent grid, whose programs fill the device once and loop over the tiles."""
        return max(1, min(tiles, self.resident * device_of(like).multiprocessors))

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `launch`."""
        launched = {"num_warps": self.warps, "num_stages": self.stages}
        return {**launched, "max_registers": self.registers, "resident": self.resident}

    def blocks(self) -> dict[str, Any]:
        """The constexpr arguments of a kernel that loops over tiles."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "FLATTEN": self.flatten}

    def fitted(self, like: torch.Tensor) -> Config:
        """This configuration with no more stages than fit in shared memory beside the output tile staged there."""
        free = device_of(like).shared_memory - self.m * self.n // self.pieces * like.element_size()
        stages = free // ((self.m + self.n) * self.k * like.element_size())
        return replace(self, stages=max(1, min(self.stages, stages)))


def precision() -> str:
    """The `input_precision` of products: float32 stays float32 unless PyTorch's setting, old or new, allows TF32.

    With TF32 the tensor cores read float32 operands as they are in memory, so that their last 13 bits are truncated
    instead of rounded.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def small_config(like: torch.Tensor, channels: int, by_descriptor: bool) -> Config | None:
    """The configuration for products in which larger tiles would spill registers; None if this is not one of them.

    There are two such cases. float32 without TF32 runs on CUDA cores, which keep their operands in registers. And
    where 16 does not divide `channels`, the length of the rows of x, pointers load single elements, each of which
    needs an address in registers.
    """
    uneven = channels % 16 > 0 and not by_descriptor
    if like.element_size() == 4 and precision() == "ieee":
        if uneven:  # longer or pipelined steps would spill
            return Config(32, 32, 32, warps=8, stages=1, registers=255)
        return Config(64, 64, 32, warps=8, stages=3, registers=255)  # left to itself, ptxas spills to fit in 128
    if uneven:
        return Config(64, 64, 32, warps=8, stages=3)
    return Config(128, 64, 32, warps=8, stages=3) if like.element_size() == 4 else None


def inner_step(like: torch.Tensor) -> int:
    """BLOCK_K: 128 bytes of a row, which is a cache line and the width of the swizzle in shared memory."""
    return 128 // like.element_size()


def described(*matrices: torch.Tensor | None) -> bool:
    """Whether tensor descriptors can describe all of these matrices; those that are None do not count."""
    there = [matrix for matrix in matrices if matrix is not None]
    even = all(matrix.element_size() == 2 and matrix.stride(0) % 8 == 0 for matrix in there)
    return even and device_of(there[0]).has_descriptors


def large_tiles_fit(like: torch.Tensor, by_descriptor: bool) -> bool:
    """Whether a program has room for the largest tiles, or a multiprocessor for two programs with large ones.

    Addresses of pointers take registers that descriptors leave free, and sm_120 has only 99 KiB of shared memory.
    """
    return by_descriptor and device_of(like).architecture < 120


def operand(matrix: torch.Tensor | None, rows: int, columns: int, by_descriptor: bool) -> Any:
    """The argument for a kernel that reads or writes `matrix` in tiles of rows x columns: a descriptor or a tensor.

    The memory of `matrix` must begin at a multiple of 16 bytes (`buffers.as_rows`).
    """
    if matrix is None or not by_descriptor:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's type for `dtype`."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


# `triton.jit` for kernels that read a width. A width may be an element of a table, at any address, and Triton would
# compile one kernel for addresses aligned to 16 bytes and another for the rest; this decorator forbids that.
width_kernel = triton.jit(do_not_specialize_on_alignment=["width"])


@triton.jit
def read_width(width, full):
    """Load the width and clamp it to the valid range: a wrong value must not address memory outside the buffers."""
    return tl.minimum(tl.maximum(tl.load(width), 0), full)


@triton.jit
def rounded(kept):
    """The columns of one packed group: its kept coordinates, rounded up to a multiple of UNIT with zeros."""
    return (kept + 7) // 8 * 8


@triton.jit
def tile_of(index, rows, columns, GROUP: tl.constexpr):
    """(row, column) of the tile with this index.

    The order is grouped: bands of GROUP rows of tiles, each band column by column, so that programs that run at the
    same time share operands in the L2 cache.
    """
    # A flattened loop computes the position of its first tile even if there is no tile (width 0), and must not divide
    # by zero.
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

    WHOLE: no tile ends past the last column, so that columns need no mask; a mask along the contiguous dimension
    would prevent asynchronous copies.
    """
    if DESCRIBED:
        return matrix.load([row, column])
    else:
        i = tl.arange(0, HEIGHT)
        j = tl.arange(0, WIDTH)
        # A scalar pointer and 32-bit offsets take one register for each address; a tensor of pointers would take two.
        start = matrix + tl.cast(row, tl.int64) * stride + column
        inside = (i < rows - row)[:, None]
        if not WHOLE:
            inside = inside & (j < columns - column)[None, :]
        return tl.load(start + (i[:, None] * stride + j[None, :]), mask=inside, other=0.0)


@triton.jit
def load_transposed(
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
    """`load_tile` (HEIGHT, WIDTH), transposed: (WIDTH, HEIGHT).

    Through pointers it is loaded as it is used. A tile that is transposed after the load would not be copied
    asynchronously on sm_80: it would wait in registers.
    """
    if DESCRIBED:
        return matrix.load([row, column]).T
    else:
        i = tl.arange(0, HEIGHT)
        j = tl.arange(0, WIDTH)
        start = matrix + tl.cast(row, tl.int64) * stride + column
        inside = (i < rows - row)[None, :]
        if not WHOLE:
            inside = inside & (j < columns - column)[:, None]
        return tl.load(start + (i[None, :] * stride + j[:, None]), mask=inside, other=0.0)


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
