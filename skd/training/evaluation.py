"""The accuracy-MACs curve during a run. Its area decides which weights are kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from skd.supernet import SuperNet
from skd.support.curve import Rows, area, measure_curve
from skd.training.history import Epoch
from skd.training.run import Run
from skd.training.types import Batches


def measure_original(run: Run) -> None:
    """The accuracy of the network before training, and a warning if it is not what was expected."""
    if run.val_loader is None:
        return
    rows = _curve(run, run.supernet, run.val_loader, (1.0,), "Evaluating the network before training")
    top1: float = rows[0]["top1"]
    run.history.original_top1 = top1
    run.screen.line(f"before training: {top1:.2f} % top-1")
    expected = run.config.expected_top1
    if expected is not None and abs(top1 - expected) > 0.5:
        warnings.warn(
            f"the network scores {top1:.2f} % before training, but {expected:.2f} % was expected: "
            "are the weights, the preprocessing and the order of the classes right?",
            stacklevel=2,
        )


def evaluate_epoch(run: Run, row: Epoch) -> None:
    """The curve of the averaged weights, into `row`; they are kept if its area is the largest so far."""
    run.check_finite(weights=True)
    if run.val_loader is not None:
        budgets = run.config.budgets
        row.curve = _curve(run, run.state.averaged, run.val_loader, budgets, "Evaluating")
        row.area = area(row.curve, budgets)
        best = run.history.area
        if best is not None and row.area < best:  # if the areas are equal, the later epoch is kept
            return
    elif run.position.epoch < run.config.epochs - 1:
        return
    row.best, run.history.best_epoch = True, run.position.epoch
    for earlier in run.history.epochs:
        earlier.best = False
    run.keep_weights()


def _curve(run: Run, supernet: SuperNet, loader: Batches, budgets: Sequence[float], description: str) -> Rows:
    with run.state.autocast():
        return measure_curve(supernet, run.stoppable(loader, description), budgets, group=run.group)
