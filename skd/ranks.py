"""Sums over the processes of a torch.distributed group; each process holds a shard of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def check_group(group: Any) -> None:
    """`group` is None (this process alone) or a group of an initialised torch.distributed.

    Raises:
        ValueError: it is neither.
    """
    if group is None:
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group is given, but torch.distributed is not initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is a {type(group).__name__}; it must be a torch.distributed group or None")


def summed(tensors: Sequence[torch.Tensor], group: Any) -> list[torch.Tensor]:
    """Each tensor added up over the group, float64, the same bits on every rank; as they are without a group."""
    if group is None or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def total(number: int, group: Any, device: torch.device) -> int:
    """An integer (below 2**53) added up over the group."""
    (added,) = summed([torch.tensor(float(number), dtype=torch.float64, device=device)], group)
    return int(added)


def gathered(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The rows of all ranks, in rank order; the numbers of rows may differ."""
    if group is None:
        return tensor
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.cpu(), group=group)
    return torch.cat(parts).to(tensor.device)
