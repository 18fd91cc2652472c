"""What happened in a training run, epoch by epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from skd.dropout_list import DropoutList
from skd.ranks import size_of, summed

BINS = 16  # of the sub-networks' MACs, in an epoch's record of its steps


@dataclass
class History:
    """One dict per epoch, in order; JSON values only.

    Attributes:
        original_top1: of the network before training, in percent; None where there was nothing to measure it on.
        epochs: per epoch:
            epoch (from 0), step (optimizer steps so far), lr, loss (mean), images, entries (length of the dropout
            list), macs_fraction (of the smallest entry);
            sensitivity: {module: gamma} in epochs that grew the list (with importance="online" its share of the
            scores; empty with a planner that does not measure it), else None;
            drawn: [{macs_fraction, count, loss, seconds}], the steps by size of the sub-network, means;
            curve: rows of `skd.curve.measure_curve`, area (percent) and best (bool) where it was evaluated, else
            None, None and False;
            seconds: {importance, data, compile (the first step, with torchcompile), steps, evaluate, checkpoint,
            total}; on a GPU steps is what the host takes to issue them.
        best_epoch: the epoch whose weights were kept, by area.
    """

    original_top1: float | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch whose weights were kept."""
        found = [row for row in self.epochs if row["epoch"] == self.best_epoch]
        return found[0] if found else None

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The accuracy-MACs curve of the weights that were kept."""
        return [] if self.best is None else self.best["curve"] or []

    @property
    def area(self) -> float | None:
        """Mean top-1 over the budgets, of the weights that were kept (percent)."""
        return None if self.best is None else self.best["area"]

    def to_jsonl(self) -> str:
        """One line of JSON per epoch."""
        return "".join(json.dumps(row) + "\n" for row in self.epochs)


class StepLog:
    """Entry, loss and seconds of each step of an epoch; nothing is read from the device before `summary`.

    On several ranks of a group each has the losses of its own images, and its own seconds.
    """

    def __init__(self, device: torch.device, earlier: dict[str, Any] | None = None, group: Any = None) -> None:
        self.group = group
        self.on_gpu = device.type == "cuda"
        self.earlier = earlier or {"count": 0, "loss": 0.0, "images": 0, "drawn": []}
        self.images = self.earlier["images"]
        self.entries: list[int] = []
        self.losses: list[torch.Tensor] = []
        self.times: list[Any] = []

    def add(self, entry: int, loss: torch.Tensor, time: Any, images: int) -> None:
        """One step; `time` is seconds, or a (start, end) pair of CUDA events; `images` of all ranks."""
        self.entries.append(entry)
        self.losses.append(loss.detach())
        self.times.append(time)
        self.images += images

    def last_loss(self) -> float:
        return float(self.losses[-1]) if self.losses else float("nan")

    def summary(self, dropout_list: DropoutList) -> dict[str, Any]:
        """{count, loss (sum), images, drawn}: of this epoch so far, steps before an interruption included.

        On several ranks all call it, and have the losses of the whole batches.
        """
        mine = [torch.stack(self.losses).double()] if self.losses else []
        losses = [loss / size_of(self.group) for whole in summed(mine, self.group) for loss in whole.tolist()]
        seconds = [start.elapsed_time(end) / 1e3 for start, end in self.times] if self.on_gpu else self.times
        sums = {row["bin"]: dict(row) for row in self.earlier["drawn"]}
        total = self.earlier["loss"]
        for entry, loss, time in zip(self.entries, losses, seconds, strict=True):
            share = float(dropout_list.macs[entry] / dropout_list.macs[0])
            place = min(int(share * BINS), BINS - 1)
            row = sums.setdefault(
                place, {"bin": place, "count": 0, "macs_fraction": 0.0, "loss": 0.0, "seconds": 0.0}
            )
            row["count"] += 1
            row["macs_fraction"] += share
            row["loss"] += loss
            row["seconds"] += time
            total += loss  # one after the other, so that an interruption does not change the last bit
        return {
            "count": self.earlier["count"] + len(losses),
            "loss": total,
            "images": self.images,
            "drawn": [sums[place] for place in sorted(sums)],
        }


def drawn_means(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The bins of `StepLog.summary` as means."""
    return [
        {
            "macs_fraction": row["macs_fraction"] / row["count"],
            "count": row["count"],
            "loss": row["loss"] / row["count"],
            "seconds": row["seconds"] / row["count"],
        }
        for row in summary["drawn"]
    ]
