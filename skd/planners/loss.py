"""Planning by measured loss: how far each module's narrowing moves the predictions, per MAC that it saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from skd.dropout_list import DropoutList, Operation
from skd.importance import importance
from skd.moments import Predicting, measure_moments
from skd.planners import register
from skd.supernet import SuperNet
from skd.support.checks import check_count
from skd.support.ranks import in_step, summed, total
from skd.support.taps import all_finite, checked, frozen, report_left_out
from skd.vit import Module
from skd.vit.protocol import Shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CRITERIA, SHAPES = ("kl", "cross_entropy"), ("linear", "taylor")
Curve = list[tuple[int, float]]  # (width, rise of the loss per image), from the present width down


@register("loss")
def loss(
    supernet: SuperNet,
    batches: Iterable[object],
    target: float,
    *,
    current: DropoutList,
    convention: str,
    group: ProcessGroup | None,
    points: int = 6,
    criterion: str = "kl",
    shape: str = "linear",
    reach: float = 0.25,
    compensated: bool = True,
) -> DropoutList:
    """The list grown by the operations with the smallest rise of the loss per MAC.

    The loss is the Kullback-Leibler divergence from the full network's predictions to those of a cut network, so no
    labels are needed; of a headless model, half the squared distance of the features. It is measured with one
    module at a time narrowed to each of about `points` widths, the others as in the last entry of `current`. Between
    these widths, and where a narrower one measures better, the greatest convex curve below them counts: a module's
    coordinates then go one group after the other, in the order in which they cost more.

    Args:
        points: how many widths of a module are measured, 0 included; at least 1.
        criterion: "kl", as above; "cross_entropy", with the labels, where a batch has them and the model has a head.
        shape: of the rise between two measured widths: "linear" in the width; "taylor", in proportion to the Taylor
            scores of the coordinates between them (`skd.importance`).
        reach: the share of the MACs left that may go before the rises are measured again, above 0, at most 1. A rise
            holds near the widths at which it was measured; with 1 it is measured once.
        compensated: measure networks in which every module predicts what it drops from what it keeps, and a skipped
            one is its mean, as `skd.compensate` does it without images. What can be made up for costs nothing then.
            With False untrained sub-networks that are left uncorrected are better, corrected ones worse, and trained
            ones no better (docs/ACCURACY.md). The command `skd plan` sets it by whether corrections follow.

    Raises:
        ValueError: bad batches, none whose outputs are finite, points < 1, a reach out of its range, or another
            criterion or shape.
    """
    for name, value, known in (("criterion", criterion, CRITERIA), ("shape", shape, SHAPES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it may be one of {known}")
    check_count("points", points)
    if isinstance(reach, bool) or not isinstance(reach, int | float) or not 0 < reach <= 1:
        raise ValueError(f"reach is {reach!r}; it must be above 0 and at most 1")
    if not isinstance(compensated, bool):
        raise ValueError(f"compensated is {compensated!r}; it must be True or False")
    # In training no moments are stored: they are of the present weights.
    moments = (supernet.moments or measure_moments(supernet, batches, group=group)) if compensated else None
    while True:
        step = supernet.step if moments is None else Predicting(supernet, moments).step
        setting = Setting(supernet, batches, group, criterion, step)
        operations, sensitivity = _ranked(setting, current, convention, points, shape)
        near = min(target, current.removed_macs + reach * supernet.costs.macs(current.widths[-1], convention))
        grown = current.extended(operations, near)
        if len(grown) == len(current) and operations:  # the next operation is larger than that
            near = min(target, current.removed_macs + operations[0].macs)
            grown = current.extended(operations, near)
        if len(grown) == len(current):  # it is larger than the target, or must not be taken
            near, grown = target, current.extended(operations, target)
        current = replace(grown, sensitivity=sensitivity)
        if near >= target:
            return current


class Step(Protocol):
    """`SuperNet.step`, or another way to run a module at a width."""

    def __call__(
        self, index: int, x: torch.Tensor, width: int, *, shared: Sequence[Shared] | None
    ) -> torch.Tensor: ...


class Setting(NamedTuple):
    """What rises are measured of, and on which images."""

    supernet: SuperNet
    batches: Iterable[object]
    group: ProcessGroup | None
    criterion: str
    step: Step


def _ranked(
    setting: Setting, current: DropoutList, convention: str, points: int, shape: str
) -> tuple[list[Operation], dict[str, float]]:
    """The operations at the widths of the last entry, sorted, and the rise at the smallest width of each module."""
    supernet, widths = setting.supernet, list(current.entry(len(current) - 1).values())
    pairs = zip(supernet.infos, widths, strict=True)
    least = current.least or {}
    below = [_widths_to_measure(module, width, points, least.get(module.name, 0)) for module, width in pairs]
    curves = rises(setting, widths, below)
    if shape == "taylor":
        scores, _ = importance(supernet, setting.batches, widths=widths, group=setting.group)
        curves = [_shaped(m, curve, scores[m.name]) for m, curve in zip(supernet.infos, curves, strict=True)]
    prices = supernet.costs.planned_per_unit(convention)
    steps: list[tuple[float, float, int, Operation]] = []
    for index, (module, price) in enumerate(zip(supernet.infos, prices, strict=True)):
        for operation in _operations(module, curves[index], price):
            removed = 1 - operation.width / module.full_width
            # Of steps that cost the same, those of the widest modules go first, so that no module is emptied alone.
            steps.append((operation.score, removed, index, operation))
    steps.sort(key=lambda step: step[:3])
    rise = {module.name: curve[-1][1] for module, curve in zip(supernet.infos, curves, strict=True)}
    return [operation for *_, operation in steps], rise


def _widths_to_measure(module: Module, width: int, points: int, least: int) -> list[int]:
    """`least`, and above it whole numbers of groups, evenly spaced below the present width; in falling order."""
    if width <= least:
        return []
    if module.binary:
        return [0]
    groups = -(-width // module.group_size) - least // module.group_size
    count = min(points, groups)
    kept = {round(groups * step / count) for step in range(1, count)}
    above = (least // module.group_size + number for number in sorted(kept, reverse=True))
    return [number * module.group_size for number in above] + [least]


@torch.no_grad()
def rises(setting: Setting, widths: Sequence[int], below: Sequence[Sequence[int]]) -> list[Curve]:
    """For each module the rise of the loss per image, at its present width (0) and at those `below` it.

    The part before a module is computed once per batch: each variant starts from the stream that enters the module.
    """
    supernet, group = setting.supernet, setting.group
    sums = [torch.zeros(1 + len(own), dtype=torch.float64) for own in below]
    images, left_out = 0, 0
    with frozen(supernet):
        with_labels = setting.criterion == "cross_entropy"
        batches = checked(supernet.model, setting.batches, with_labels=with_labels)
        for batch, labels in in_step(batches, group):
            losses = _losses(setting, batch, labels, widths, below)
            if all_finite(losses):
                images += len(batch)
                for added, own in zip(sums, losses, strict=True):
                    added += own.double().cpu()
            else:
                left_out += 1
    device = next(supernet.parameters()).device
    ranks_without = total(not images, group, device)
    report_left_out(total(left_out, group, device), ranks_without == 0)
    images = total(images, group, device)
    added_up = [part.cpu() for part in summed([part.to(device) for part in sums], group)]
    return [
        [(width, float(loss - own[0]) / images) for width, loss in zip((present, *narrower), own, strict=True)]
        for present, narrower, own in zip(widths, below, added_up, strict=True)
    ]


def _losses(
    setting: Setting,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    widths: Sequence[int],
    below: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """For each module the losses of one batch: with nothing narrowed further, then at each of the widths below."""
    supernet, step = setting.supernet, setting.step
    headless = supernet.model.num_classes == 0
    if labels is None or headless:
        distance = partial(_distance, reference=supernet(images), headless=headless)
    else:
        distance = partial(_cross_entropy, labels=labels)
    x, shared = supernet.embed(images)
    streams = []
    for index, width in enumerate(widths):
        streams.append(x)
        x = step(index, x, width, shared=shared)
    base, losses = distance(supernet.head(x)), []
    for index, narrower in enumerate(below):
        own = [base]
        for width in narrower:
            x = step(index, streams[index], width, shared=shared)
            for later in range(index + 1, len(widths)):
                x = step(later, x, widths[later], shared=shared)
            own.append(distance(supernet.head(x)))
        losses.append(torch.stack(own))
    return losses


def _cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), labels, reduction="sum")


def _distance(output: torch.Tensor, reference: torch.Tensor, headless: bool) -> torch.Tensor:
    """The distance of two outputs, summed over the images of a batch, in float32 at least."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, reference = output.to(dtype), reference.to(dtype)
    if headless:
        return 0.5 * (output - reference).square().sum()
    return F.kl_div(output.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum")


def _shaped(module: Module, curve: Curve, scores: np.ndarray) -> Curve:
    """The curve with a point at every group between the measured widths, in proportion to the Taylor scores."""
    points, group = curve[:1], module.full_width if module.binary else module.group_size
    for (wide, low), (narrow, high) in pairwise(curve):
        total = float(scores[narrow:wide].sum())
        for width in range((wide - 1) // group * group, narrow, -group):
            share = float(scores[width:wide].sum()) / total if total > 0 else (wide - width) / (wide - narrow)
            points.append((width, low + (high - low) * share))
        points.append((narrow, high))
    return points


def _operations(module: Module, curve: Curve, price: float) -> list[Operation]:
    """One operation per group of coordinates, along the greatest convex curve below the measured rises."""
    corners, group = _convex(curve), module.full_width if module.binary else module.group_size
    operations = []
    for (wide, low), (narrow, high) in pairwise(corners):
        # Each slope is divided by the same price, so that rounding cannot change the order of the scores.
        slope, end = _slope((wide, low), (narrow, high)) / price, wide
        for width in (*range((wide - 1) // group * group, narrow, -group), narrow):
            operations.append(Operation(module.name, width, (end - width) * price, slope))
            end = width
    return operations


def _convex(curve: Curve) -> Curve:
    """The corners of the greatest convex curve below the points, which does not fall as the width does.

    A rise below that of a wider width is noise; the coordinates between the two widths are worth nothing.
    """
    corners: Curve = []
    for position, (width, rise) in enumerate(curve):
        lowest = min(later for _, later in curve[position:])  # the smallest rise at this or any narrower width
        point = (width, max(0.0, min(rise, lowest)))
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(wide: tuple[int, float], narrow: tuple[int, float]) -> float:
    return (narrow[1] - wide[1]) / (wide[0] - narrow[0])
