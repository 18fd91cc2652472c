"""What `skd demo` shows: stage times, tables, the accuracy curve."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from skd.cost import cost
from skd.support.curve import Rows
from skd.support.plots import linear_axis
from skd.vit import TimmModel

_METHOD_NAMES = {
    "random": "random",
    "magnitude": "magnitude",
    "taylor": "Taylor |x g|",
    "hessian": "Hessian 1/2 (x g)^2",
    "wpac": "WPAC",
}
# The same widths cut three ways, and how tables and plots call them.
CURVES = {
    "trained": "trained (WPAC, then PIAD)",
    "converted": "converted only (WPAC)",
    "original_order": "neither (original order)",
}


class Clock:
    """Wall-clock seconds of each stage, printed as it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        self.console.print(f"[dim]{stage.replace('_', ' '):<24}{self.seconds[stage]:6.1f} s[/]", highlight=False)

    def total(self) -> float:
        return round(sum(self.seconds.values()), 3)


def print_conversion(console: Console, model: TimmModel, top1: float, errors: dict[str, float]) -> None:
    full, linear = cost(model), cost(model, convention="linear")
    console.print(
        f"\nStand-in: {top1:.1f} % top-1 on test images, {full.params:,} parameters,\n"
        f"  {_millions(full.macs)} MACs per image (full), {_millions(linear.macs)} (linear, without QK and AV)\n"
        "Conversion: largest change of a logit, relative to the largest logit,\n"
        f"  {errors['fp32']:.1e} in float32, {errors['fp64']:.1e} in float64\n",
        highlight=False,
    )


def print_concentration(console: Console, table: dict[str, dict[str, float]], draws: int) -> None:
    """One row per order; the best of each column in bold."""
    shares = list(next(iter(table.values())))
    view = Table(title="Knowledge concentration: top-1 (%) with a share of every width kept, no training")
    view.add_column("order of the coordinates")
    for share in shares:
        view.add_column(f"{float(share):.0%} kept", justify="right")
    best = {share: max(row[share] for row in table.values()) for share in shares}
    for method, row in table.items():
        name = _METHOD_NAMES[method] + (f" (mean of {draws})" if method == "random" else "")
        view.add_row(name, *(_emphasised(row[share], row[share] == best[share]) for share in shares))
    console.print(view)


def _millions(macs: int) -> str:
    return f"{macs / 1e6:.2f} M"


def _emphasised(value: float, strong: bool) -> str:
    return f"[bold]{value:.1f}[/]" if strong else f"{value:.1f}"


def print_subnetworks(console: Console, curves: dict[str, Rows], entries: int) -> None:
    """One row per sub-network, one column of top-1 per curve."""
    trained = curves["trained"]
    view = Table(title=f"{len(trained)} of {entries} nested sub-networks: top-1 (%), the same widths three ways")
    for heading in ("entry", "MACs (full)", "of full", "MACs (linear)", "parameters", "WPAC+PIAD", "WPAC", "neither"):
        view.add_column(heading, justify="right")
    for index, row in enumerate(trained):
        view.add_row(
            str(row["entry"]),
            _millions(row["macs"]),
            f"{row['macs_fraction']:.1%}",
            _millions(row["macs_linear"]),
            f"{row['params']:,}",
            *(f"{curves[name][index]['top1']:.1f}" for name in CURVES),
        )
    console.print(view)


def print_end(console: Console, folder: Path, names: Sequence[str], clock: Clock) -> None:
    console.print(f"\nWrote {', '.join(names)} to {folder} in {clock.total():.0f} s", soft_wrap=True)


def draw_curve(path: Path, curves: dict[str, Rows], before: float) -> None:
    """PNG of top-1 against MACs, in both conventions, of `CURVES`; a line at the accuracy `before` conversion."""
    from matplotlib.figure import Figure

    rows = curves["trained"]
    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    macs = np.array([row["macs"] for row in rows]) / 1e6
    linear = np.array([row["macs_linear"] for row in rows]) / 1e6
    axes.axhline(before, color="0.6", linewidth=1, linestyle=":", zorder=0)
    axes.annotate(
        f"the network before conversion, {before:.1f} %",
        (0, before),
        xytext=(4, 4),
        textcoords="offset points",
        color="0.4",
        fontsize=8,
    )
    for (name, label), style in zip(CURVES.items(), ("o-C2", "^--C0", "s:C1"), strict=True):
        axes.plot(
            macs, [row["top1"] for row in curves[name]], style[:-2], color=style[-2:], markersize=4, label=label
        )
    axes.axhline(10, color="0.6", linewidth=1, linestyle="-.", label="chance", zorder=0)
    axes.set(
        xlabel="MACs per image, full convention (millions)",
        ylabel="top-1 accuracy on test images (%)",
        title="Digits: sub-networks of one super-network, the same widths three ways",
        xlim=(0, macs[0] * 1.03),
        ylim=(0, 107),
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)
    linear_axis(axes, macs, linear)
    figure.savefig(path, format="png")
