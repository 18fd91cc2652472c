"""What happened in a training run, epoch by epoch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import torch

from skd.dropout_list import DropoutList
from skd.support.curve import Rows
from skd.support.ranks import size_of, summed
from skd.training.types import Group

BINS = 16  # of the sub-networks' MACs, in an epoch's record of its steps


class Drawn(TypedDict):
    """Means over the steps of an epoch whose sub-networks are of about one size."""

    macs_fraction: float
    count: int
    loss: float
    seconds: float


@dataclass(eq=False)
class Epoch(Mapping[str, Any]):
    """One epoch of a run. It can also be read as the mapping that its line of history.jsonl is: ``epoch["loss"]``.

    Attributes:
        epoch: from 0.
        step: optimizer steps so far.
        lr: learning rate of the last step.
        loss: mean over the steps; with a teacher, that of the labels and the teacher in their shares.
        images: that were trained on.
        entries: length of the dropout list.
        macs_fraction: of the smallest entry.
        sensitivity: in epochs that grew the list, what the planner measured of skipping each module (with
            importance="online" its share of the scores; empty with a planner that does not measure it), else None.
        drawn: the steps by size of the sub-network.
        curve: rows of `skd.support.curve.measure_curve`, where it was evaluated, else None.
        area: under that curve, percent, or None.
        best: the run's weights are of this epoch, so far.
        seconds: {importance, data, compile (the first step, with torchcompile), steps, evaluate, checkpoint, total};
            on a GPU steps is what the host takes to issue them.
    """

    epoch: int
    step: int
    lr: float
    loss: float
    images: int
    entries: int
    macs_fraction: float
    sensitivity: dict[str, float] | None = None
    drawn: list[Drawn] = field(default_factory=list)
    curve: Rows | None = None
    area: float | None = None
    best: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        if key not in _KEYS:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)


_KEYS = tuple(column.name for column in fields(Epoch))


@dataclass
class History:
    """What `skd.train` returns.

    Attributes:
        original_top1: of the network before training, in percent; None where there was nothing to measure it on.
        epochs: in order.
        best_epoch: the epoch whose weights were kept, by area.
    """

    original_top1: float | None = None
    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int | None = None

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept."""
        found = [row for row in self.epochs if row.epoch == self.best_epoch]
        return found[0] if found else None

    @property
    def curve(self) -> Rows:
        """The accuracy-MACs curve of the weights that were kept."""
        return [] if self.best is None else self.best.curve or []

    @property
    def area(self) -> float | None:
        """Mean top-1 over the budgets, of the weights that were kept (percent)."""
        return None if self.best is None else self.best.area

    def to_jsonl(self) -> str:
        """One line of JSON per epoch."""
        return "".join(json.dumps(dict(row)) + "\n" for row in self.epochs)


Time = float | tuple[torch.cuda.Event, torch.cuda.Event]  # of a step: seconds, or where they begin and end


class Bin(Drawn):
    """Sums where `Drawn` has means."""

    bin: int


class Summary(TypedDict):
    """Of the steps of an epoch so far: their number, the sum of their losses, images of all ranks, sums by size."""

    count: int
    loss: float
    images: int
    drawn: list[Bin]


class StepLog:
    """Entry, loss and seconds of each step of an epoch; nothing is read from the device before `summary`.

    On several ranks of a group each has the losses of its own images, and its own seconds.
    """

    def __init__(self, earlier: Summary | None = None, group: Group = None) -> None:
        self.group = group
        self.earlier = earlier or Summary(count=0, loss=0.0, images=0, drawn=[])
        self.images = self.earlier["images"]
        self.entries: list[int] = []
        self.losses: list[torch.Tensor] = []
        self.times: list[Time] = []

    def add(self, entry: int, loss: torch.Tensor, time: Time, images: int) -> None:
        """One step; `images` of all ranks."""
        self.entries.append(entry)
        self.losses.append(loss.detach())
        self.times.append(time)
        self.images += images

    def last_loss(self) -> float:
        return float(self.losses[-1]) if self.losses else float("nan")

    def summary(self, dropout_list: DropoutList) -> Summary:
        """Of this epoch so far, steps before an interruption included.

        On several ranks all call it, and have the losses of the whole batches.
        """
        mine = [torch.stack(self.losses).double()] if self.losses else []
        losses = [loss / size_of(self.group) for whole in summed(mine, self.group) for loss in whole.tolist()]
        sums = {row["bin"]: row.copy() for row in self.earlier["drawn"]}
        total = self.earlier["loss"]
        for entry, loss, time in zip(self.entries, losses, self.times, strict=True):
            share = float(dropout_list.macs[entry] / dropout_list.macs[0])
            place = min(int(share * BINS), BINS - 1)
            row = sums.setdefault(place, Bin(bin=place, count=0, macs_fraction=0.0, loss=0.0, seconds=0.0))
            row["count"] += 1
            row["macs_fraction"] += share
            row["loss"] += loss
            row["seconds"] += time if isinstance(time, float) else time[0].elapsed_time(time[1]) / 1e3
            total += loss  # one after the other, so that an interruption does not change the last bit
        return Summary(
            count=self.earlier["count"] + len(losses),
            loss=total,
            images=self.images,
            drawn=[sums[place] for place in sorted(sums)],
        )


def drawn_means(summary: Summary) -> list[Drawn]:
    """The bins of `StepLog.summary` as means."""
    return [
        Drawn(
            macs_fraction=row["macs_fraction"] / row["count"],
            count=row["count"],
            loss=row["loss"] / row["count"],
            seconds=row["seconds"] / row["count"],
        )
        for row in summary["drawn"]
    ]
