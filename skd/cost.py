"""What a network costs to run: MACs and parameters at any widths, in two conventions (METHOD 4).

Within a module both are affine in its width and vanish with it, so a whole dropout list is priced by two small
integer tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from skd.support.settings import CONVENTIONS
from skd.vit import Network, TimmModel, describe, unwrapped
from skd.vit.protocol import Prices

if TYPE_CHECKING:
    from skd.supernet import SuperNet


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one image.

    Attributes:
        macs: multiply-accumulates, in the convention asked for.
        params: number of parameters.
    """

    macs: int
    params: int


def cost(model_or_supernet: SuperNet | TimmModel, *, entry: int | None = None, convention: str = "full") -> Cost:
    """MACs per image and parameters of a timm model, a super-network or one of its sub-networks.

    Args:
        model_or_supernet: a timm model (an extracted one too) or a `SuperNet`.
        entry: index into the super-network's dropout list; None is the full network.
        convention: "full" counts everything; "linear" leaves out Q K^T and A V, as the published tables do
            (ptflops 0.7.5: bias adds and norms counted, an activation counted twice).

    Raises:
        ValueError: unsupported architecture, unknown convention, entry out of range, or an entry of a plain model.
    """
    from skd.supernet import SuperNet  # which imports this module

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


@dataclass(frozen=True)
class CostModel:
    """The integer price list of a network. Row 0 of each array of MACs is `full`, row 1 `linear`.

    ``macs(widths) = base + sum over modules of [width > 0] * (per_unit * width + fixed)``, and likewise params, where
    a module that is neither skipped nor whole has ``if_cut * width`` more.
    """

    base_macs: np.ndarray  # (2,)
    macs_per_unit: np.ndarray  # (2, modules)
    macs_fixed: np.ndarray  # (modules,)
    base_params: int
    params_per_unit: np.ndarray  # (modules,)
    params_fixed: np.ndarray  # (modules,)
    params_if_cut: np.ndarray  # (modules,)
    full_widths: np.ndarray  # (modules,)
    unplanned_per_unit: np.ndarray  # (modules,) of the MACs per unit, those that the planner does not count
    unplanned_fixed: np.ndarray  # (modules,) of the fixed MACs, likewise

    def macs(self, widths: npt.ArrayLike, convention: str = "full") -> np.ndarray:
        """MACs of each row of `widths`, (..., modules) int: (...) int64."""
        row = CONVENTIONS.index(check_convention(convention))
        return self._price(widths, self.base_macs[row], self.macs_per_unit[row], self.macs_fixed)

    def params(self, widths: npt.ArrayLike) -> np.ndarray:
        """Parameters of each row of `widths`, (..., modules) int: (...) int64."""
        widths = np.asarray(widths, dtype=np.int64)
        per_unit = self.params_per_unit + self.params_if_cut * (widths < self.full_widths)
        return self._price(widths, self.base_params, per_unit, self.params_fixed)

    def planned_per_unit(self, convention: str = "full") -> list[float]:
        """The MACs of one unit of each module's width as the planner counts them: the module's, divided by its width.

        The MACs of a module are METHOD 4's: N (4 d^2 + 4 d) + [2 N^2 H D] for attention, N (2 d h + 2 h + d) for an
        MLP. They leave out the norm, and count the activation once, whereas the whole model's count it twice. A
        skipped module has 0.
        """
        row = CONVENTIONS.index(check_convention(convention))
        per_unit = (self.macs_per_unit[row] - self.unplanned_per_unit).tolist()
        fixed = (self.macs_fixed - self.unplanned_fixed).tolist()
        widths = self.full_widths.tolist()
        return [(p * w + f) / w if w else 0.0 for p, f, w in zip(per_unit, fixed, widths, strict=True)]

    @staticmethod
    def _price(widths: npt.ArrayLike, base: int | np.integer, per_unit: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        widths = np.asarray(widths, dtype=np.int64)
        priced: np.ndarray = base + ((widths > 0) * (widths * per_unit + fixed)).sum(-1)
        return priced


def check_convention(convention: str) -> str:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; it may be one of {CONVENTIONS}")
    return convention


def cost_model(model: TimmModel, network: Network) -> CostModel:
    """The price list of a model at its present widths."""
    tokens = network.tokens(model)
    prices = [module.prices(model) for module in network.modules]
    table = np.array(prices, dtype=np.int64).reshape(len(prices), len(Prices._fields))
    column = dict(zip(Prices._fields, table.T, strict=True))
    linear = column["macs_per_unit"] * tokens
    return CostModel(
        base_macs=np.array(network.outside_macs(model), dtype=np.int64),
        macs_per_unit=np.stack([linear + column["macs_per_pair"] * tokens * tokens, linear]),
        macs_fixed=column["macs_fixed"] * tokens,
        base_params=network.outside_params(model),
        params_per_unit=column["params_per_unit"],
        params_fixed=column["params_fixed"],
        params_if_cut=column["params_if_cut"],
        full_widths=np.array([module.full_width for module in network.modules], dtype=np.int64),
        unplanned_per_unit=column["unplanned_per_unit"] * tokens,
        unplanned_fixed=column["unplanned_fixed"] * tokens,
    )
