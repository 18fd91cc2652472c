"""Commands under torchrun: one process per device; the processes share the images, and only rank 0 prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from skd.commands import COMMANDS
from skd.support.process import world_size
from skd.training.stopping import Stopped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def processes(command: str, device: str | None) -> Iterator[ProcessGroup | None]:
    """The process group of torchrun, or None in a single process. Only rank 0 prints its results.

    Args:
        command: the name of the command that is about to run.
        device: the value of --device: None, "cpu" or "cuda".

    Raises:
        ValueError: WORLD_SIZE is set without torchrun's other variables, the command runs in one process only, or
            --device names one device for all processes.
    """
    if world_size() == 1:
        yield None
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {world_size()}, but {missing[0]} is not set: start skd with torchrun")
    if not COMMANDS[command].shares:
        sharing = ", ".join(name for name, each in COMMANDS.items() if each.shares)
        raise ValueError(f"skd {command} runs in one process, not under torchrun; these share: {sharing}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device is {device!r}; under torchrun it may be cpu or cuda, where each process has its own"
        )
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise ValueError(f"this node has {gpus} GPUs; --nproc_per_node may be that at most, or use --device cpu")
        torch.cuda.set_device(place)
    # gloo is needed on GPUs too, because the ranks exchange CPU tensors when they agree on something.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        if dist.get_rank() == 0:
            yield dist.group.WORLD
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield dist.group.WORLD
    finally:
        # After an error the group is not destroyed: the other ranks may be waiting in a collective, and only notice
        # the error if this process ends. After `Stopped` all ranks end, so the group is destroyed.
        if sys.exc_info()[0] in (None, Stopped):
            dist.destroy_process_group()
