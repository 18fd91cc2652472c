"""In which precision and memory layout the steps of a run compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from skd.support.settings import TrainConfig


def amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of autocast; float32: none."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Inside the block a GPU may use TF32 for float32 products and convolutions; switches as they were after it.

    If not `enabled`, PyTorch's switches stay as they are. PyTorch's compiler reads the older switches, which raise an
    error if only the newer ones were set. Therefore the older ones are set first, unless the user set the newer ones.
    """
    if not enabled:
        yield
        return
    cudnn: Any = torch.backends.cudnn  # a module whose stub does not have all
    switches = (torch.backends.cuda.matmul, cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older is not None:
            torch.set_float32_matmul_precision("high")
            cudnn.allow_tf32 = True
        for switch in switches:
            switch.fp32_precision = "tf32"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def laid_out(images: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Images in the memory layout that the patch embedding is to compute in.

    The convolution takes its layout from its input; weights, and so checkpoints, stay as they are.
    """
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images
