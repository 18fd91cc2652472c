"""One contender on one network: converted, planned or trained, compensated, and measured at every budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier
from timm.models.vision_transformer import VisionTransformer

import skd
from benchmarks.accuracy import published
from benchmarks.accuracy.contenders import Contender, Unit
from benchmarks.accuracy.counting import counted
from benchmarks.accuracy.images import TASKS, Images, Task, TrainingImages, recipe
from benchmarks.result import Info
from benchmarks.timing import JSON
from skd.data.digits import Batches, Split, batched
from skd.support.curve import entries_within, sizes_of

SHARES = (1.0, 0.8, 0.5, 0.33, 0.25, 0.2, 0.15, 0.12, 0.1)  # of the full network's MACs
TARGET = 0.92  # share of the MACs that the smallest sub-network has removed: a tenth of them must be within reach
PLANNING = 512  # images that planning reads in every round; conversion and compensation read all of them
NEIGHBOURS = 20
_CALIBRATION_BATCH, _TEST_BATCH = 128, 500

Metric = Callable[[skd.SuperNet, Sequence[int]], list[float]]


def measured(unit: Unit, contender: Contender, model: VisionTransformer, images: Images) -> Info:
    """Everything that is stored of a unit but its name: figures by budget, cost by stage."""
    stages, calibration = Stages(), batched(images.calibration, _CALIBRATION_BATCH)
    model = without_head(model) if contender.headless else model
    metric = neighbours(images) if contender.headless else top1(images.test)
    with stages("convert"):
        supernet = skd.convert(model, calibration, **contender.convert)
    (full,) = metric(supernet, [0])
    planning = calibration[: max(1, PLANNING // _CALIBRATION_BATCH)]
    with published.registered(), stages("plan" if contender.training is None else "train"):
        if contender.training is None:
            supernet.dropout_list = skd.plan(supernet, planning, **{"target": TARGET, **contender.plan})
        else:
            train(supernet, contender, TASKS[unit.task], images.train, planning, unit.seed)
    chosen = entries_within(supernet, SHARES)
    with stages("evaluate"):
        alone = metric(supernet, list(chosen.values()))
    after: list[float] = []
    cut = [entry for entry in dict.fromkeys(chosen.values()) if entry]
    if contender.compensation is not None and cut:
        with stages("compensate"):
            if contender.from_moments:
                skd.moments(supernet, calibration)
            images_read = None if contender.from_moments else calibration
            skd.compensate(supernet, images_read, entries=cut, **contender.compensation)
        with stages("evaluate compensated"):
            after = metric(supernet, list(chosen.values()))
    sizes = supernet.dropout_list.macs
    return Info(
        full=full,
        rows=rows(supernet, chosen, alone, after),
        entries=len(sizes),
        smallest=float(sizes[-1] / sizes[0]),
        seconds=Info(stages.seconds),
        forwards=Info(stages.forwards),
    )


def rows(
    supernet: skd.SuperNet, chosen: Mapping[float, int], alone: Sequence[float], after: Sequence[float]
) -> list[JSON]:
    """One row for each budget that a sub-network meets; `compensated` is None where there was no compensation."""
    costs = sizes_of(supernet, list(chosen.values()))
    afterwards: Sequence[float | None] = after or [None] * len(alone)
    return [
        {
            "share": share,
            "entry": cost["entry"],
            "macs_fraction": cost["macs_fraction"],
            "params": cost["params"],
            "alone": before,
            "compensated": compensated,
        }
        for share, cost, before, compensated in zip(chosen, costs, alone, afterwards, strict=True)
    ]


def train(
    supernet: skd.SuperNet, contender: Contender, task: Task, split: Split, planning: Batches, seed: int
) -> None:
    """The same batches, steps and settings for every contender, but for what it changes."""
    changes: dict[str, Any] = {"epochs": task.epochs, "lr": 1e-3, "warmup_epochs": 0, "smoothing": 0.1, "seed": seed}
    changes |= {"target": TARGET, **recipe(), **(contender.training or {})}
    config = skd.TrainConfig().changed(**changes)
    loader = TrainingImages(split, task, task.steps, seed + 1000)  # not the order of the pre-training
    if contender.never_drawn:
        published.train(supernet, loader, config, planning, steps=task.steps, never_drawn=contender.never_drawn)
    else:
        skd.train(supernet, loader, None, config, calibration=planning, console=Console(quiet=True), verbose=False)


class Stages:
    """Seconds and forward passes (of the full network, in images) of each stage.

    The seconds are those that the processor works for this process, since other programs may share it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.forwards: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        with counted() as count:
            yield
        self.seconds[stage] = round(time.process_time() - start, 2)
        self.forwards[stage] = round(count.forwards)


def top1(test: Split) -> Metric:
    """Top-1 in percent on the test images."""
    batches = batched(test, _TEST_BATCH)
    return lambda supernet, entries: skd.evaluate(supernet, batches, entries=entries)


def without_head(model: VisionTransformer) -> VisionTransformer:
    model = copy.deepcopy(model)
    model.reset_classifier(0)
    return model


def neighbours(images: Images) -> Metric:
    """Share of the test images, in percent, that most of their nearest training images have the class of.

    Nearness is the cosine of the features, and a nearer image has more weight.
    """

    def metric(supernet: skd.SuperNet, entries: Sequence[int]) -> list[float]:
        found: dict[int, float] = {}
        for entry in dict.fromkeys(entries):
            train, test = (features(supernet, split, entry) for split in (images.train, images.test))
            nearest = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights="distance")
            nearest.fit(train, images.train.labels.numpy())
            right = nearest.predict(test) == images.test.labels.numpy()
            found[entry] = 100 * float(right.mean())
        return [found[entry] for entry in entries]

    return metric


@torch.no_grad()
def features(supernet: skd.SuperNet, split: Split, entry: int) -> np.ndarray:
    """The features of a headless network, (images, width)."""
    supernet.eval()
    return torch.cat([supernet(part, entry=entry) for part, _ in batched(split, _TEST_BATCH)]).numpy()
