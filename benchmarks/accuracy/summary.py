"""The tables and the plot of a comparison (compare.py): means and standard errors over seeds, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.accuracy.contenders import BASE, FINAL, options_of, without_option
from benchmarks.result import Info, rows_of, three_digits

BEGIN, END = "<!-- comparison:begin -->", "<!-- comparison:end -->"
AFTER = ", compensated"
Curve = dict[float, float]  # top-1 by share of the MACs


@dataclass
class Group:
    """The results on one set and size.

    Attributes:
        curves: of each contender, compensated or not, by seed.
        records: of each contender, one for each seed.
        shares: the budgets that every curve meets.
    """

    task: str
    size: str
    headless: bool
    curves: dict[str, dict[int, Curve]] = field(default_factory=dict)
    records: dict[str, list[Info]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.task}, {self.size}" + (", nearest neighbours by the features" if self.headless else "")

    @property
    def shares(self) -> list[float]:
        curves = [set(curve) for by_seed in self.curves.values() for curve in by_seed.values()]
        return sorted(set.intersection(*curves), reverse=True)

    def all_shares(self) -> list[float]:
        return sorted({s for by_seed in self.curves.values() for curve in by_seed.values() for s in curve})[::-1]

    @property
    def seeds(self) -> set[int]:
        """Of the networks that any contender was measured on."""
        return {seed for by_seed in self.curves.values() for seed in by_seed}

    def area(self, name: str, seed: int) -> float:
        return area(self.curves[name][seed], self.shares)


def groups(result: Info) -> list[Group]:
    """The units of a result by set and size, in their order."""
    found: dict[tuple[str, str, bool], Group] = {}
    for record in result.rows("units"):
        contender = record.text("contender")
        headless = bool(result.part("contenders").part(contender).get("headless"))
        key = record.text("task"), record.text("size"), headless
        group = found.setdefault(key, Group(*key))
        group.records.setdefault(contender, []).append(record)
        for name, column in ((contender, "alone"), (contender + AFTER, "compensated")):
            curve = {
                row.number("share"): row.number(column) for row in record.rows("rows") if row[column] is not None
            }
            if curve:
                group.curves.setdefault(name, {})[int(record.number("seed"))] = curve
    return list(found.values())


def area(curve: Mapping[float, float], shares: Sequence[float]) -> float:
    """Mean top-1 over the logarithm of the MACs, by trapezoids between these budgets."""
    if len(shares) == 1:
        return curve[shares[0]]
    x, y = np.log(np.array(sorted(shares))), np.array([curve[share] for share in sorted(shares)])
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean and standard error of the mean; the mean alone of one value."""
    if not values:
        return ""
    mean = f"{np.mean(values):+.2f}" if sign else f"{np.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2f}"


# Tables ---------------------------------------------------------------------------------------------


def tables(result: Info) -> str:
    """The page's text."""
    versions = result.part("versions")
    devices = dict.fromkeys(str(row.get("device", result["device"])) for row in result.rows("units"))
    lines = [
        f"{' and '.join(devices)}, one thread, torch {versions['torch']}, {result['date']}; mean ± standard error of "
        "the mean over seeds. Area: mean top-1 over the logarithm of the MACs, between the budgets of all rows.",
    ]
    for group in groups(result):
        count = len(group.seeds)
        lines += [
            "",
            f"**{group.title}** ({count} {'network' if count == 1 else 'networks'}; before: {before(group)})",
            "",
            *accuracies(group),
        ]
        if BASE in group.curves and not group.headless:
            lines += ["", f"Less `{BASE}` on the same networks:", "", *differences(group)]
        if options := differences(group, without_option):
            lines += ["", "Each option, less the same without it, on the same networks:", "", *options]
        lines += ["", *costs(group)]
    return "\n".join(lines)


def before(group: Group) -> str:
    """Top-1 of the pre-trained networks, or of a k-NN classifier with their features."""
    full = {int(row.number("seed")): row.number("full") for rows in group.records.values() for row in rows}
    return spread(list(full.values()))


def accuracies(group: Group) -> list[str]:
    rows = []
    for name, by_seed in group.curves.items():
        cells = [spread([curve[s] for curve in by_seed.values() if s in curve]) for s in group.all_shares()]
        rows.append([name, str(len(by_seed)), *cells, spread([group.area(name, seed) for seed in by_seed])])
    return rows_of(columns_of(group), rows, 1)


def columns_of(group: Group) -> list[str]:
    return ["contender", "networks", *(f"{share:.0%}" for share in group.all_shares()), "area"]


def less_published(contender: str) -> str | None:
    """The published method, for the winners and for what has no single option."""
    return BASE if contender in FINAL or not options_of(contender) else None


def differences(group: Group, reference: Callable[[str], str | None] = less_published) -> list[str]:
    """Of contenders and their references, paired: only seeds that both have. Empty if there is no pair."""
    rows = []
    for name, by_seed in group.curves.items():
        base = _reference_of(group, name, reference)
        seeds = [seed for seed in by_seed if seed in base]
        if not seeds:
            continue
        cells = []
        for share in group.all_shares():
            both = [seed for seed in seeds if share in by_seed[seed] and share in base[seed]]
            cells.append(spread([by_seed[seed][share] - base[seed][share] for seed in both], sign=True))
        areas = [area(by_seed[seed], group.shares) - area(base[seed], group.shares) for seed in seeds]
        rows.append([name, str(len(seeds)), *cells, spread(areas, sign=True)])
    return rows_of(columns_of(group), rows, 1) if rows else []


def _reference_of(group: Group, name: str, reference: Callable[[str], str | None]) -> dict[int, Curve]:
    """The curves that those of a contender are compared with: after compensation too, if there are such."""
    alone = name.removesuffix(AFTER)
    other = reference(alone)
    if other is None or other == alone:
        return {}
    return group.curves.get(other + name[len(alone) :]) or group.curves.get(other, {})


def costs(group: Group) -> list[str]:
    """Median seconds of a processor for each stage, and thousands of forward passes of the full network."""
    rows = []
    for name, records in group.records.items():
        work = [_work(record.times("seconds")) for record in records]
        passes = [_work(record.times("forwards")) / 1000 for record in records]
        after = [record.times("seconds").get("compensate") for record in records]
        seconds = [value for value in after if value is not None]
        converting = np.median([record.times("seconds")["convert"] for record in records])
        entries = np.median([record.number("entries") for record in records])
        rows.append(
            [
                name,
                f"{converting:.1f}",
                three_digits(float(np.median(work))),
                f"{np.median(passes):,.0f}",
                f"{np.median(seconds):.1f}" if seconds else "",
                f"{entries:.0f}",
            ]
        )
    columns = [
        "contender",
        "s to convert",
        "s to plan or train",
        "thousand forward passes",
        "s to compensate",
        "entries",
    ]
    return rows_of(columns, rows, 1)


def _work(stages: Mapping[str, float]) -> float:
    """Of the stage that makes the sub-networks."""
    return stages.get("train", stages.get("plan", 0.0))


# Plot -----------------------------------------------------------------------------------------------


def plot(result: Info, path: Path) -> None:
    """One panel for each set and size: mean top-1 against MACs, with bars of one standard error.

    Only the contenders of the final plan are drawn, on the networks that all of them have.
    """
    from matplotlib.figure import Figure

    drawn = [group for group in groups(result) if not group.headless]
    figure = Figure(figsize=(7.2, 3.6 * len(drawn)), dpi=120, layout="constrained")
    for axes, group in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        shown = {name: curve for name, curve in group.curves.items() if name.removesuffix(AFTER) in FINAL}
        seeds = [seed for seed in sorted(group.seeds) if all(seed in by_seed for by_seed in shown.values())]
        for name, by_seed in shown.items() if seeds else ():
            points = [_point([by_seed[seed] for seed in seeds], share) for share in group.shares]
            means, errors = zip(*points, strict=True)
            color = "0.2" if name == BASE else f"C{FINAL.index(name.removesuffix(AFTER))}"
            style = {"color": color, "linewidth": 2 if name == BASE else 1}
            dashes = ":" if AFTER in name else "--" if "planned" in name else "-"
            percents = [100 * share for share in group.shares]
            axes.errorbar(percents, means, errors, linestyle=dashes, marker=".", label=name, capsize=2, **style)
        axes.set(title=group.title, xscale="log", xlabel="share of the MACs (%)", ylabel="top-1 (%)")
        axes.set_xticks([100 * share for share in group.shares], [f"{share:.0%}" for share in group.shares])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.savefig(path)


def _point(curves: Iterable[Curve], share: float) -> tuple[float, float]:
    values = [curve[share] for curve in curves]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
