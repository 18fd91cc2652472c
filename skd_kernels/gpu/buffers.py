"""Shapes and memory of what the kernels read and write. Importing this module does not import Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PAD = 128  # A multiple of every inner step of the products, and of every tile of hidden features.
UNIT = 8  # Packed groups are padded to multiples of this: 16 bytes in half precision. It divides every tile.


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def padded(size: int) -> int:
    """The row length of our own buffers: no tile that is read through pointers crosses the end of a row.

    Tiles of 256 columns may, which only descriptors read and write: they clip them.
    """
    return ceil_div(size, PAD) * PAD


def uninitialised(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised memory on the device of `like`; zeros under ``torch.use_deterministic_algorithms``.

    Kernels do not write past the width, so without these zeros a saved buffer would differ there from run to run.
    """
    if torch.are_deterministic_algorithms_enabled():
        return like.new_zeros(shape, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as (rows, last dimension), contiguous along the last, in memory that is aligned to 16 bytes.

    It is a view where that is possible. A tensor at another address, such as a slice of another tensor, is copied:
    Triton would specialise the kernel for unaligned addresses, and that variant, which is not compiled ahead of time,
    needs more registers than there are.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    # The stride of rows may exceed their length if it is a multiple of 16; a broadcast row (stride 0) is copied.
    apart = flat.stride(0)
    even = apart == flat.shape[1] or (apart > flat.shape[1] and apart % 16 == 0)
    return flat if flat.stride(-1) == 1 and even and flat.data_ptr() % 16 == 0 else _copied(flat)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it, contiguous and aligned to 16 bytes; `as_rows` says why."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else _copied(tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def gradient_dtype(dtypes: Sequence[torch.dtype | None]) -> torch.dtype:
    """The dtype of the gradients of parameters with these dtypes: their common one, or float32 if they differ."""
    there = {dtype for dtype in dtypes if dtype is not None}
    return there.pop() if len(there) == 1 else torch.float32
