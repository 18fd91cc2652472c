"""Access to functions behind the public API that some tests need: if code moves, only this file has to change."""

from __future__ import annotations

from typing import Any

import skd
import skd.vit.construction
from skd.vit import describe, image_size, unwrapped
from skd.vit.attention import principal_axes

__all__ = ["ModuleInfo", "construction", "image_size", "modules_of", "planning_prices", "principal_axes", "unwrapped"]

ModuleInfo = Any  # RotatedAttention, SortedMlp, ...


def modules_of(model: Any) -> tuple[ModuleInfo, ...]:
    """The descriptions of the attentions and MLPs of a timm model, in the method's order."""
    return describe(model).modules


def planning_prices(supernet: skd.SuperNet, convention: str) -> dict[str, float]:
    """MACs of one unit of each module's width, as the planner counts them."""
    return dict(zip(supernet.modules_in_order, supernet.costs.planned_per_unit(convention), strict=True))


def construction(model: Any) -> dict[str, Any]:
    """The part of a file's header that says how to build the model again."""
    return skd.vit.construction.construction(model, describe(model))
