"""Weight decay in proportion to how often a coordinate takes part: ``decay="expected"`` (METHOD 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from skd.dropout_list import DropoutList
from skd.supernet import SuperNet
from skd.training.drawing import frequencies
from skd.vit import Module


def inclusion(dropout_list: DropoutList, module: int, full_width: int, sampling: str = "uniform") -> np.ndarray:
    """P, (full_width,): the share of steps whose entry includes each coordinate of one module."""
    included = np.arange(full_width)[:, None] < dropout_list.widths[None, :, module]
    return np.average(included, axis=1, weights=frequencies(dropout_list, sampling))


class ExpectedDecay:
    """``p *= 1 - lr * weight_decay * P`` with P the inclusion probability of p's coordinate under the list.

    The published method decays every coordinate at every step, but coordinates that are rarely drawn seldom get
    gradients, so their weights shrink.
    """

    def __init__(
        self,
        supernet: SuperNet,
        parameters: Sequence[torch.Tensor],
        weight_decay: float,
        sampling: str = "uniform",
    ) -> None:
        """
        Args:
            sampling: how entries are drawn; see `skd.training.drawing`.
        """
        self.supernet, self.parameters, self.weight_decay = supernet, list(parameters), weight_decay
        self.sampling = sampling
        self.update()

    def update(self) -> None:
        """Take P from the present dropout list; call it whenever the list has grown."""
        shares: dict[int, torch.Tensor] = {}
        for index, info in enumerate(self.supernet.infos):
            if info.full_width:
                own = inclusion(self.supernet.dropout_list, index, info.full_width, self.sampling)
                shares |= _by_parameter(self.supernet.model, info, torch.from_numpy(own))
        one = torch.ones(())
        self.shares = [shares.get(id(p), one).to(p.device, p.dtype) for p in self.parameters]

    @torch.no_grad()
    def apply(self, lr: float) -> None:
        for parameter, share in zip(self.parameters, self.shares, strict=True):
            parameter.mul_(1 - lr * self.weight_decay * share)


def _by_parameter(model: nn.Module, module: Module, share: torch.Tensor) -> dict[int, torch.Tensor]:
    """`share` of each coordinate, laid out to multiply the parameters of `module` with more than one axis."""
    own, found = dict(module.of(model).named_parameters()), {}
    for name, (axis, index) in module.coordinates(model).items():
        if own[name].ndim > 1:
            shape = [1] * own[name].ndim
            shape[axis] = -1
            found[id(own[name])] = share[index.cpu()].reshape(shape)
    return found
