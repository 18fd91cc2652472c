"""Ridge regression with an intercept, from sums over the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

_ROUNDING = 1e-11  # relative errors of sums of squares in float64
_TINY = 1e-300  # where all features are zeros


class Sums(NamedTuple):
    """The sums for the normal equations of n rows of features (n, k) and of targets (n, C), float64.

    Attributes:
        rows: n, a 0-d tensor.
        features, targets: (k,) and (C,), the sums of the rows.
        squares: (k, k), features^T features.
        products: (k, C), features^T targets.
    """

    rows: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor

    @classmethod
    def empty(cls, k: int, channels: int, device: torch.device) -> Sums:
        shapes = (), (k,), (channels,), (k, k), (k, channels)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows, in place."""
        self.rows.add_(len(features))
        self.features.add_(features.sum(0))
        self.targets.add_(targets.sum(0))
        self.squares.addmm_(features.mT, features)
        self.products.addmm_(features.mT, targets)

    def solved(self, ridge: float, *, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ridge regression: the weight (C, k) and the bias (C,), zeros without `intercept`; NaN without a solution.

        The bias is not shrunk: with it, the equations are those of centred features and targets. The penalty is
        `ridge` times the mean of the diagonal of features^T features.
        """
        squares, products = self.squares, self.products
        x, y = self.features / self.rows, self.targets / self.rows
        if intercept:
            squares = squares - self.rows * torch.outer(x, x)
            products = products - self.rows * torch.outer(x, y)
        # Features that are the same in every row (those of a class token before any attention) are only rounding
        # errors after centring, and must not predict anything.
        penalty = ridge * squares.diagonal().mean() + _ROUNDING * self.squares.diagonal().mean() + _TINY
        eye = torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
        factor, failed = torch.linalg.cholesky_ex(squares + penalty * eye)
        factor = torch.where(failed == 0, factor, torch.nan)  # a part of a factor would solve other equations
        weight = torch.cholesky_solve(products, factor)
        bias = y - x @ weight if intercept else torch.zeros_like(y)
        return weight.mT, bias

    def correct(self, layer: nn.Linear, ridge: float) -> bool:
        """Add the solution to the layer in place; False, and the layer stays, if the solution is not finite.

        An output channel whose solution the layer's dtype cannot hold stays too. In float16 it is one that layer
        scale multiplies by next to nothing, so that nothing is lost.
        """
        weight, bias = self.solved(ridge, intercept=layer.bias is not None)
        if not bool(weight.isfinite().all() & bias.isfinite().all()):
            return False
        wide = layer.weight + weight.to(layer.weight.dtype)
        fits = wide.isfinite().all(1)
        if layer.bias is not None:
            high = layer.bias + bias.to(layer.bias.dtype)
            fits &= high.isfinite()
            layer.bias.copy_(torch.where(fits, high, layer.bias))
        layer.weight.copy_(torch.where(fits[:, None], wide, layer.weight))
        return True
