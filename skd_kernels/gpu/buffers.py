"""Shapes and memory of what the kernels read and write. Importing this module does not import Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PAD = 128  # a multiple of every tile along the hidden features
UNIT = 8  # Kept coordinates are rounded up to so many: 16 bytes in half precision. It divides every tile.


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def padded(size: int) -> int:
    """Row length of our own buffers: no tile that starts inside a row reaches past its end."""
    return ceil_div(size, PAD) * PAD


def uninitialised(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory on the device of `like`, with any content; zeros under ``torch.use_deterministic_algorithms``.

    Kernels leave what lies past the width as it is, so this alone decides whether all of a saved buffer repeats.
    """
    if torch.are_deterministic_algorithms_enabled():
        return like.new_zeros(shape, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as (rows, last dimension), contiguous along the last, from a multiple of 16 bytes on.

    A view where there is one. Parts of other tensors begin anywhere: kernels for those would be other ones than are
    compiled ahead of time, with more pointers than there are registers.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    # Rows may be farther apart than they are long, by multiples of 16; one row that stands for all has no distance.
    apart = flat.stride(0)
    even = apart == flat.shape[1] or (apart > flat.shape[1] and apart % 16 == 0)
    return flat if flat.stride(-1) == 1 and even and flat.data_ptr() % 16 == 0 else _copied(flat)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without gaps, from a multiple of 16 bytes on, for the reason above: itself, or a copy."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else _copied(tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def gradient_dtype(dtypes: Sequence[torch.dtype | None]) -> torch.dtype:
    """What an operation returns the gradients of parameters of these dtypes in: theirs, or float32 if they differ."""
    there = {dtype for dtype in dtypes if dtype is not None}
    return there.pop() if len(there) == 1 else torch.float32
