"""Argument checks shared by the operations. A wrong argument is a ValueError that names it."""

from __future__ import annotations

import numbers

import torch

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: object, shape: tuple[int | None, ...] | None = None) -> None:
    """Check that `tensor` is a dense floating-point tensor; a None in `shape` accepts any size."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it may be one of {FLOAT_DTYPES}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name} is {layout}; it must be a dense tensor")
    if shape is not None and tuple(tensor.shape) != shape:  # most often it is, and that is quickly seen
        fits = tensor.ndim == len(shape) and all(
            want is None or size == want for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            want = tuple("any" if size is None else size for size in shape)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have shape {want}")


def check_alike(name: str, tensor: torch.Tensor | None, other: str, like: torch.Tensor) -> None:
    """Check that `tensor` has the device of `like`, and its dtype unless autocast casts both anyway."""
    if tensor is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; {other} is on {like.device}")
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise ValueError(f"{name} has dtype {tensor.dtype}; {other} has {like.dtype}")


def check_pair(x: torch.Tensor, grad: torch.Tensor) -> None:
    """Check that `x` and `grad`, features and their gradients, have the same shape, dtype and device."""
    check_tensor("x", x)
    check_tensor("grad", grad)
    if grad.shape != x.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must have the shape of x, {tuple(x.shape)}")
    if grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(f"grad is {grad.dtype} on {grad.device}; it must be like x, {x.dtype} on {x.device}")


def check_width(width: object, full: int, device: torch.device) -> None:
    """Check that `width` is an int in 0..full, or a 0-d integer tensor on `device`, whose value is not read."""
    if isinstance(width, torch.Tensor):
        if width.ndim != 0 or width.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"width is a {width.dtype} tensor of shape {tuple(width.shape)}; "
                "it must be an int or a 0-d int32 tensor"
            )
        if width.device != device:
            raise ValueError(f"width is on {width.device}; x is on {device}")
    elif isinstance(width, bool) or not isinstance(width, numbers.Integral):
        raise ValueError(f"width is {width!r}; it must be an int or a 0-d int32 tensor")
    else:
        check_range(int(width), full)


def check_range(width: int, full: int) -> int:
    """Return `width` if it is in 0..full.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= width <= full:
        raise ValueError(f"width is {width}; it may be 0..{full}")
    return width


def check_scores(scores: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Check the buffer to which the backward pass adds scores: float32, or float64 for float64 work."""
    if scores is None:
        return
    check_tensor("scores", scores, shape)
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores has dtype {scores.dtype}; it may be float32 or float64")
    if scores.device != device:
        raise ValueError(f"scores is on {scores.device}; x is on {device}")
    if any(step == 0 and size > 1 for step, size in zip(scores.stride(), scores.shape, strict=True)):
        raise ValueError("scores is an expanded tensor; every number must have memory of its own")
    if scores.requires_grad:
        raise ValueError("scores requires grad; it must be a plain buffer")
