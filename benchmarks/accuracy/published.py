"""The published method with its defects, which the other contenders are measured against.

What the published code computes as skd does (docs/METHOD.md) is taken from skd. The rest is here: sensitivity as the
mean over batches of (top-1 - top-1 skipped) / top-1, with LN(x) in place of the skipped branch; operations without a
floor, so that a module of negative sensitivity has none, and one of zero sensitivity gives entries that remove
nothing; and a draw that never takes the smallest entry. tests/test_accuracy_published.py compares it with the numbers
in tests/golden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

import skd
from skd import planners
from skd.data.counted import generator
from skd.importance import read_scores, score_buffers
from skd.support.taps import checked, frozen, objective
from skd.training.batches import start_epoch
from skd.training.optimizer import make_scheduler
from skd.training.step import by_hand
from skd.training.types import Batches
from skd.vit.protocol import Shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "published"


class Reduction(NamedTuple):
    """One published operation: narrow a module to `width`; `contribution` is what that loses per MAC."""

    module: int
    width: int
    macs: float
    contribution: float


class Measured(NamedTuple):
    """What a pass over the batches gives.

    Attributes:
        scores: of each module, (width,) raw.
        accuracy: (batches, 1 + modules) top-1: of the network, and with each module skipped.
    """

    scores: list[np.ndarray]
    accuracy: np.ndarray

    def sensitivity(self) -> np.ndarray:
        """(modules,): not finite where a batch has no correct prediction, which nothing forbids."""
        with np.errstate(divide="ignore", invalid="ignore"):
            whole, skipped = self.accuracy[:, :1], self.accuracy[:, 1:]
            found: np.ndarray = ((whole - skipped) / whole).mean(0)
        return found


def planner(
    supernet: skd.SuperNet,
    batches: Iterable[object],
    target: float,
    *,
    current: skd.DropoutList,
    convention: str,
    group: ProcessGroup | None,
) -> skd.DropoutList:
    """One round of the published planner, on one process: see `skd.planners.Planner`."""
    if group is not None:
        raise ValueError("group is given; the published planner of these benchmarks runs on one process")
    widths = current.widths[-1].tolist()
    prices = supernet.costs.planned_per_unit(convention)
    measured = measure(supernet, batches, widths)
    sensitivity = measured.sensitivity()
    found = reductions(measured.scores, sensitivity, prices, [info.group_size for info in supernet.infos])
    rows = grown(widths, found, target - removed(current, prices))
    known = replace(current, widths=np.concatenate([current.widths, rows]), removed_macs=None)
    return replace(known, sensitivity=dict(zip(current.modules, sensitivity.tolist(), strict=True)))


def measure(supernet: skd.SuperNet, batches: Iterable[object], widths: Sequence[int]) -> Measured:
    """Taylor scores and the table of accuracies at these widths."""
    buffers, rows = score_buffers(supernet), []
    with frozen(supernet):
        for images, labels in checked(supernet.model, batches):
            if labels is None:
                raise ValueError("batches have no labels; the published planner needs them")
            x, shared = supernet.embed(images)
            x, streams = x.detach().requires_grad_(), []
            with torch.enable_grad():
                for index, width in enumerate(widths):
                    streams.append(x.detach())
                    x = supernet.step(index, x, width, buffers[index], shared)
                output = supernet.head(x)
                objective(supernet.model, output, labels).backward()
            skipped = (_with_skip(supernet, x, index, widths, shared) for index, x in enumerate(streams))
            rows.append([_top1(logits, labels) for logits in (output, *skipped)])
    modules = zip(supernet.infos, buffers, widths, strict=True)
    return Measured([read_scores(info, buffer, width) for info, buffer, width in modules], np.array(rows))


@torch.no_grad()
def _with_skip(
    supernet: skd.SuperNet, x: torch.Tensor, skipped: int, widths: Sequence[int], shared: Sequence[Shared]
) -> torch.Tensor:
    """The logits with LN(x) in place of the branch of one module, from the stream that enters it.

    A module that the sub-network no longer has is not replaced.
    """
    start = skipped
    if widths[skipped]:
        x, start = x + _norm(supernet, skipped)(x), skipped + 1
    for index in range(start, len(widths)):
        x = supernet.step(index, x, widths[index], shared=shared)
    return supernet.head(x)


def _norm(supernet: skd.SuperNet, index: int) -> nn.Module:
    """The norm in front of a module."""
    module = supernet.infos[index]
    norm: nn.Module = getattr(supernet.network.blocks(supernet.model)[module.block], module.place.norm)
    return norm


def _top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def reductions(
    scores: Sequence[np.ndarray], sensitivity: Iterable[float], prices: Sequence[float], groups: Sequence[int]
) -> list[Reduction]:
    """All operations in their published order: by contribution, then by module, the smaller width first."""
    found = []
    for module, (raw, gamma, price, group) in enumerate(zip(scores, sensitivity, prices, groups, strict=True)):
        found += _reductions_of(module, raw, gamma, price, group)
    return sorted(found, key=lambda operation: operation.contribution)


def _reductions_of(module: int, raw: np.ndarray, gamma: float, price: float, group: int) -> list[Reduction]:
    """Those of one module. Comparisons with what is not a number are false, so such a module has none."""
    with np.errstate(invalid="ignore"):
        importance = raw / raw.sum() * gamma
    last, kept = importance.sum() / price, []
    for width in range(0, len(raw), group):
        macs = (len(raw) - width) * price
        contribution = importance[width:].sum() / macs
        if contribution <= last:
            last = contribution
            kept.append((width, macs, float(contribution)))
    end = (len(raw), 0.0, 0.0)
    return [Reduction(module, w, macs - after, c) for (w, macs, c), (_, after, _) in pairwise([*kept, end])]


def grown(widths: Sequence[int], operations: Sequence[Reduction], target: float) -> np.ndarray:
    """The rows (operations taken, modules) that one round adds.

    Those operations are taken whose MACs add up to at most the target. A module's widths are looked up from its
    widest operation down, and the first that is not taken ends the search: where its scores are equal, and the
    smallest width comes first, rows are the same as the one before.
    """
    taken = int((np.cumsum([operation.macs for operation in operations]) <= target).sum())
    rows = np.tile(np.array(widths, dtype=np.int64), (taken, 1))
    for module in range(len(widths)):
        ranked = [(op.width, rank) for rank, op in enumerate(operations) if op.module == module]
        for width, rank in sorted(ranked, reverse=True):
            if rank >= taken:
                break
            rows[rank:, module] = np.minimum(rows[rank:, module], width)
    return rows


def removed(current: skd.DropoutList, prices: Sequence[float]) -> float:
    """The MACs that the last entry lacks of the first, by its widths."""
    return float(((current.widths[0] - current.widths[-1]) * np.array(prices)).sum())


@contextmanager
def registered() -> Iterator[None]:
    """Inside the block `skd.plan` and the settings of a training know the planner by its name."""
    planners.register(NAME)(planner)
    try:
        yield
    finally:
        planners.unregister(NAME)


def train(
    supernet: skd.SuperNet,
    loader: Batches,
    config: skd.TrainConfig,
    calibration: Batches,
    *,
    steps: int,
    never_drawn: int = 1,
) -> None:
    """The steps of `skd.train`, but the last `never_drawn` entries of the list are never drawn; in place.

    Args:
        steps: the batches of an epoch.
    """
    total = float(supernet.costs.macs(supernet.widths(), config.convention))
    stepper = by_hand(supernet, config)
    scheduler = make_scheduler(stepper.state.optimizer, config.schedule, steps)
    for epoch in range(config.epochs):
        if epoch < config.growing_epochs:
            target = config.target * (epoch + 1) / config.growing_epochs * total
            grown = planners.grow(
                config.chosen_planner,
                supernet,
                calibration,
                target,
                current=supernet.dropout_list,
                convention=config.convention,
                group=None,
            )
            stepper.state.use(grown)
        supernet.train()
        for images, labels in checked(supernet.model, start_epoch(loader, config.seed, epoch, 0)):
            assert labels is not None
            stepper.set_learning_rate(scheduler.step_update, stepper.step)
            drawn = max(len(supernet.dropout_list) - never_drawn, 1)
            stepper([(images, labels)], int(generator(config.seed, "entry", stepper.step).integers(drawn)))
    supernet.eval()
