"""Conversions beyond METHOD 1: by what a cut does to logits and outputs, not by the variance of a feature.

Q and K, or V and the output projection, meet in one product each: a query with a key, a row of W_proj with a value.
`balanced_bases` gives both sides of such a product the bases in which every truncation leaves the smallest error of
the product. `elimination_order` sorts neurons by how much of the output is lost without them, after the others have
taken over what they can.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOOR = 1e-6  # of the eigenvalues of a second moment, relative to their mean: no direction is scaled by more than 1e3
RIDGE = 0.01  # of the mean variance, as in `skd.compensate`
_BLOCK = 64  # neurons that are eliminated between two updates of the whole inverse
_TINY = 1e-300


class Choices(NamedTuple):
    """Which conversion each kind of module gets; the defaults are METHOD's.

    Attributes:
        qk: "joint", one orthogonal matrix for both, or "balanced", for the smallest error of the logits.
        v: "variance", orthogonal, or "output", for the smallest error of what the output projection gives.
        neurons: "taylor", by importance, or "residual", by what the other neurons cannot predict.
    """

    qk: str = "joint"
    v: str = "variance"
    neurons: str = "taylor"


class SecondMoments(NamedTuple):
    """Unweighted sums over the rows of G groups of features of size D, all float64.

    Attributes:
        rows: (G,), how many rows each group has.
        sums: (G, D), the sums of the rows.
        squares: (G, D, D), the sums of ``x x^T``.
    """

    rows: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> SecondMoments:
        """The sums over (G, rows, D) features."""
        features = features.double()
        rows = features.new_full(features.shape[:1], features.shape[1])
        return cls(rows, features.sum(1), features.mT @ features)

    @classmethod
    def joined(cls, parts: list[SecondMoments]) -> SecondMoments:
        """The groups of all parts, in order."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def plus(self, other: SecondMoments) -> SecondMoments:
        """The sums over the rows of both."""
        return SecondMoments(*(a + b for a, b in zip(self, other, strict=True)))

    def mean(self) -> torch.Tensor:
        """(G, D)."""
        return self.sums / self.rows[:, None]

    def about_zero(self) -> torch.Tensor:
        """(G, D, D), the mean of ``x x^T``."""
        return self.squares / self.rows[:, None, None]

    def covariance(self) -> torch.Tensor:
        """(G, D, D), the mean of ``(x - mean)(x - mean)^T``."""
        mean = self.mean()
        return self.about_zero() - mean[:, :, None] * mean[:, None, :]


def balanced_bases(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with ``A B^T = I`` whose leading columns keep the most of the inner products of two kinds of vectors.

    With left^1/2 right^1/2 = U S V^T, A = left^-1/2 U S^1/2 and B = right^-1/2 V S^1/2. In the new coordinates A^T x
    and B^T y both second moments are S, and the first r coordinates have the products with the smallest mean square
    error of all of rank r (Eckart, Young; for Q and K: "A3", arXiv 2505.12942, "KQ-SVD", arXiv 2512.05916; for V and
    the output projection: "MoDeGPT", arXiv 2408.09632). Each side is scaled to a mean variance of 1 first, so that
    the sizes of x and y remain.

    Args:
        left, right: (..., D, D) second moments of x and of y, float64. Eigenvalues below `FLOOR` times their mean
            count as that.
    """
    (left_root, left_inverse), (right_root, right_inverse) = _roots(left), _roots(right)
    u, s, vh = torch.linalg.svd(left_root @ right_root)
    scale = s.sqrt()[..., None, :]
    a, b = left_inverse @ u * scale, right_inverse @ vh.mT * scale
    peak = a.gather(-2, a.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)  # as in `principal_axes`: independent of the solver's signs
    return a * sign, b * sign


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of symmetric matrices whose mean eigenvalue is made 1, and its inverse."""
    size = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    scaled = torch.where(size > _TINY, (moments + moments.mT) / (2 * size).clamp(min=_TINY), eye)
    values, axes = torch.linalg.eigh(scaled)
    roots = values.clamp(min=FLOOR).sqrt()[..., None, :]
    return axes * roots @ axes.mT, axes / roots @ axes.mT


def elimination_order(covariance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The order of neurons, (F,) int64, that is found by leaving out one after the other; the last one left is first.

    The next to go is the one whose loss raises the squared error of the output least, after ridge regression has
    moved to the others what they predict of it: ``||w_j||^2 / P_jj``, with P the inverse of the covariance and w_j
    its column as compensated so far. It is Optimal Brain Surgeon (Hassibi, Stork 1993) for whole columns of a layer,
    as in "ZipLM" (Kurtic, Frantar, Alistarh 2023). O(F^3 + C F^2).

    Args:
        covariance: (F, F) of the neurons, float64.
        weight: (C, F), of the layer that reads them.
    """
    size = len(covariance)
    penalty = RIDGE * covariance.diagonal().mean() + _TINY
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    inverse = torch.linalg.inv((covariance + covariance.mT) / (2 * penalty) + eye)  # in units of the penalty
    left, gone = torch.arange(size, device=covariance.device), list[torch.Tensor]()
    columns = weight.double().mT.contiguous()
    while len(left):
        picked, inverse, columns = _eliminated(inverse, columns, min(_BLOCK, len(left)))
        gone.append(left[picked])
        keep = torch.ones_like(left, dtype=torch.bool).index_fill_(0, picked, False).nonzero()[:, 0]
        left, inverse, columns = left[keep], inverse[keep[:, None], keep], columns[keep]
    return torch.cat(gone).flip(0)


def _eliminated(
    inverse: torch.Tensor, columns: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next `count` neurons to go, in order, and the inverse and the columns (F, C) with the others compensated.

    Each elimination changes both by a matrix of rank 1. Only what the next choice depends on is computed one by one:
    a row of the inverse, its diagonal, and the norms of the columns; the rest is changed once for all.
    """
    size, width = columns.shape
    rows, shares = (
        inverse.new_zeros(count, size),
        inverse.new_zeros(count, size),
    )  # of the inverse, and over its pivot
    taken = inverse.new_zeros(count, width)  # the columns that went, as compensated by then
    diagonal, norms = inverse.diagonal().clone(), columns.square().sum(1)
    picked = torch.zeros(count, dtype=torch.int64, device=inverse.device)
    there = torch.ones(size, dtype=torch.bool, device=inverse.device)
    for index in range(count):
        loss = torch.where(there, norms / diagonal.clamp(min=_TINY), torch.inf)
        chosen = loss.argmin().reshape(1)
        before = shares[:index, chosen][:, 0]
        rows[index] = inverse[chosen][0] - before @ rows[:index]
        shares[index] = rows[index] / diagonal[chosen]
        taken[index] = columns[chosen][0] - before @ taken[:index]
        products = columns @ taken[index] - (taken[:index] @ taken[index]) @ shares[:index]
        norms = norms - 2 * shares[index] * products + shares[index].square() * norms[chosen]
        diagonal = diagonal - shares[index] * rows[index]
        there[chosen], picked[index] = False, chosen[0]
    return picked, inverse - shares.mT @ rows, columns - shares.mT @ taken
