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
from skd.convert import WpacStatistics, apply_transforms
from skd.taps import checked, tapped, total_cost
from skd.vit import Module, describe

Kept = tuple[Module, torch.Tensor, torch.Tensor]


def convert(model: Any, batches: Iterable[Any]) -> skd.SuperNet:
    network, converted = describe(model), copy.deepcopy(model)
    statistics = WpacStatistics("batch")
    kept: list[Kept] = []
    with tapped(converted, network.modules, lambda *tap: kept.append((tap[0], tap[1].clone(), tap[2].clone()))):
        converted.requires_grad_()
        for images, labels in checked(converted, batches):
            converted.zero_grad()
            total_cost(converted, converted(images), labels).backward()
            for module, feature, grad in kept:
                add(statistics, module, feature, grad)
            kept.clear()
    apply_transforms(converted, network, statistics.transforms(network))
    return skd.SuperNet(converted, copy=False, network=network)


def add(statistics: WpacStatistics, module: Module, feature: torch.Tensor, grad: torch.Tensor) -> None:
    name = module.name
    if module.kind == "mlp":
        score = (feature * grad).square().flatten(0, -2).sum(0)
        statistics.importance[name] = statistics.importance.get(name, 0.0) + score
    else:
        x, g = feature.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
        statistics.covariances[name] = statistics.covariances.get(name, 0.0) + covariance_published(x, g).double()
