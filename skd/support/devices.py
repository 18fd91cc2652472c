"""Devices by name. A device on which this installation cannot compute is refused with an error of one line."""

from __future__ import annotations

import torch


def usable_device(
    name: str | torch.device, option: str = "device", dtype: torch.dtype = torch.float32
) -> torch.device:
    """The device with this name; for "cuda" with its index, that of the current GPU.

    Args:
        name: "cpu", "cuda", "cuda:1", ...
        option: what messages call it.
        dtype: what has to be computed there.

    Raises:
        ValueError: there is no such device, or this installation cannot compute on it ("meta" computes nothing).
    """
    shown = f"{option} is {str(name)!r}"
    try:
        chosen = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{shown}: {str(error).splitlines()[0]}") from None
    if chosen.type == "meta":
        raise ValueError(f"{shown}, which cannot be used here: its tensors have no data; give cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{shown}; this PyTorch sees no GPU")
    if chosen.type == "cuda" and chosen.index is None:  # each process of torchrun has its own current GPU
        chosen = torch.device("cuda", torch.cuda.current_device())
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{shown}; there are {torch.cuda.device_count()} GPUs, counted from 0")
    try:  # PyTorch knows many names of devices, and this installation can compute on few of them
        torch.zeros(1, dtype=dtype, device=chosen).cpu()
    except Exception as error:  # the errors differ by kind of device, and some have no text, only a type
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ValueError(f"{shown}, which cannot be used here: {reason}") from None
    if chosen.type == "cpu" and chosen.index:
        raise ValueError(f"{shown}; there is one cpu")
    return chosen
