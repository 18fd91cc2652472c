"""Plots of networks and runs: functions from numbers to matplotlib figures, without pyplot and its global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_WIDTH, _DPI = 7.2, 150  # inches; pixels per inch
_GREY = "0.45"
_CROWDED = 4.0  # if all curves together span this many times the main one's range, it also gets a panel of its own
_LOG_FROM = 20.0  # from this ratio of the largest to the smallest value on, a linear scale shows only the largest


def new_figure(height: float, width: float = _WIDTH) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def unit(largest: float) -> tuple[float, str, str]:
    """(divisor, letter, word) that make numbers up to `largest` readable."""
    if largest >= 1e9:
        return 1e9, "G", "billions"
    return (1e6, "M", "millions") if largest >= 1e6 else (1e3, "k", "thousands")


def linear_axis(axes: Axes, full: np.ndarray, linear: np.ndarray) -> None:
    """Add a second scale on top: the MACs in the linear convention, interpolated between the networks.

    Args:
        full, linear: MACs of nested networks, from the largest to the smallest, in the unit of the x-axis.
    """
    x = np.concatenate([[0.0], full[::-1], 2 * full[:1]])
    y = np.concatenate([[0.0], linear[::-1], 2 * linear[:1]])

    def to_linear(macs: npt.ArrayLike) -> np.ndarray:
        return np.interp(np.asarray(macs), x, y)

    def to_full(macs: npt.ArrayLike) -> np.ndarray:
        return np.interp(np.asarray(macs), y, x)

    secondary = axes.secondary_xaxis("top", functions=(to_linear, to_full))
    secondary.set_xlabel("the same in the linear convention (without QKᵀ and AV)")


def accuracy_figure(
    curves: Mapping[str, Rows], reference: float | None, full: npt.ArrayLike, linear: npt.ArrayLike
) -> Figure:
    """Top-1 against MACs, in both conventions; with a second, enlarged panel where other curves crowd the main one.

    Args:
        curves: rows of `skd.support.curve.measure_curve` by label; the first is the main one.
        reference: top-1 of the original network, or None.
        full, linear: MACs of all sub-networks, as for `linear_axis`.
    """
    full, linear = np.asarray(full), np.asarray(linear)
    divisor, _, word = unit(float(full[0]))
    main = [row["top1"] for row in next(iter(curves.values()))] + ([] if reference is None else [reference])
    lowest = min(row["top1"] for rows in curves.values() for row in rows)
    low, high = min(main), max(main)
    crowded = high - lowest > _CROWDED * max(high - low, 1.0)
    figure = new_figure(3.8 + 2.4 * crowded + 0.18 * len(curves))
    panels = figure.subplots(1 + crowded, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        _draw_curves(axes, curves, reference, divisor)
    if crowded:
        margin = max(0.15 * (high - low), 0.3)
        panels[0].set(ylim=(low - margin, high + margin), ylabel="top-1, enlarged (%)")
    panels[-1].set(xlabel=f"MACs per image, full convention ({word})", xlim=(0, full[0] / divisor * 1.03))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", fontsize=9, frameon=False)
    linear_axis(panels[0], full / divisor, linear / divisor)
    return figure


def _draw_curves(axes: Axes, curves: Mapping[str, Rows], reference: float | None, divisor: float) -> None:
    if reference is not None:
        axes.axhline(reference, color=_GREY, linewidth=1, linestyle=":", label=f"original network, {reference:.2f} %")
    for index, (label, rows) in reversed(list(enumerate(curves.items()))):  # the main one on top
        macs = [row["macs"] / divisor for row in rows]
        width, size = (1.8, 5.0) if index == 0 else (1.1, 3.5)
        mark = "o-" if index == 0 else ("s--", "^-.", "D:", "v--")[(index - 1) % 4]
        top1, colour = [row["top1"] for row in rows], f"C{index % 10}"
        axes.plot(macs, top1, mark, color=colour, label=plain(label), linewidth=width, markersize=size)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.25)


def plain(text: str) -> str:
    """`text` so that matplotlib draws it literally: not as a formula, and also in legends if it begins with "_"."""
    return text.replace("$", r"\$").lstrip("_") or "-"


# Heat maps, one row per module


def widths_figure(modules: Sequence[str], shares: npt.ArrayLike, macs_fraction: npt.ArrayLike) -> Figure:
    """The dropout list: share of its full width that each module has in each entry.

    Args:
        shares: (entries, modules), 0..1.
        macs_fraction: share of the MACs that each entry has, falling.
    """
    from matplotlib.ticker import MaxNLocator

    shares, entries = np.asarray(shares), len(shares)
    figure, axes = _module_map(modules, shares.T, "share of the full width", "viridis", (0.0, 1.0), log=False)
    axes.set_xlabel("entry of the dropout list")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    ticks = _share_ticks(np.asarray(macs_fraction), entries)
    top = axes.secondary_xaxis("top")
    top.set_xticks([entry for entry, _ in ticks], [f"{share:.0%}" for _, share in ticks], fontsize=8)
    top.set_xlabel("share of the MACs")
    _legend_of_zero(figure, "0: the module is skipped")
    return figure


def importance_figure(modules: Sequence[str], values: npt.ArrayLike, epochs: Sequence[int]) -> Figure:
    """Sensitivity of each module over the epochs that measured it.

    Args:
        values: (epochs, modules), NaN where the module is gone already.
        epochs: what the columns are called.
    """
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values) & (values > 0)]
    low, high = (known.min(), known.max()) if known.size else (0.5, 1.0)
    log = bool(high > _LOG_FROM * low)
    label = "sensitivity" + (" (logarithmic)" if log else "")
    limits = (low, high) if high > low else (low / 2, high)
    values = np.where(values > 0, values, 0)
    figure, axes = _module_map(modules, values.T, label, "magma", limits, log=log)
    step = -(-len(epochs) // 12)
    axes.set_xticks(range(0, len(epochs), step), [str(epoch) for epoch in epochs[::step]])
    axes.set_xlabel("epoch")
    if (values == 0).any():
        _legend_of_zero(figure, "skipped already")
    return figure


def _module_map(
    modules: Sequence[str], values: np.ndarray, label: str, colours: str, limits: tuple[float, float], *, log: bool
) -> tuple[Figure, Axes]:
    """A figure and axes that show (modules, columns) `values` as colours; 0 is white."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    figure = new_figure(1.7 + 0.155 * max(len(modules), 8))
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_equal(values, 0),
        aspect="auto",
        interpolation="nearest",
        cmap=matplotlib.colormaps[colours].with_extremes(bad="white"),
        norm=(LogNorm if log else Normalize)(*limits),
    )
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    figure.colorbar(image, ax=axes, label=label, pad=0.02, fraction=0.05, aspect=max(20, len(modules)))
    return figure, axes


def _share_ticks(fraction: np.ndarray, entries: int) -> list[tuple[int, float]]:
    """(entry, share) where the share of the MACs first falls to 100 %, 90 %, ..., and the last entry.

    Ticks that would overlap are left out.
    """
    ticks: list[tuple[int, float]] = []
    for share in np.arange(10, 0, -1) / 10:
        reached = np.flatnonzero(fraction <= share + 1e-9)
        if reached.size and (not ticks or reached[0] - ticks[-1][0] > 0.055 * entries):
            ticks.append((int(reached[0]), float(share)))
    if entries - 1 - ticks[-1][0] <= 0.055 * entries:
        ticks.pop()
    return [*ticks, (entries - 1, float(fraction[-1]))]


def _legend_of_zero(figure: Figure, text: str) -> None:
    from matplotlib.patches import Patch

    patch = Patch(facecolor="white", edgecolor="0.3", linewidth=0.8, label=text)
    figure.legend(handles=[patch], loc="outside lower left", fontsize=8, frameon=False)


# Steps and epochs


def steps_figure(losses: Mapping[str, Rows], times: Rows) -> Figure:
    """Loss and time of a step against the size of the sub-network that it drew; many steps make a large dot.

    Args:
        losses: rows with "macs_fraction", "count" and "loss", by label; the last is the main one.
        times: rows with "macs_fraction" and "seconds", from the smallest to the largest; may be empty.
    """
    figure = new_figure(3.6)
    left, right = figure.subplots(1, 2)
    for index, (label, rows) in enumerate(losses.items()):
        share = [100 * row["macs_fraction"] for row in rows]
        loss = [row["loss"] for row in rows]
        main = index == len(losses) - 1
        colour, counts = "C0" if main else "C1", np.array([row["count"] for row in rows])
        left.plot(share, loss, "-" if main else "--", color=colour, linewidth=1.2, label=label)
        left.scatter(share, loss, 6 + 40 * counts / counts.max(), color=colour, linewidths=0)
    left.set(ylabel="mean loss of the steps")
    _draw_times(right, times)
    for axes in (left, right):
        axes.set(xlabel="share of the MACs (%)", xlim=(0, 104))
        axes.grid(alpha=0.25)
        if axes.get_lines():
            axes.legend(fontsize=8)
    return figure


def _draw_times(axes: Axes, times: Rows) -> None:
    """Draw the times as dots, and a dotted line where they would lie if time were proportional to MACs."""
    if not times:
        axes.text(50, 0.5, "no times recorded", ha="center", transform=axes.get_xaxis_transform(), color=_GREY)
        return
    largest = times[-1]
    scale, name = (1e3, "ms") if largest["seconds"] < 1 else (1.0, "s")
    slope = scale * largest["seconds"] / largest["macs_fraction"]
    axes.plot([0, 100], [0, slope], ":", color=_GREY, linewidth=1.2, label="in proportion to MACs")
    seconds = [scale * row["seconds"] for row in times]
    axes.plot([100 * row["macs_fraction"] for row in times], seconds, "o", color="C2", markersize=4, label="measured")
    axes.set(ylabel=f"time per step ({name})", ylim=(0, 1.08 * max(slope, *seconds)))


def epochs_figure(series: Mapping[str, Sequence[tuple[int, float]]], growing: int, best: int | None) -> Figure:
    """One panel per quantity over the epochs.

    Args:
        series: (epoch, value) by the label of the panel; epochs count from 1.
        growing: epochs in which the dropout list grew, shaded.
        best: an epoch to mark.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(0.6 + 1.6 * len(series))
    panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, (label, points)) in enumerate(zip(panels, series.items(), strict=True)):
        marker = "o" if len(points) <= 40 else ""
        axes.plot(*zip(*points, strict=True), color=f"C{index}", marker=marker, markersize=3.5)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        if growing:
            axes.axvspan(0.5, growing + 0.5, color="0.92", zorder=0)
        if best is not None:
            axes.axvline(best, color=_GREY, linewidth=1, linestyle=":", zorder=1)
    last = max(epoch for points in series.values() for epoch, _ in points)
    panels[-1].set(xlabel="epoch", xlim=(0.5, last + 0.5))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
