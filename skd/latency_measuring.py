"""Modules timed at many widths, for a table that predicts sub-networks: `measure_latency`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from skd.benchmark import ROUNDS, Bench, bench, call_of
from skd.extract import cut_at
from skd.latency import Architecture, Curve, LatencyTable, Whole, summed
from skd.supernet import SuperNet
from skd.support.checks import check_count
from skd.support.clocks import Call, Conditions, Timer, Timing, in_turn
from skd.vit import Module, unwrapped

# Blocks that are timed one after another. The weights of one alone would stay in the caches from call to call.
_BLOCKS = 4
_STACK_BYTES = 64 << 20  # of their weights at full width, beyond which one of them is as good
# At most so many widths of a shape of module are timed, and of all shapes together.
_WIDTHS, _ALL_WIDTHS = 28, 96
_WHOLE = 4  # whole networks that the sum is fitted to
_BOUNDARIES = 12  # widths of a grid that are multiples of more than a group


def measure_latency(
    supernet: SuperNet,
    *,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
    rounds: int = ROUNDS,
    check: Sequence[int] = (),
    timer: Timer | None = None,
) -> LatencyTable:
    """Time attentions and MLPs at many widths, so that the latency of any sub-network can be predicted.

    Modules of one shape are timed once, as blocks of timm's in which the other module is skipped. Their widths are
    those of the dropout list or, where there is none yet, a grid of multiples of the group size. A few whole networks
    are timed with them, all in turn, and what the sum of modules misses is fitted to these.

    Args:
        supernet: planned or not; not changed. Time does not depend on weights, so it need not be trained.
        batch_size: images in a call.
        device: None: that of the super-network.
        dtype: "float32", "bfloat16", "float16" or "float64", of weights and images.
        threads: of PyTorch on the CPU; None: as many as there are now.
        rounds: how often everything is timed; medians count.
        check: entries that are timed as `skd benchmark` times them, in the same rounds, to see how well they are
            predicted (`LatencyTable.agreement`). Those that the table is fitted to are left out.
        timer: gives seconds; None: the wall clock, which waits for the GPU.

    Returns:
        A table for sub-networks of this architecture, at this batch size, on this device.

    Raises:
        ValueError: a device that cannot be used, an unknown dtype, fewer than one image, thread or round, `check` is
            no list, or has an entry out of range.
    """
    supernet = unwrapped(supernet)
    check_count("rounds", rounds)
    if isinstance(check, str) or not isinstance(check, Iterable):
        raise ValueError(f"check is {check!r}; it must be a list of entries")
    with bench(supernet, batch_size, device, dtype, threads) as place:
        stacks = [_Stack.of(supernet, modules, place) for modules in _shapes(supernet)]
        rows, skipped = whole_widths(supernet), tuple([0] * len(supernet.infos))
        others = [row for row in dict.fromkeys(tuple(supernet.widths(entry)) for entry in check) if row not in rows]
        calls: dict[tuple[int | None, Any], Call] = {}
        for shape, stack in enumerate(stacks):
            widths = _timed_widths(supernet, stack.modules, max(4, _ALL_WIDTHS // len(stacks)))
            calls |= {(shape, width): stack.at(width) for width in widths}
        for row in dict.fromkeys([*rows, *others, skipped]):
            calls[None, row] = call_of(place.ready(cut_at(supernet, row)), place.images)
        found = in_turn(calls, rounds, place.device, timer=timer)
    curves = [
        stack.curve({width: timing for (own, width), timing in found.items() if own == shape})
        for shape, stack in enumerate(stacks)
    ]
    times = {row: timing.ms for (own, row), timing in found.items() if own is None}
    table = _fitted(supernet, place.conditions, rounds, curves, times[skipped], {row: times[row] for row in rows})
    return replace(table, checked=tuple(Whole(row, times[row], float(table.sum_at(row))) for row in others))


@dataclass(frozen=True)
class _Stack:
    """Some blocks that have a module of one shape, each with this module alone, timed one after another."""

    modules: Sequence[Module]  # all of this shape; the first few are timed
    supernet: SuperNet
    place: Bench
    x: torch.Tensor
    shared: Sequence[Any]
    count: int

    @classmethod
    def of(cls, supernet: SuperNet, modules: Sequence[Module], place: Bench) -> _Stack:
        model = supernet.model
        # Of a copy, in evaluation mode: in training mode a network may drop patches.
        x, shared = supernet.network.embed(place.ready(cut_at(supernet, [0] * len(supernet.infos))), place.images)
        there = [None if tensor is None else tensor.to(place.device, place.dtype) for tensor in shared]
        size = sum(parameter.numel() for parameter in modules[0].of(model).parameters()) * place.dtype.itemsize
        count = max(1, min(len(modules), _BLOCKS, _STACK_BYTES // max(size, 1)))
        return cls(modules, supernet, place, x.to(place.device, place.dtype), there, count)

    def at(self, width: int) -> Call:
        """A call of the blocks, their modules at this width and all others skipped."""
        network = self.supernet.network
        blocks = network.blocks(self.supernet.model)
        ready = []
        for module in self.modules[: self.count]:
            inside = network.by_block[module.block]
            cut = blocks[module.block].cut([width if other is module else 0 for other in inside])
            own = self.shared[module.block]
            given = {other.place.shared: own for other in inside if other.place.shared and own is not None}
            ready.append((self.place.ready(cut), given))

        def run() -> None:
            x = self.x
            for block, given in ready:
                x = block(x, **given)

        return run

    def curve(self, times: dict[int, Timing]) -> Curve:
        """What one module takes at each width beyond a skipped one."""
        ordered = dict(sorted(times.items()))
        return Curve(
            modules=tuple(module.name for module in self.modules),
            widths=tuple(ordered),
            ms=tuple(max(0.0, timing.ms - ordered[0].ms) / self.count for timing in ordered.values()),
            spread_ms=tuple(timing.spread_ms / self.count for timing in ordered.values()),
        )


def _shapes(supernet: SuperNet) -> list[list[Module]]:
    """The modules, those of one shape together."""
    found: dict[Any, list[Module]] = {}
    for module in supernet.infos:
        key = type(module), module.full_width, module.group_size, module.prices(supernet.model)
        found.setdefault(key, []).append(module)
    return list(found.values())


def _timed_widths(supernet: SuperNet, modules: Sequence[Module], most: int) -> list[int]:
    """The widths of these modules that occur in the dropout list, or a grid where it has the full network alone."""
    most, full = min(most, _WIDTHS), modules[0].full_width
    if len(supernet.dropout_list) == 1:
        return thinned(_grid(full, modules[0].group_size), most)
    columns = [supernet.modules_in_order.index(module.name) for module in modules]
    return thinned(sorted({0, full, *supernet.dropout_list.widths[:, columns].ravel().tolist()}), most)


def _grid(full: int, group: int) -> list[int]:
    """Multiples of the group size: all, or round ones and, after each, the next: a device may need another tile."""
    step = group
    while full > step * _BOUNDARIES:
        step *= 2
    round_ones = range(0, full, step)
    return sorted({*round_ones, *(width + group for width in round_ones if width + group < full), full})


def thinned(widths: Sequence[int], most: int) -> list[int]:
    """At most so many of ascending widths, the ends among them."""
    if len(widths) <= most:
        return list(widths)
    places = np.linspace(0, len(widths) - 1, most).round().astype(int)
    return [widths[place] for place in places]


def whole_widths(supernet: SuperNet) -> list[tuple[int, ...]]:
    """The widths of a few whole networks: entries at even distances in MACs; without a list, shares of all widths."""
    rows = supernet.dropout_list.widths
    if len(rows) == 1:
        shares = [[_share(module, share) for module in supernet.infos] for share in (1.0, 0.75, 0.5, 0.25)]
        return list(dict.fromkeys(map(tuple, shares)))
    macs = supernet.costs.macs(rows)
    wanted = np.linspace(macs[0], macs[-1], _WHOLE)
    return list(dict.fromkeys(tuple(rows[np.abs(macs - goal).argmin()].tolist()) for goal in wanted))


def _share(module: Module, share: float) -> int:
    """About this share of a module's width, which it may have."""
    if module.binary or share == 1:
        return module.full_width
    return min(module.full_width, max(1, round(share * module.full_width / module.group_size)) * module.group_size)


def _fitted(
    supernet: SuperNet,
    conditions: Conditions,
    rounds: int,
    curves: Sequence[Curve],
    skipped_ms: float,
    measured: dict[tuple[int, ...], float],
) -> LatencyTable:
    """The table, its sums fitted to whole networks by least squares of the relative error."""
    rows, times = list(measured), np.array(list(measured.values()))
    sums = summed(supernet.modules_in_order, curves, skipped_ms, rows)
    scale, offset = fit(sums, times)
    whole = zip(rows, times.tolist(), sums.tolist(), strict=True)
    return LatencyTable(
        architecture=Architecture.of(supernet),
        conditions=conditions,
        rounds=rounds,
        curves=tuple(curves),
        skipped_ms=skipped_ms,
        scale=scale,
        offset_ms=offset,
        whole=tuple(Whole(row, ms, total) for row, ms, total in whole),
    )


def fit(sums: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """The scale and the offset with the least squares of the relative error of ``scale * sums + offset``.

    Where networks do not differ enough for both, or the line falls, or is not above 0 at the smallest network, the
    scale alone.
    """
    alone = float(np.median(times / sums)), 0.0
    if len(sums) < 3 or sums.max() < 1.2 * sums.min():
        return alone
    scale, offset = np.polyfit(sums, times, 1, w=1 / times)
    return (float(scale), float(offset)) if scale > 0 and scale * sums.min() + offset > 0 else alone
