"""The accuracy-MACs curve of a super-network: its sub-networks on a grid of budgets, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from skd.evaluate import evaluate
from skd.extract import choose_entry
from skd.latency import LatencyTable
from skd.supernet import SuperNet
from skd.support.settings import TrainConfig
from skd.support.types import Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Row(TypedDict):
    """One sub-network: its entry, its cost and, where they are known, the budget that it meets, top-1 and latency.

    Attributes:
        macs, macs_linear: in the full and in the linear convention.
        macs_fraction: share of the full network's MACs.
        budget: share of the MACs that it had to stay within.
        top1: in percent.
        latency_ms: predicted for a batch, where there is a table (`skd.latency`).
    """

    entry: int
    macs: int
    macs_fraction: float
    macs_linear: int
    params: int
    budget: NotRequired[float]
    top1: NotRequired[float]
    latency_ms: NotRequired[float]


Rows = list[Row]


def entries_within(supernet: SuperNet, budgets: Iterable[float], convention: str = "full") -> dict[float, int]:
    """The largest sub-network within each share of the full MACs; budgets below the smallest are left out."""
    sizes = supernet.costs.macs(supernet.dropout_list.widths, convention)
    smallest = int(sizes[-1]) / int(sizes[0])
    return {
        budget: choose_entry(supernet, macs=float(budget), convention=convention)
        for budget in budgets
        if budget >= smallest
    }


def usual_entries(supernet: SuperNet) -> list[int]:
    """The largest sub-network within each of the budgets that training measures, each once."""
    return list(dict.fromkeys(entries_within(supernet, TrainConfig().budgets).values()))


def sizes_of(supernet: SuperNet, entries: Sequence[int], latency: LatencyTable | None = None) -> Rows:
    """The cost of each of these entries of the dropout list and, with a table, the latency that it predicts.

    Raises:
        ValueError: an entry out of range.
    """
    for entry in entries:
        supernet.widths(entry)  # which refuses what is none
    widths = supernet.dropout_list.widths[list(entries)]
    macs, linear = supernet.costs.macs(widths), supernet.costs.macs(widths, "linear")
    params = supernet.costs.params(widths)
    full = int(supernet.costs.macs(supernet.widths()))
    rows: Rows = [
        {
            "entry": int(entry),
            "macs": int(macs[row]),
            "macs_fraction": int(macs[row]) / full,
            "macs_linear": int(linear[row]),
            "params": int(params[row]),
        }
        for row, entry in enumerate(entries)
    ]
    if latency is not None:
        for one, ms in zip(rows, latency.predict(supernet, entries), strict=True):
            one["latency_ms"] = float(ms)
    return rows


def measure_curve(
    supernet: SuperNet,
    batches: Iterable[object],
    budgets: Iterable[float],
    *,
    convention: str = "full",
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> Rows:
    """Top-1 of the largest sub-network within each budget.

    Args:
        supernet: with its dropout list.
        batches: as for `skd.evaluate`; read once for all sub-networks.
        budgets: shares of the full network's MACs.
        convention: of those MACs ("full" or "linear").
        progress: wraps the batches.
        group: as for `skd.evaluate`.

    Returns:
        One row, with its budget and top-1, for each budget that a sub-network meets, in the order given.
    """
    chosen = entries_within(supernet, budgets, convention)
    entries = list(chosen.values())
    top1 = evaluate(supernet, batches, entries=entries, progress=progress, group=group) if entries else []
    rows = sizes_of(supernet, entries)
    return [
        {"budget": budget, **row, "top1": accuracy} for budget, row, accuracy in zip(chosen, rows, top1, strict=True)
    ]


def area(rows: Rows, budgets: Sequence[float]) -> float:
    """Mean top-1 over the range of `budgets`, in percent: the area under the accuracy-MACs curve.

    The curve is integrated by trapezoids between the budgets. A budget that no sub-network meets counts as 0, so that
    lists of different length can be compared.
    """
    grid = np.unique(np.asarray(budgets, dtype=float))
    known = {row["budget"]: row["top1"] for row in rows}
    top1 = np.array([known.get(budget, 0.0) for budget in grid.tolist()])
    if len(grid) == 1:
        return float(top1[0])
    return float((np.diff(grid) * (top1[1:] + top1[:-1]) / 2).sum() / (grid[-1] - grid[0]))
