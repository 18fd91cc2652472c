"""Top-1 accuracy, of a model and of many sub-networks in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, overload

import torch

from skd.supernet import SuperNet
from skd.support.ranks import check_group, gathered, in_step, summed, total
from skd.support.taps import checked, frozen
from skd.support.types import Progress
from skd.vit import TimmModel, describe, unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Top1:
    """Counts correct predictions of several variants of one network over the same images.

    With a classifier, predictions are compared with labels, or without labels with the reference network's own
    predictions. Without one (headless), an image is correct if, of the reference network's features of all images,
    its own are the nearest by Euclidean distance (METHOD 1); these counts exist only after all images have been
    seen. An output with a NaN is wrong.
    """

    def __init__(self, headless: bool) -> None:
        self.headless = headless
        self.images = 0
        self._counts: dict[Hashable, int] = {}
        self._features: dict[Hashable, list[torch.Tensor]] = {}
        self._reference: list[torch.Tensor] = []
        self._labels: torch.Tensor | None = None
        self._device = torch.device("cpu")

    def start(self, reference: torch.Tensor | None, labels: torch.Tensor | None, count: int) -> None:
        """Begin a batch of `count` images. The reference network's output is needed if headless or without labels."""
        self.images += count
        if self.headless:
            assert reference is not None
            self._reference.append(reference.flatten(1))
        elif labels is None:
            assert reference is not None
            labels = _predictions(reference)
        self._labels = labels

    def add(self, variant: Hashable, output: torch.Tensor) -> None:
        """Add one variant's output on the current batch."""
        self._device = output.device
        if self.headless:
            self._features.setdefault(variant, []).append(output.flatten(1))
        else:
            assert self._labels is not None
            predictions = _predictions(output)
            correct = int(((predictions == self._labels) & (predictions >= 0)).sum())
            self._counts[variant] = self._counts.get(variant, 0) + correct

    def correct(self, variant: Hashable) -> int:
        """The exact number of correct images of a variant so far."""
        if not self.headless:
            return self._counts[variant]
        features, reference = torch.cat(self._features[variant]), torch.cat(self._reference)
        reference = reference.masked_fill(reference.isnan(), math.inf)  # no image is near to what is not a number
        hits = 0
        for start in range(0, len(features), 1024):
            part = features[start : start + 1024]
            # Distances are computed from differences; products would lose a small distance between large features.
            exact = "donot_use_mm_for_euclid_dist"
            nearest = torch.cdist(part.double(), reference.double(), compute_mode=exact).argmin(1)
            own = torch.arange(start, start + len(part), device=part.device)
            hits += int(((nearest == own) & ~part.isnan().any(1)).sum())
        return hits

    def counts(self, variants: Sequence[Hashable], group: ProcessGroup | None = None) -> dict[Hashable, int]:
        """The numbers of correct images of several variants, over all ranks of a process group."""
        if group is None:
            return {variant: self.correct(variant) for variant in variants}
        if self.headless:  # the nearest feature may be on another rank
            whole = Top1(headless=True)
            whole._reference = [gathered(torch.cat(self._reference), group)]
            whole._features = {name: [gathered(torch.cat(self._features[name]), group)] for name in variants}
            return whole.counts(variants)
        own = [torch.tensor(float(self._counts[name]), dtype=torch.float64, device=self._device) for name in variants]
        return {name: int(count) for name, count in zip(variants, summed(own, group), strict=True)}

    def percents(self, variants: Sequence[Hashable], group: ProcessGroup | None = None) -> list[float]:
        """The share of all images of all ranks that are correct, in percent."""
        counts, images = self.counts(variants, group), total(self.images, group, self._device)
        return [100.0 * counts[variant] / max(images, 1) for variant in variants]


def _predictions(logits: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit; -1 where one is NaN, which `argmax` takes for the largest."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


@overload
def evaluate(
    model: TimmModel,
    batches: Iterable[object],
    *,
    entries: None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> float: ...


@overload
def evaluate(
    model: TimmModel,
    batches: Iterable[object],
    *,
    entries: Sequence[int],
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> list[float]: ...


@torch.no_grad()
def evaluate(
    model: TimmModel,
    batches: Iterable[object],
    *,
    entries: Sequence[int] | None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> float | list[float]:
    """Top-1 in percent.

    Args:
        model: a timm model, or a `SuperNet`.
        batches: iterable of (images, labels), preprocessed for evaluation.
        entries: indices into a super-network's dropout list, all evaluated in one pass over the data; None: the
            (full) network alone.
        progress: wraps the batches, e.g. ``tqdm``.
        group: a torch.distributed group whose processes all call this, each with its own share of the images: the
            accuracy is that of all images, exact, on every rank. None: this process alone.

    Returns:
        A float, or with `entries` a list of floats in their order. An image whose logits hold a NaN counts as wrong.

    Raises:
        ValueError: an unsupported model, bad batches, an entry out of range, or entries of a plain model.
    """
    check_group(group)
    model = unwrapped(model)
    supernet = isinstance(model, SuperNet)
    if not supernet:
        describe(model)
    if entries is not None and not supernet:
        raise ValueError("entries is given with a plain model; only a SuperNet has sub-networks")
    timm_model = model.model if supernet else model
    top1 = Top1(timm_model.num_classes == 0)
    variants: list[int | None] = [None] if entries is None else list(entries)
    if supernet:
        for entry in variants:
            model.widths(entry)
    with frozen(model):
        batches = checked(timm_model, batches if progress is None else progress(batches))
        for images, labels in in_step(batches, group):
            reference = model(images) if labels is None else None
            top1.start(reference, labels, len(images))
            for entry in dict.fromkeys(variants):
                top1.add(entry, model(images) if entry is None else model(images, entry=entry))
    results = top1.percents(variants, group)
    return results[0] if entries is None else results
