"""Sub-networks timed as they run once they are extracted: `benchmark`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NotRequired, cast

import torch
from torch import nn

from skd.extract import extract
from skd.latency import LatencyTable
from skd.supernet import SuperNet, check_supernet
from skd.support.checks import check_count
from skd.support.clocks import Call, Conditions, Timer, Timing, dtype_named, in_turn, threads_of
from skd.support.curve import Row, sizes_of
from skd.support.devices import usable_device
from skd.vit import image_size, unwrapped

ROUNDS = 15


@dataclass(frozen=True)
class Bench:
    """Where sub-networks are timed: with which weights, images and settings."""

    device: torch.device
    dtype: torch.dtype
    images: torch.Tensor
    conditions: Conditions

    def ready(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, self.dtype).eval()


@contextmanager
def bench(
    supernet: SuperNet,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
) -> Iterator[Bench]:
    """Random images for `supernet` on a device; inside the block PyTorch has the threads, and records no gradients.

    Raises:
        ValueError: a device that cannot be used, an unknown dtype, fewer than one image or thread.
    """
    check_supernet(supernet)
    check_count("batch_size", batch_size)
    own = next(supernet.model.parameters()).device
    kind = dtype_named(dtype)
    where = usable_device(own if device is None else device, dtype=kind)
    size = (batch_size, supernet.model.in_chans, *image_size(supernet.model))
    images = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(where, kind)
    with threads_of(threads) as used, torch.no_grad():
        name = str(kind).removeprefix("torch.")
        yield Bench(where, kind, images, Conditions.here(where, name, batch_size, used))


class Times(Row):
    """What a sub-network costs and takes.

    Attributes:
        ms, spread_ms: the median of the rounds, and the distance between their quartiles.
        speedup: what the full network takes, in units of this.
        compiled_ms, compiled_spread_ms, compiled_speedup: the same of ``torch.compile(network)``, where it was timed.
        latency_ms, error: with a table, what it predicts, and how far that is from `ms`, as a share of it.
    """

    ms: float
    spread_ms: float
    speedup: float
    compiled_ms: NotRequired[float]
    compiled_spread_ms: NotRequired[float]
    compiled_speedup: NotRequired[float]
    error: NotRequired[float]


def benchmark(
    supernet: SuperNet,
    entries: Sequence[int],
    *,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
    rounds: int = ROUNDS,
    compiled: bool = False,
    latency: LatencyTable | None = None,
    timer: Timer | None = None,
) -> tuple[list[Times], Conditions]:
    """Time extracted sub-networks and the full network in turn, in evaluation mode and without gradients.

    Args:
        supernet: not changed.
        entries: indices into its dropout list.
        batch_size, device, dtype, threads, rounds, timer: as for `skd.measure_latency`.
        compiled: time each also as ``torch.compile(network)``, whose compilation is not counted.
        latency: a table of this architecture, measured with the same settings, to compare with.

    Returns:
        The full network and then the entries, each once; and what they were measured on.

    Raises:
        ValueError: an entry out of range, a table of another architecture or with other settings, and as
            `skd.measure_latency`.
    """
    supernet = unwrapped(supernet)
    check_count("rounds", rounds)
    with bench(supernet, batch_size, device, dtype, threads) as place:
        rows = sizes_of(supernet, list(dict.fromkeys([0, *entries])), latency)
        if latency is not None:
            check_settings(latency.conditions, place.conditions)
        calls: dict[tuple[int, bool], Call] = {}
        for row in rows:
            network = place.ready(extract(supernet, entry=row["entry"]))
            calls[row["entry"], False] = call_of(network, place.images)
            if compiled:
                calls[row["entry"], True] = call_of(torch.compile(network, dynamic=False), place.images)
        with _as_many_graphs_as(len(rows) if compiled else 0):
            found = in_turn(calls, rounds, place.device, timer=timer)
    return [_times(row, found) for row in rows], place.conditions


@contextmanager
def _as_many_graphs_as(networks: int) -> Iterator[None]:
    """Inside the block torch.compile compiles so many networks of one class; the ninth would else run uncompiled."""
    if not networks:
        yield
        return
    import torch._dynamo

    own = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=own + networks):
        yield


def _times(row: Row, found: Mapping[tuple[int, bool], Timing]) -> Times:
    own = found[row["entry"], False]
    times = {"ms": own.ms, "spread_ms": own.spread_ms, "speedup": found[0, False].ms / own.ms}
    if (compiled := found.get((row["entry"], True))) is not None:
        times |= {"compiled_ms": compiled.ms, "compiled_spread_ms": compiled.spread_ms}
        times["compiled_speedup"] = found[0, True].ms / compiled.ms
    if "latency_ms" in row:
        times["error"] = row["latency_ms"] / own.ms - 1
    return cast(Times, {**row, **times})


def check_settings(table: Conditions, here: Conditions) -> None:
    """Raise ValueError unless a table was measured with the settings that networks are timed with."""
    for name in ("device", "dtype", "batch_size", "threads"):
        theirs, ours = getattr(table, name), getattr(here, name)
        if theirs != ours:
            raise ValueError(f"{name} is {ours!r}, but the table was measured with {theirs!r}; they must be the same")


def same_machine(table: Conditions, here: Conditions) -> bool:
    """Whether a table was measured on a device of the same name and with the same version of PyTorch."""
    return (table.device_name, table.torch_version) == (here.device_name, here.torch_version)


def call_of(network: Callable[..., object], *arguments: torch.Tensor) -> Call:
    return lambda: network(*arguments)
