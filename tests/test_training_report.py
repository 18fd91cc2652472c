"""The report of a run: its files, its numbers, and that nothing in its plots is cut off or overlaps."""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_batches, tiny_vit
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

import skd
from skd.dropout_list import DropoutList
from skd.supernet import SuperNet
from skd.support import plots
from skd.support.curve import area, entries_within, sizes_of
from skd.training import report
from skd.training.history import Epoch, History
from skd.training.report import PLOTS, write_report

RUNS = {"short": (2, 1, 20, 2), "paper": (300, 50, 481, 12)}  # epochs, those that grow the list, entries, blocks


def network(entries: int, blocks: int) -> SuperNet:
    """A super-network whose modules narrow at different speeds, some of them to 0."""
    supernet = SuperNet(tiny_vit(depth=blocks, mlp_ratio=2))
    full = np.array(supernet.widths())
    speed = np.random.default_rng(0).uniform(0.7, 1.4, len(full))
    kept = np.clip(1 - speed * np.linspace(0, 1, entries)[:, None], 0, 1)
    supernet.dropout_list = DropoutList(supernet.modules_in_order, np.round(full * kept), costs=supernet.costs)
    return supernet


def curve_of(supernet: SuperNet, entries: int, budgets: Any, worst: float) -> list[dict[str, Any]]:
    chosen = {budget: entry for budget, entry in entries_within(supernet, budgets).items() if entry < entries}
    rows = sizes_of(supernet, list(chosen.values()))
    return [
        {"budget": budget, **row, "top1": 81.234 - (81 - worst) * (1 - row["macs_fraction"]) ** 2}
        for budget, row in zip(chosen, rows, strict=True)
    ]


def history_of(supernet: SuperNet, config: skd.TrainConfig, growing: int) -> History:
    """As `skd.train` would return it, with made-up numbers."""
    history, dropout_list = History(original_top1=81.87), supernet.dropout_list
    fraction = dropout_list.macs / dropout_list.macs[0]
    sensitivity = np.geomspace(5e-4, 0.1, len(dropout_list.modules)).tolist()
    for epoch in range(config.epochs):
        entries = math.ceil(len(dropout_list) * min(1, (epoch + 1) / growing))
        shares = [share for share in np.arange(15.5, 0, -1) / 16 if share > fraction[entries - 1]]
        row = Epoch(
            epoch=epoch,
            step=7 * (epoch + 1),
            lr=1e-3 * (1 - epoch / config.epochs),
            loss=2.5 + 1 / (epoch + 1),
            images=1001,
            entries=entries,
            macs_fraction=float(fraction[entries - 1]),
            sensitivity=dict(zip(dropout_list.modules, sensitivity, strict=True)) if epoch < growing else None,
            drawn=[{"macs_fraction": s, "count": 3, "loss": 3 - s, "seconds": 0.1 + 0.2 * s} for s in shares[::-1]],
            curve=None,
            area=None,
            best=False,
            seconds={"importance": 1.0, "steps": 5.0, "evaluate": 2.0, "total": 8.25},
        )
        if (epoch + 1) % config.eval_every == 0 or epoch == config.epochs - 1:
            row.curve = curve_of(supernet, entries, config.budgets, 78 - 10 / (epoch + 1))
            row.area = area(row.curve, config.budgets)
            history.best_epoch = epoch
        history.epochs.append(row)
    return history


@pytest.fixture(scope="module", params=RUNS)
def run(request: Any) -> tuple[History, SuperNet, skd.TrainConfig]:
    epochs, growing, entries, blocks = RUNS[request.param]
    supernet, config = network(entries, blocks), skd.TrainConfig(epochs=epochs)
    return history_of(supernet, config, growing), supernet, config


@pytest.fixture
def short() -> tuple[History, SuperNet, skd.TrainConfig]:
    supernet, config = network(20, 2), skd.TrainConfig(epochs=2)
    return history_of(supernet, config, 1), supernet, config


def referenced(path: Path) -> list[str]:
    return re.findall(r"!\[[^]]*\]\(([^)]*)\)", path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(path: Path, heading: str) -> list[list[str]]:
    """The cells of the table in a file whose heading begins with `heading`, line by line."""
    lines = itertools.dropwhile(lambda line: not line.startswith(heading), path.read_text().splitlines())
    lines = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines][2:]


def drawn_by(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> dict[str, Any]:
    """The figures of a report by the name of their file."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    path = write_report(*arguments)
    return dict(zip([Path(name).name for name in referenced(path)], figures, strict=True))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not render plots, which would take most of the time."""
    monkeypatch.setattr(plots, "png", lambda figure: b"plot")


def line_of(axes: Any, label: str) -> Any:
    (line,) = [line for line in axes.get_lines() if line.get_label().startswith(label)]
    return line


# Files


def test_files(run: Any, tmp_path: Path) -> None:
    path = write_report(tmp_path, *run)
    assert path == tmp_path / "report.md"
    assert referenced(path) == [f"report/{name}" for name in PLOTS]
    assert set(contents(tmp_path)) == {"report.md", *referenced(path)}
    for name in referenced(path):
        pixels = imread(tmp_path / name)
        assert pixels.shape[1] > 800 and pixels.std() > 0.05


def test_same_bytes_without_pyplot(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, *short)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("failing", [0, 1, 5])
def test_failed_write_leaves_the_old_report(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(plots, "png", lambda figure: b"plot %d" % next(numbers))
    write_report(tmp_path, *short)
    before = contents(tmp_path)
    assert len(before) == 6
    short[0].original_top1 = 12.0
    count = itertools.count()
    with monkeypatch.context() as patch:
        for method in ("write_text", "write_bytes"):
            original = getattr(Path, method)

            def write(path: Path, content: Any, *, original: Any = original, **more: Any) -> None:
                full = next(count) == failing
                original(path, content[: len(content) // 2] if full else content, **more)
                if full:
                    raise OSError("No space left on device")

            patch.setattr(Path, method, write)
        with pytest.raises(OSError, match="No space"):
            write_report(tmp_path, *short)
    assert contents(tmp_path) == before
    write_report(tmp_path, *short)
    after = contents(tmp_path)
    assert set(after) == set(before) and all(after[name] != before[name] for name in before)


def test_old_plots_go(short: Any, quick: None, tmp_path: Path) -> None:
    write_report(tmp_path, *short)
    (tmp_path / "report" / "mine.png").write_text("keep")
    short[0].epochs[0].sensitivity = None
    path = write_report(tmp_path, *short)
    assert set(contents(tmp_path)) == {"report.md", "report/mine.png", *referenced(path)}
    assert not (tmp_path / "report" / "importance.png").exists() and "Importance" not in path.read_text()


def test_no_epoch(short: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no epoch"):
        write_report(tmp_path, History(), *short[1:])
    assert not contents(tmp_path)


# Numbers


def test_numbers(run: Any, quick: None, tmp_path: Path) -> None:
    history, supernet, config = run
    path = write_report(tmp_path, *run)
    lines, unit = table(path, "| budget"), 1e6 if "MACs full (M)" in path.read_text() else 1e3
    assert len(lines) == len(history.curve) >= 5
    for line, row in zip(lines, history.curve, strict=True):
        budget, entry, full, share, linear, params, top1 = (float(cell.strip("%").replace(",", "")) for cell in line)
        assert (entry, params) == (row["entry"], row["params"])
        assert (budget / 100, share / 100) == pytest.approx((row["budget"], row["macs_fraction"]), abs=6e-4)
        assert (full * unit, linear * unit) == pytest.approx((row["macs"], row["macs_linear"]), abs=0.0051 * unit)
        assert top1 == pytest.approx(row["top1"], abs=0.0051)
    summary = dict(table(path, "|  |"))
    assert summary["epochs"] == f"{config.epochs}, {7 * config.epochs:,} steps"
    assert summary["images seen"] == f"{1001 * config.epochs:,}"
    assert summary["original top-1"] == "81.87 %"
    assert f"epoch {config.epochs}," in summary["weights kept"] and f"{history.area:.2f} %" in summary["weights kept"]
    assert summary["wall time"].endswith("(importance 12%, steps 61%, evaluate 24%)")
    host = 1e3 * sum(row["seconds"]["steps"] for row in history.epochs) / (7 * config.epochs)
    assert float(summary["host time per step"].removesuffix(" ms").replace(",", "")) == pytest.approx(host, abs=0.051)
    assert summary["settings"] == ("the defaults" if config.epochs == 300 else "epochs 2")
    assert f"{int(supernet.costs.params(supernet.widths())):,} parameters" in summary["model"]
    assert f"skd {skd.__version__}" in summary["versions"]


def test_compile_time(short: Any, quick: None, tmp_path: Path) -> None:
    history, supernet, config = copy.deepcopy(short)
    history.epochs[0].seconds = {"compile": 90.0, "steps": 0.12, "total": 91.0}
    summary = dict(table(write_report(tmp_path, history, supernet, config), "|  |"))
    assert summary["host time per step"].endswith(" ms, and 90.0 s to compile")


def test_a_run_cut_short(short: Any, quick: None, tmp_path: Path) -> None:
    history, supernet, config = short
    path = write_report(tmp_path, history, supernet, config.changed(epochs=9))
    assert dict(table(path, "|  |"))["epochs"].startswith("2 of 9")


def test_contrast(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are drawn and written literally; a budget that the other curve does not have is a dash."""
    history = short[0]
    other = [{**row, "top1": row["top1"] / 2} for row in history.curve[1:]]
    figures = drawn_by(monkeypatch, tmp_path, *short, {"_a $b | c": other})
    cells = [line[-1] for line in table(tmp_path / "report.md", "| budget")]
    assert cells == ["-", *(f"{row['top1']:.2f}" for row in other)]
    assert r" top-1 (%) | _a $b \| c |" in (tmp_path / "report.md").read_text()
    (legend,) = figures["curve.png"].legends
    assert r"a \$b | c" in [text.get_text() for text in legend.get_texts()]
    near, whole = figures["curve.png"].axes[:2]  # halved accuracies: the main curve has a panel of its own
    assert near.get_ylim()[0] > max(row["top1"] for row in other) > whole.get_ylim()[0]


# Runs with little to show


def test_finetuning(quick: None, tmp_path: Path) -> None:
    """One entry, one epoch; evaluated or not."""
    batches = random_batches()
    for name, val_loader, original in (("without", None, "not measured"), ("with", batches, r"\d+\.\d\d %")):
        model, config = tiny_vit(), skd.finetune_config(epochs=1, mixup=0, cutmix=0, batch_size=4)
        out = tmp_path / name
        out.mkdir()
        history = skd.finetune(model, batches, val_loader, config)
        path = write_report(out, history, SuperNet(model), config)
        assert referenced(path) == ["report/epochs.png"] and set(contents(out)) == {"report.md", "report/epochs.png"}
        summary = dict(table(path, "|  |"))
        assert re.fullmatch(original, summary["original top-1"]) and summary["images seen"] == "8"
        assert len(table(path, "| budget")) == (val_loader is not None)
        assert ("not evaluated" in path.read_text()) == (val_loader is None)


def test_trained(model: Any, batches: Any, tmp_path: Path) -> None:
    """Whatever `skd.train` puts into a history, the report can show."""
    supernet = skd.convert(model, batches)
    config = skd.TrainConfig(epochs=3, mixup=0, cutmix=0, batch_size=4, eval_every=1, progressive_epochs=2)
    history = skd.train(supernet, batches, batches, config, calibration=batches)
    path = write_report(tmp_path, history, supernet, config)
    assert referenced(path) == [f"report/{name}" for name in PLOTS]
    assert [int(line[1]) for line in table(path, "| budget")] == [row["entry"] for row in history.curve]


def test_without_seconds(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in short[0].epochs:
        row.seconds = {}
        for drawn in row.drawn:
            del drawn["seconds"]
    figures = drawn_by(monkeypatch, tmp_path, *short)
    assert dict(table(tmp_path / "report.md", "|  |"))["wall time"] == "not recorded"
    assert [text.get_text() for text in figures["steps.png"].axes[1].texts] == ["no times recorded"]
    assert not figures["steps.png"].axes[1].get_lines()


# What the plots show


def test_curve(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history, supernet, config = run
    unit = 1e6 if supernet.dropout_list.macs[0] >= 1e6 else 1e3
    figure = drawn_by(monkeypatch, tmp_path, *run)["curve.png"]
    axes = figure.axes[0]
    line = line_of(axes, f"epoch {config.epochs}, the best")
    assert np.allclose(line.get_xdata(), [row["macs"] / unit for row in history.curve])
    assert np.allclose(line.get_ydata(), [row["top1"] for row in history.curve])
    assert line_of(axes, "original").get_ydata()[0] == history.original_top1
    (secondary,) = axes.child_axes
    forward, back = secondary._functions
    linear = np.array([row["macs_linear"] for row in history.curve]) / unit
    assert np.allclose(forward(line.get_xdata()), linear) and np.allclose(back(linear), line.get_xdata())
    if config.epochs == 300:  # those before epoch 50 lack budgets
        first = line_of(axes, "epoch 50, the first evaluation with all budgets")
        assert np.allclose(first.get_ydata(), [row["top1"] for row in history.epochs[49]["curve"]])


def test_dropout_list(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, supernet, _ = run
    axes = drawn_by(monkeypatch, tmp_path, *run)["dropout_list.png"].axes[0]
    (image,) = axes.get_images()
    widths = supernet.dropout_list.widths
    assert image.get_array().shape == widths.T.shape and (widths == 0).any()
    assert np.array_equal(np.ma.getmaskarray(image.get_array()), widths.T == 0)
    assert np.allclose(image.get_array().filled(0).T, widths / supernet.widths())
    assert [label.get_text() for label in axes.get_yticklabels()] == list(supernet.dropout_list.modules)
    assert all(tick == int(tick) for tick in axes.get_xticks())
    (top,) = axes.child_axes
    macs = supernet.dropout_list.macs
    for entry, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True):
        share = float(label.get_text().strip("%")) / 100
        step = (macs[max(int(entry) - 1, 0)] - macs[int(entry)]) / macs[0]
        assert abs(macs[int(entry)] / macs[0] - share) <= max(step, 0.005)
    assert top.get_xticks()[-1] == len(macs) - 1


def test_importance(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """White where the module was skipped by the sub-network that was measured: the smallest before the list grew."""
    history, supernet, _ = run
    (image,) = drawn_by(monkeypatch, tmp_path, *run)["importance.png"].axes[0].get_images()
    grown = [row for row in history.epochs if row["sensitivity"]]
    assert image.get_array().shape == (len(supernet.infos), len(grown))
    lasts = [0, *(row["entries"] - 1 for row in grown[:-1])]
    assert np.array_equal(np.ma.getmaskarray(image.get_array()), supernet.dropout_list.widths[lasts].T == 0)
    values = [list(row["sensitivity"].values()) for row in grown]
    assert np.ma.allclose(image.get_array(), np.array(values).T)
    assert type(image.norm).__name__ == "LogNorm" and image.norm.vmin == np.min(values)


def test_steps(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are means over the steps, not over the epochs; the line leads from 0 through the largest."""
    history = short[0]
    history.epochs[1].drawn = [
        {**row, "count": 9, "loss": row["loss"] - 1, "seconds": 2 * row["seconds"]}
        for row in history.epochs[1]["drawn"]
    ]
    left, right = drawn_by(monkeypatch, tmp_path, *short)["steps.png"].axes
    drawn = history.epochs[1]["drawn"]
    share = np.array([row["macs_fraction"] for row in drawn])
    assert np.allclose(line_of(left, "epoch 2").get_ydata(), 2 - share)
    assert np.allclose(line_of(left, "epoch 1").get_ydata(), 3 - share)
    measured, line = line_of(right, "measured"), line_of(right, "in proportion")
    assert np.allclose(measured.get_xdata(), 100 * share)
    assert np.allclose(measured.get_ydata(), 1e3 * (0.1 + 0.2 * share) * (3 + 2 * 9) / 12)
    assert np.allclose(np.interp(100 * share[-1], line.get_xdata(), line.get_ydata()), measured.get_ydata()[-1])
    assert line.get_ydata()[0] == line.get_xdata()[0] == 0


def test_epochs(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Areas of evaluations before the list was long enough would only squeeze the others."""
    history, _, config = run
    panels = drawn_by(monkeypatch, tmp_path, *run)["epochs.png"].axes
    assert [axes.get_ylabel() for axes in panels] == ["mean loss", "area (%)", "learning rate"]
    first = 50 if config.epochs == 300 else 2
    expected = [row["area"] for row in history.epochs[first - 1 :] if row["area"] is not None]
    assert np.allclose(panels[1].get_lines()[0].get_ydata(), expected)
    assert np.allclose(panels[0].get_lines()[0].get_ydata(), [row["loss"] for row in history.epochs])
    assert np.allclose(panels[2].get_lines()[0].get_xdata(), range(1, config.epochs + 1))


def test_nothing_overlaps_or_is_cut_off(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contrast = {f"a rather long label of another curve, number {index}": run[0].curve for index in range(4)}
    for name, figure in drawn_by(monkeypatch, tmp_path, *run, contrast).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = figure.bbox.size
        tight = figure.get_tightbbox(canvas.get_renderer()).extents * figure.dpi
        assert tight[0] >= -1 and tight[1] >= -1 and tight[2] <= width + 1 and tight[3] <= height + 1, name
        for axes in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [label for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
                boxes = [label.get_window_extent() for label in labels]
                assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), (name, axis)


def test_labels_of_the_smallest_entries() -> None:
    """Ticks keep their distance, also where the list ends right after a round share."""
    fraction = np.concatenate([np.linspace(1, 0.105, 100), [0.1, 0.099]])
    ticks = plots._share_ticks(fraction, len(fraction))
    assert ticks[0] == (0, 1.0) and ticks[-1] == (101, fraction[-1])
    assert min(np.diff([entry for entry, _ in ticks])) > 5
    assert plots._share_ticks(np.array([1.0, 0.5]), 2) == [(0, 1.0), (1, 0.5)]


def test_units() -> None:
    assert [plots.unit(value)[1] for value in (5e3, 1e6, 9.9e8, 1e9)] == ["k", "M", "M", "G"]
    assert [report._duration(value) for value in (0.04, 119, 121, 7300)] == [
        "0.0 s",
        "119.0 s",
        "2 min",
        "2 h 02 min",
    ]
