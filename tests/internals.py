"""The functions behind the public API that some tests ask, under one roof: code that moves is followed here alone."""

from __future__ import annotations

from typing import Any

import skd
from skd.architecture import ModuleInfo, describe, image_size, unwrapped
from skd.construction import construction
from skd.prices import planning_macs_per_unit

__all__ = ["ModuleInfo", "construction", "image_size", "modules_of", "planning_prices", "unwrapped"]


def modules_of(model: Any) -> tuple[ModuleInfo, ...]:
    """What is known of each attention and MLP of a timm model, in the method's order."""
    return describe(model)


def planning_prices(supernet: skd.SuperNet, convention: str) -> dict[str, float]:
    """MACs of one unit of each module's width, as the planner counts them."""
    return planning_macs_per_unit(supernet.model, supernet.infos, supernet.costs, convention)
