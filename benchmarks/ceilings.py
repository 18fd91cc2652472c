"""What the device can do at most, measured: a large matrix product and a large copy."""

from __future__ import annotations

import functools

import torch

from benchmarks.timing import Call, on_device, wall

TIMES = 20


@functools.cache
def matmul(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a product of two large square matrices."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(device, lambda: a @ b)


@functools.cache
def copy(device: str) -> float:
    """Bytes read and written per second by a copy between buffers that no cache holds."""
    source = torch.ones((1 << 30) if device == "cuda" else (128 << 20), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _seconds(device: str, call: Call) -> float:
    """The shortest of several: what others on the machine take away is none of its limits."""
    clock = on_device if device == "cuda" else wall
    call()
    return min(clock(call) for _ in range(TIMES))
