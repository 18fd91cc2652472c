"""The conversion with the arithmetic as published; only the way to get there differs from ours.

Features and gradients of all layers are kept until the backward pass is over; otherwise it is
`skd.convert(..., centering="batch")`, and parameters get gradients that nobody reads. The clones are made in the
backward pass, which is to its advantage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

import skd
from benchmarks.contenders import covariance_published
from skd.architecture import ModuleInfo, describe
from skd.convert import WpacStatistics, apply_transforms
from skd.taps import checked, tapped, total_cost

Kept = tuple[ModuleInfo, torch.Tensor, torch.Tensor]


def convert(model: Any, batches: Iterable[Any]) -> skd.SuperNet:
    infos, converted = describe(model), copy.deepcopy(model)
    statistics = WpacStatistics("batch")
    kept: list[Kept] = []
    with tapped(converted, infos, lambda info, feature, grad: kept.append((info, feature.clone(), grad.clone()))):
        converted.requires_grad_()
        for images, labels in checked(converted, batches):
            converted.zero_grad()
            total_cost(converted, converted(images), labels).backward()
            for info, feature, grad in kept:
                add(statistics, info, feature, grad)
            kept.clear()
    apply_transforms(converted, infos, {info.name: statistics.transform(info) for info in infos})
    return skd.SuperNet(converted, copy=False)


def add(statistics: WpacStatistics, info: ModuleInfo, feature: torch.Tensor, grad: torch.Tensor) -> None:
    name = info.name
    if info.kind == "mlp":
        score = (feature * grad).square().flatten(0, -2).sum(0)
        statistics.importance[name] = statistics.importance.get(name, 0.0) + score
    else:
        x, g = feature.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
        statistics.covariances[name] = statistics.covariances.get(name, 0.0) + covariance_published(x, g).double()
