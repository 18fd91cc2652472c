"""Checks and casts of the masked operations before their Triton kernels. Importing it does not import Triton."""

from __future__ import annotations

import importlib.util
import math
import os

import torch

from skd_kernels._dispatch import TensorSpec, forced

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it once, when it is imported
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Offsets inside weights are 32-bit; offsets of tokens are 64-bit.
LARGEST_WEIGHT = 2**31 - 1


def refuses_triton(x: TensorSpec, *parameters: TensorSpec | None) -> str | None:
    """The reason why the Triton kernels cannot take x (B, N, C) and these weights and biases, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if x.device == "cpu":
        if not INTERPRETED:
            return "Triton has no CPU target (TRITON_INTERPRET=1 interprets the kernels)"
        if forced() != "triton":
            return "kernels are interpreted only where use('triton') asks for it"
    elif x.device != "cuda":
        return f"there is no kernel for {x.device}"
    elif (capability := _capability()) < (8, 0):
        return f"it needs compute capability 8.0; the device has {capability[0]}.{capability[1]}"
    for tensor in parameters:
        if tensor is not None and math.prod(tensor.shape) > LARGEST_WEIGHT:
            return f"a weight of shape {tensor.shape} has 2^31 elements or more"
    return refuses_tensors(DTYPES, x, *parameters)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability() -> tuple[int, int]:
    """The compute capability of the current device; without one, that of an A100, so that `explain` can answer."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


def refuses_tensors(dtypes: tuple[torch.dtype, ...], *tensors: TensorSpec | None) -> str | None:
    """The reason why kernels for `dtypes` cannot take these tensors, after autocast has cast them, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = after_autocast(tensor.dtype, tensor.device)
        if dtype not in dtypes:
            return f"there is no kernel for {dtype}"
        if 0 in tensor.shape:
            return f"a tensor of shape {tensor.shape} is empty"
    return None


def cast_as_linear(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, cast as ``F.linear`` casts its arguments: under autocast to its dtype, except for float64."""
    return tensor.to(after_autocast(tensor.dtype, tensor.device.type))


def after_autocast(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which ``F.linear`` computes on tensors of `dtype`."""
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def device_width(width: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`width` as the 0-d int32 tensor on `device` that kernels read; an int is written there without a copy."""
    if isinstance(width, torch.Tensor):
        return width.to(torch.int32)
    return torch.full((), int(width), dtype=torch.int32, device=device)
