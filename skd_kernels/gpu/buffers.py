"""Shapes and memory of what the kernels read and write. Importing this module does not import Triton."""

from __future__ import annotations

import torch

PAD = 128  # a multiple of every tile along the hidden features


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
    """`tensor` as (rows, last dimension), contiguous along the last: a view where there is one."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
