"""Calls timed in turn, and a record of what they were timed on."""

from __future__ import annotations

import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import timm
import torch

from skd import __version__
from skd.support.checks import check_count
from skd.support.settings import DTYPES

Call = Callable[[], object]
Timer = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)

_WARM_UP = 2


@dataclass(frozen=True)
class Conditions:
    """What times were measured on.

    Attributes:
        device: "cpu", "cuda:0", ...
        device_name: of the processor or the GPU.
        dtype: of weights and images, such as "float32".
        batch_size: images in each call.
        threads: of PyTorch on the CPU, within one operation.
        torch_version, timm_version, skd_version: those that were used.
        date: of the measurement, such as "2026-11-28".
    """

    device: str
    device_name: str
    dtype: str
    batch_size: int
    threads: int
    torch_version: str
    timm_version: str
    skd_version: str
    date: str

    @classmethod
    def here(cls, device: torch.device, dtype: str, batch_size: int, threads: int) -> Conditions:
        """Those of this process."""
        versions = str(torch.__version__), timm.__version__, __version__
        date = datetime.date.today().isoformat()
        return cls(str(device), name_of(device), dtype, batch_size, threads, *versions, date)

    def __str__(self) -> str:
        where = self.device_name if self.device == "cpu" else f"{self.device_name} ({self.device})"
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{where}, {threads}, {self.dtype}, batch {self.batch_size}, torch {self.torch_version}"


@dataclass(frozen=True)
class Timing:
    """The median of the rounds and the distance between their quartiles, in milliseconds."""

    ms: float
    spread_ms: float

    @classmethod
    def of(cls, rounds: list[float]) -> Timing:
        if len(rounds) < 2:
            return cls(rounds[0], 0.0)
        first, middle, last = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(middle, last - first)


def seconds(device: torch.device) -> float:
    """Of the wall clock, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def in_turn(
    calls: Mapping[Name, Call], rounds: int, device: torch.device, *, timer: Timer | None = None
) -> dict[Name, Timing]:
    """Time every call once in each round, in an order that is another one each time.

    What the machine does beside it then concerns all of them alike.

    Args:
        calls: what to call, by name. Each is called twice before the first round.
        rounds: how often each is timed.
        device: where they run, which is waited for before and after each.
        timer: gives seconds; by default `seconds` of the device.
    """
    timer = partial(seconds, device) if timer is None else timer
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    found: dict[Name, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            start = timer()
            calls[name]()
            found[name].append(1e3 * (timer() - start))
    return {name: Timing.of(times) for name, times in found.items()}


@contextmanager
def threads_of(count: int | None) -> Iterator[int]:
    """Inside the block PyTorch uses `count` threads on the CPU (None: as many as before); yields how many.

    Raises:
        ValueError: fewer than 1.
    """
    before = torch.get_num_threads()
    if count is not None:
        check_count("threads", count)
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def dtype_named(name: object) -> torch.dtype:
    """The dtype of that name; a dtype is taken as it is.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it may be one of {list(DTYPES)}")
    found: torch.dtype = getattr(torch, text)
    return found


def name_of(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if device.type == "cpu" and cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or device.type
