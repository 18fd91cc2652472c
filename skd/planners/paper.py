"""The published planner (METHOD 2, steps 1 to 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from skd.dropout_list import DropoutList
from skd.planners import register
from skd.planning import propose
from skd.supernet import SuperNet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@register("paper")
def paper(
    supernet: SuperNet,
    batches: Iterable[object],
    target: float,
    *,
    current: DropoutList,
    convention: str,
    group: ProcessGroup | None,
    sensitivity: str = "count",
    skip: str = "identity",
) -> DropoutList:
    """Importance at the last entry of `current`, ranked into operations, the cheapest taken up to the target.

    Args:
        sensitivity: "count", the share of predictions that are lost with a module, as published; "sqrt", its square
            root, with which the modules that few predictions depend on are not emptied first.
        skip: what a module is replaced by to count these: "identity", nothing; "published", the norm of its input.

    Raises:
        ValueError: as `skd.importance`, or an option that is none of these.
    """
    proposal = propose(
        supernet, batches, current, convention=convention, group=group, sensitivity=sensitivity, skip=skip
    )
    return replace(current.extended(proposal.operations, target), sensitivity=proposal.sensitivity)
