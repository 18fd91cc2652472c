"""A run for people: report.md, one Markdown file, and the plots in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skd.supernet import SuperNet
from skd.support import plots
from skd.support.curve import Rows
from skd.support.outputs import replacing
from skd.support.settings import TrainConfig
from skd.training.history import BINS, Epoch, History
from skd_kernels import build_info

PLOTS = ("curve.png", "dropout_list.png", "importance.png", "steps.png", "epochs.png")
_PARTS = ("importance", "data", "compile", "steps", "evaluate", "checkpoint")


class _Section(NamedTuple):
    """A plot, and how to read it."""

    name: str
    title: str
    figure: Any
    text: str


def write_report(
    folder: str | os.PathLike[str],
    history: History,
    supernet: SuperNet,
    config: TrainConfig,
    contrast: Mapping[str, Rows] | None = None,
) -> Path:
    """Write folder/report.md and its plots, folder/report/*.png.

    Nothing is replaced before all of it is written: a failure leaves an earlier report as it was. Plots for which the
    run has no data are left out, and removed if an earlier report had them. The same arguments give the same bytes.

    Args:
        folder: an existing folder.
        history: what `skd.train` or `skd.finetune` returned.
        supernet: the network that was trained, with its dropout list; a fine-tuned model: `SuperNet` of it.
        config: the run's settings.
        contrast: curves to compare with, rows of `skd.support.curve.measure_curve` by label; they are drawn, and
            have a column in the table, where the budget is the same.

    Returns:
        The path of report.md.

    Raises:
        ValueError: `history` has no epoch.
        OSError: something could not be written.
    """
    if not history.epochs:
        raise ValueError("history has no epoch; there is nothing to report")
    folder, contrast = Path(folder), dict(contrast or {})
    found = (
        _curve(history, supernet, contrast),
        _dropout_list(supernet),
        _importance(history, supernet),
        _steps(history),
        _epochs(history),
    )
    sections = [section for section in found if section is not None]
    images = {section.name: plots.png(section.figure) for section in sections}
    blocks = ["# Training report", *_summary(history, supernet, config), *_curve_table(history, supernet, contrast)]
    for section in sections:
        blocks += [f"## {section.title}", f"![{section.title}](report/{section.name})", section.text]
    path = folder / "report.md"
    _write(path, "\n\n".join(blocks) + "\n", images)
    return path


def _write(path: Path, text: str, images: dict[str, bytes]) -> None:
    """Write all files or none: the temporary files are renamed only when all are written, report.md last."""
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:  # leaves in reverse order
        stack.enter_context(replacing(path)).write_text(text, encoding="utf-8")
        for name, image in images.items():
            stack.enter_context(replacing(folder / name)).write_bytes(image)
    for name in set(PLOTS) - set(images):
        (folder / name).unlink(missing_ok=True)


# Text and tables


def _summary(history: History, supernet: SuperNet, config: TrainConfig) -> list[str]:
    rows, best = history.epochs, history.best
    planned = "" if len(rows) == config.epochs else f" of {config.epochs:,}"
    info = build_info()
    kept = "the last"
    if best is not None and best.area is not None:
        kept = f"of epoch {best.epoch + 1}, mean top-1 over the budgets (area) {best['area']:.2f} %"
    lines = {
        "model": _model_text(supernet),
        "epochs": f"{len(rows):,}{planned}, {rows[-1]['step']:,} steps",
        "images seen": f"{sum(row['images'] for row in rows):,}",
        "wall time": _time_text(rows),
        "host time per step": _host_text(rows),
        "sub-networks": f"{rows[-1]['entries']:,}, down to {rows[-1]['macs_fraction']:.1%} of the MACs",
        "original top-1": "not measured" if history.original_top1 is None else f"{history.original_top1:.2f} %",
        "weights kept": kept,
        "settings": _settings_text(config),
        "versions": ", ".join(f"{name} {info[name]}" for name in ("skd", "python", "torch", "timm")),
    }
    return [_table(["", ""], lines.items(), ":-"), "Epochs count from 1 here, and from 0 in history.jsonl."]


def _model_text(supernet: SuperNet) -> str:
    model, widths = supernet.model, supernet.widths()
    full, linear = (int(supernet.costs.macs(widths, convention)) for convention in ("full", "linear"))
    divisor, letter, _ = plots.unit(full)
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return (
        f"{name}: {supernet.network.summary(model)}, {model.num_classes:,} classes, "
        f"{int(supernet.costs.params(widths)):,} parameters, {full / divisor:,.2f} {letter} MACs per image (full), "
        f"{linear / divisor:,.2f} {letter} (linear)"
    )


def _time_text(rows: Sequence[Epoch]) -> str:
    """In all, and the share of each part."""
    known = [row.seconds for row in rows if row.seconds]
    total = sum(seconds["total"] for seconds in known)
    if not total:
        return "not recorded"
    shares = {part: sum(seconds.get(part, 0.0) for seconds in known) / total for part in _PARTS}
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
    return _duration(total) + (f" ({parts})" if parts else "")


def _host_text(rows: Sequence[Epoch]) -> str:
    """What the main process takes for a step: on a GPU to issue it, while the device computes."""
    known = [row.seconds for row in rows if row.seconds]
    steps = rows[-1].step - sum("compile" in seconds for seconds in known)
    text = f"{1e3 * sum(seconds.get('steps', 0.0) for seconds in known) / max(steps, 1):,.1f} ms"
    compiling = sum(seconds.get("compile", 0.0) for seconds in known)
    return text + (f", and {_duration(compiling)} to compile" if compiling else "")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _settings_text(config: TrainConfig) -> str:
    """Those that are not the default."""
    default = TrainConfig().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != default[name]}
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "the defaults"


def _curve_table(history: History, supernet: SuperNet, contrast: dict[str, Rows]) -> list[str]:
    if not history.curve:
        return ["The run was not evaluated: no curve."]
    divisor, letter, _ = plots.unit(float(supernet.costs.macs(supernet.widths())))
    heading = [
        "budget",
        "entry",
        f"MACs full ({letter})",
        "share",
        f"MACs linear ({letter})",
        "parameters",
        "top-1 (%)",
    ]
    others = [{row["budget"]: row["top1"] for row in rows if "budget" in row} for rows in contrast.values()]
    lines = [
        [
            f"{row['budget']:.1%}",
            str(row["entry"]),
            f"{row['macs'] / divisor:,.2f}",
            f"{row['macs_fraction']:.1%}",
            f"{row['macs_linear'] / divisor:,.2f}",
            f"{row['params']:,}",
            f"{row['top1']:.2f}",
            *(f"{known[row['budget']]:.2f}" if row["budget"] in known else "-" for known in others),
        ]
        for row in history.curve
    ]
    return ["## Sub-networks", _table([*heading, *contrast], lines, "-:")]


def _table(heading: list[str], lines: Iterable[Iterable[str]], alignment: str) -> str:
    cells = [heading, [alignment] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in cells)


def _cell(value: object) -> str:
    """One cell of a table; a bar or a line break would end it."""
    return " ".join(str(value).replace("|", r"\|").split())


# Plots


def _curve(history: History, supernet: SuperNet, contrast: dict[str, Rows]) -> _Section | None:
    best = history.best
    if best is None or not best.curve or (len(best.curve) == 1 and not contrast):
        return None
    first = _complete(history.epochs)[0]
    curves = {f"epoch {best.epoch + 1}, the best": best.curve}
    if first.epoch != best.epoch and first.curve:
        curves[f"epoch {first.epoch + 1}, the first evaluation with all budgets"] = first.curve
    widths = supernet.dropout_list.widths
    full, linear = supernet.costs.macs(widths), supernet.costs.macs(widths, "linear")
    figure = plots.accuracy_figure({**curves, **contrast}, history.original_top1, full, linear)
    text = (
        "Each dot is the largest sub-network within a budget of MACs; further up and further left is better. Where "
        "several epochs were evaluated, the best was chosen by these very images: it is a little optimistic."
    )
    return _Section("curve.png", "Accuracy and MACs", figure, text)


def _complete(rows: Sequence[Epoch]) -> list[Epoch]:
    """Epochs whose evaluation reached as many budgets as any did: the dropout list was long enough."""
    most = max((len(row.curve) for row in rows if row.curve), default=0)
    return [row for row in rows if row.curve and len(row.curve) == most]


def _dropout_list(supernet: SuperNet) -> _Section | None:
    dropout_list = supernet.dropout_list
    if len(dropout_list) < 2:
        return None
    macs, shares = dropout_list.macs, dropout_list.widths / np.maximum(supernet.widths(), 1)
    figure = plots.widths_figure(dropout_list.modules, shares, macs / macs[0])
    text = (
        "A column is a sub-network, from the full one on the left to the smallest on the right; a row is a module. "
        "Modules that stay bright were found to be worth their MACs, white ones are skipped."
    )
    return _Section("dropout_list.png", "Widths of the sub-networks", figure, text)


def _importance(history: History, supernet: SuperNet) -> _Section | None:
    measured = {row.epoch: row.sensitivity for row in history.epochs if row.sensitivity}
    if not measured:
        return None
    modules, widths = supernet.dropout_list.modules, supernet.dropout_list.widths
    entries = {row.epoch + 1: row.entries for row in history.epochs}
    values = np.array([[found.get(name, np.nan) for name in modules] for found in measured.values()], dtype=float)
    for index, epoch in enumerate(measured):
        smallest = widths[min(entries.get(epoch, 1), len(widths)) - 1]  # before the list grew
        values[index, smallest == 0] = np.nan
    figure = plots.importance_figure(modules, values, [epoch + 1 for epoch in measured])
    text = (
        "Sensitivity: what the planner measured that the smallest sub-network of that time loses when the module is "
        "skipped: with 'loss' the rise of the loss, with 'paper' the share of the correctly classified calibration "
        "images. Bright modules tend to be narrowed last; in the darkest the loss was none, or too small to count."
    )
    return _Section("importance.png", "Importance of the modules", figure, text)


def _steps(history: History) -> _Section | None:
    """None where all steps are of one size."""
    full = [row for row in history.epochs if row.entries == history.epochs[-1].entries and row.drawn]
    if not full or full[-1].entries < 2:
        return None
    losses = {f"epoch {row.epoch + 1}": row.drawn for row in (full[0], full[-1])}
    times = _mean_times(full)
    text = (
        "Left: the loss of the steps by the size of the sub-network they drew, in the first epoch with the whole "
        "dropout list and in the last; small dots are few steps, so uncertain. Right: the time of a step, mean over "
        "those epochs and the ones between; dots above the dotted line save less time than MACs."
    )
    if times:
        share = times[0]["seconds"] / max(times[-1]["seconds"], 1e-12)
        text += f" The smallest, {times[0]['macs_fraction']:.0%} of the MACs, took {share:.0%} of the largest's time."
    return _Section("steps.png", "Steps by size of the sub-network", plots.steps_figure(losses, times), text)


def _mean_times(rows: Sequence[Epoch]) -> list[dict[str, float]]:
    """Time per step by size, over all these epochs: [{macs_fraction, seconds}], the smallest first."""
    bins: dict[int, np.ndarray] = {}
    for drawn in (drawn for row in rows for drawn in row.drawn if drawn.get("seconds") is not None):
        place = min(int(drawn["macs_fraction"] * BINS), BINS - 1)
        sums = np.array([1.0, drawn["macs_fraction"], drawn["seconds"]]) * drawn["count"]
        bins[place] = bins.get(place, 0.0) + sums
    means = [bins[place] / bins[place][0] for place in sorted(bins)]
    return [{"macs_fraction": float(mean[1]), "seconds": float(mean[2])} for mean in means]


def _epochs(history: History) -> _Section:
    rows = history.epochs
    series = {"mean loss": [(row.epoch + 1, row.loss) for row in rows]}
    areas = [(row.epoch + 1, row.area) for row in _complete(rows) if row.area is not None]
    several = bool(areas) and len(history.curve) > 1
    if areas:
        series["area (%)" if several else "top-1 (%)"] = areas
    series["learning rate"] = [(row.epoch + 1, row.lr) for row in rows]
    growing = max((row.epoch + 1 for row in rows if row.sensitivity is not None), default=0)
    text = "The loss is the mean over the sub-networks drawn, training images as augmented."
    if several:
        text += " The area is the mean top-1 over the budgets, of evaluations that reached all of them."
    if growing:
        text += " In the shaded epochs the dropout list grew: ever smaller sub-networks joined."
    best = history.best_epoch + 1 if areas and history.best_epoch is not None else None
    if best:
        text += " The dotted line is the epoch whose weights were kept."
    return _Section("epochs.png", "Epochs", plots.epochs_figure(series, growing, best), text)
