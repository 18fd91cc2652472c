"""The processes of a torch.distributed process group: sums over their shards of the images, and steps taken together.

A collective that one process never reaches leaves the others waiting. Therefore whatever may fail on one process
alone is done in `together`, or its batches come from `in_step`: then all processes fail, and each says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")

# The codes that each process reports at its turn in `in_step`; the largest code decides for all.
_GO, _END, _EMPTY, _STOP, _FAILED = 0, 1, 2, 100, 1000  # _STOP plus the number of the signal


_EQUAL = "each needs one at least, and for training as many as the others"


class RankFailed(RuntimeError):
    """Another process of the group has failed, or has gone."""


class StopAll(Exception):
    """A signal asked this process, or in `in_step` any process of the group, to stop where the run can be saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def check_group(group: ProcessGroup | None) -> None:
    """`group` is None (this process alone) or a group of an initialised torch.distributed, with gloo for the CPU.

    Raises:
        ValueError: it is neither.
    """
    if group is None:
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group is given, but torch.distributed is not initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is a {type(group).__name__}; it must be a torch.distributed group or None")
    if "gloo" not in dist.get_backend_config(group):
        raise ValueError(
            f"group has the backend {dist.get_backend_config(group)}; agreement between processes needs gloo on the "
            "CPU: init_process_group('cpu:gloo,cuda:nccl')"
        )


def rank_of(group: ProcessGroup | None) -> int:
    """This process's number in the group."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: ProcessGroup | None) -> int:
    """The number of processes."""
    return 1 if group is None else dist.get_world_size(group)


# Sums


def summed(tensors: Sequence[torch.Tensor], group: ProcessGroup | None) -> list[torch.Tensor]:
    """Each tensor summed over the group, in float64, with the same bits on every rank; unchanged without a group."""
    if group is None or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    with others_alive(group):
        dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def total(number: int, group: ProcessGroup | None, device: torch.device) -> int:
    """An integer (below 2**53) summed over the group."""
    (added,) = summed([torch.tensor(float(number), dtype=torch.float64, device=device)], group)
    return int(added)


def gathered(tensor: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """The rows of all ranks, in rank order; the numbers of rows may differ."""
    if group is None:
        return tensor
    return torch.cat(everyone(tensor.cpu(), group)).to(tensor.device)


def spread(model: torch.nn.Module, group: ProcessGroup | None) -> None:
    """Broadcast the weights and buffers of rank 0 to every rank, in place."""
    if group is not None:
        with others_alive(group):
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


# Agreement


def everyone(value: _Value, group: ProcessGroup | None) -> list[_Value]:
    """all_gather of one small picklable value: every rank gets the values of all ranks, in rank order."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    with others_alive(group):
        dist.all_gather_object(values, value, group=group)
    return values


def largest(number: int, group: ProcessGroup | None) -> int:
    """The largest of the ranks' integers."""
    return number if group is None else _extremes([number], group)[0][1]


def check_same(value: object, name: str, group: ProcessGroup | None) -> None:
    """Raise ValueError on every rank unless all have an equal `value`."""
    values = everyone(value, group)
    other = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
    if other:
        raise ValueError(
            f"{name} is not the same on all ranks: {values[0]} on rank 0, {values[other[0]]} on rank {other[0]}"
        )


@contextmanager
def together(group: ProcessGroup | None) -> Iterator[None]:
    """A block that every rank runs independently. If it raises an error on one rank, every rank raises one.

    Raises:
        RankFailed: on the other ranks; it names the rank that failed and quotes its error.
    """
    if group is None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if largest(_GO if error is None else _FAILED, group) == _FAILED:
        _raise_for_all(error, group)


def in_step(
    batches: Iterable[_Item], group: ProcessGroup | None, images: Callable[[_Item], int] | None = None
) -> Iterable[_Item]:
    """This rank's batches, given in step with the other ranks: a rank with fewer batches waits for the rest.

    Args:
        batches: this rank's batches. If iterating raises on one rank (StopAll included), every rank raises. Without a
            group they are returned as they are.
        images: counts the images of a batch. With it, all ranks must have the same number of batches, and the same
            number of images in each.

    Raises:
        RankFailed: another rank failed.
        StopAll: a rank was asked to stop.
        ValueError: a rank has no batch at all, or with `images` its numbers differ from another rank's.
    """
    return batches if group is None else _in_step(batches, group, images)


def _in_step(
    batches: Iterable[_Item], group: ProcessGroup | None, images: Callable[[_Item], int] | None
) -> Iterator[_Item]:
    count = 0
    for item, error, code in _turns(batches):
        size = images(item) if images is not None and code == _GO else 0
        (low, high), (smallest, most) = _extremes([code, size], group)
        if high == _FAILED:
            _raise_for_all(error if code == _FAILED else None, group)
        if high >= _STOP:
            raise StopAll(high - _STOP)
        if low == _GO and (high == _EMPTY or (images is not None and high == _END)):
            raise ValueError(f"the ranks have {everyone(count + (code == _GO), group)} batches and more; {_EQUAL}")
        if low != _GO:
            return
        if high == _GO and smallest != most:
            raise ValueError(f"the ranks have batches of {everyone(size, group)} images; each needs as many")
        if code == _GO:
            count += 1
            yield item


def _turns(batches: Iterable[Any]) -> Iterator[tuple[Any, Exception | None, int]]:
    """(item, error, code) for each turn; after the last item it goes on without end."""
    end = _EMPTY
    try:
        for item in batches:
            yield item, None, _GO
            end = _END
    except StopAll as stop:
        yield None, stop, _STOP + stop.signal
    except Exception as error:
        yield None, error, _FAILED
    while True:
        yield None, None, end


def _raise_for_all(error: Exception | None, group: ProcessGroup | None) -> None:
    """Raise this rank's own error, or RankFailed for the first of the others' errors."""
    said = everyone(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    rank = next(rank for rank, text in enumerate(said) if text is not None)
    raise RankFailed(f"rank {rank} failed: {said[rank]}")


def _extremes(numbers: list[int], group: ProcessGroup | None) -> list[tuple[int, int]]:
    """The smallest and the largest of each number over the ranks."""
    both = torch.tensor([[-number, number] for number in numbers])
    with others_alive(group):
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return [(-low, high) for low, high in both.tolist()]


@contextmanager
def others_alive(group: ProcessGroup | None) -> Iterator[None]:
    """Inside the block a communication error between the processes becomes RankFailed; without a group nothing does.

    Communication errors are torch.distributed's own classes, and errors of gloo and NCCL, which PyTorch passes on as
    a RuntimeError with the name of the library in its text.
    """
    try:
        yield
    except RuntimeError as error:
        if group is None or not _of_the_network(error):
            raise
        raise RankFailed(f"another rank has died or cannot be reached: {str(error).splitlines()[0]}") from error


def _of_the_network(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError | RankFailed):
        return False
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "Gloo", "NCCL"))
