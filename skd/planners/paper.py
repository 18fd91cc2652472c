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
) -> DropoutList:
    """Importance at the last entry of `current`, ranked into operations, the cheapest taken up to the target."""
    proposal = propose(supernet, batches, current, convention=convention, group=group)
    return replace(current.extended(proposal.operations, target), sensitivity=proposal.sensitivity)
