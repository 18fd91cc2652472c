"""What a network costs to run: `skd.cost`, for any network by the price lists of `skd.prices`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skd.prices import check_convention, cost_model
from skd.supernet import SuperNet
from skd.vit import describe, unwrapped


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one image.

    Attributes:
        macs: multiply-accumulates, in the convention asked for.
        params: number of parameters.
    """

    macs: int
    params: int


def cost(model_or_supernet: Any, *, entry: int | None = None, convention: str = "full") -> Cost:
    """MACs per image and parameters of a timm model, a super-network or one of its sub-networks.

    Args:
        model_or_supernet: a timm model (an extracted one too) or a `SuperNet`.
        entry: index into the super-network's dropout list; None is the full network.
        convention: "full" counts everything; "linear" leaves out Q K^T and A V, as the published tables do
            (ptflops 0.7.5: bias adds and norms counted, an activation counted twice).

    Raises:
        ValueError: unsupported architecture, unknown convention, entry out of range, or an entry of a plain model.
    """
    check_convention(convention)
    model_or_supernet = unwrapped(model_or_supernet)
    if isinstance(model_or_supernet, SuperNet):
        widths = model_or_supernet.widths(entry)
        costs = model_or_supernet.costs
    else:
        if entry is not None:
            raise ValueError("entry is given with a plain model; only a SuperNet has sub-networks")
        network = describe(model_or_supernet)
        widths = [module.full_width for module in network.modules]
        costs = cost_model(model_or_supernet, network)
    return Cost(int(costs.macs(widths, convention)), int(costs.params(widths)))
