"""Streaming second moments of tokens, weighted by how much each token matters (METHOD 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from skd_kernels._checks import check_pair, check_tensor
from skd_kernels._dispatch import always, operation
from skd_kernels._native import refuses_moments, rows


@dataclass(frozen=True)
class Moments:
    """Weighted moments of T tokens in G groups of D coordinates, about a fixed `shift`. All float64.

    With ``y = x - shift`` and the token weight ``w = mean_d |x * grad|``:

    Attributes:
        count: number of tokens T, 0-d.
        shift: (G, D), the point the sums are taken about.
        weight: (G,), sum of w.
        plain_sum: (G, D), sum of y.
        weighted_sum: (G, D), sum of w y.
        weighted_outer: (G, D, D), sum of w y y^T.

    Summing about a shift close to the mean keeps the precision that centring afterwards would otherwise cancel.
    """

    count: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor
    plain_sum: torch.Tensor
    weighted_sum: torch.Tensor
    weighted_outer: torch.Tensor

    def about(self, shift: torch.Tensor) -> Moments:
        """The same moments re-based to another `shift`, (G, D)."""
        check_tensor("shift", shift, tuple(self.shift.shape))
        shift = shift.to(self.shift)
        step = self.shift - shift
        return Moments(
            count=self.count,
            shift=shift,
            weight=self.weight,
            plain_sum=torch.addcmul(self.plain_sum, self.count, step),
            weighted_sum=torch.addcmul(self.weighted_sum, self.weight[:, None], step),
            weighted_outer=self._outer_about(step),
        )

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of tokens, about the shift of the left one (of the right one if the left is empty)."""
        if not isinstance(other, Moments):
            return NotImplemented
        if other.shift.shape != self.shift.shape:
            groups, dims = self.shift.shape
            raise ValueError(f"other has (G, D) = {tuple(other.shift.shape)}; it must have ({groups}, {dims})")
        # Moments of nothing have no shift worth keeping.
        mine = self.about(torch.where(self.count > 0, self.shift, other.shift))
        other = other.about(mine.shift)
        return Moments(
            count=mine.count + other.count,
            shift=mine.shift,
            weight=mine.weight + other.weight,
            plain_sum=mine.plain_sum + other.plain_sum,
            weighted_sum=mine.weighted_sum + other.weighted_sum,
            weighted_outer=mine.weighted_outer + other.weighted_outer,
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Moments of the tokens of every rank of `group`, about the mean of their shifts; the same on all ranks.

        Args:
            group: a torch.distributed group whose ranks all call this. None, as in all of skd: this process alone,
                whose moments are returned as they are (the mean of one shift is that shift). All processes are
                ``torch.distributed.group.WORLD``.
        """
        if group is None:
            return self
        common = torch.cat([self.count.reshape(1), (self.count * self.shift).reshape(-1)])
        dist.all_reduce(common, group=group)
        shift = (common[1:] / common[0].clamp(min=1)).reshape(self.shift.shape)
        mine = self.about(shift)
        parts = [
            mine.count,
            mine.weight,
            mine.plain_sum,
            mine.weighted_sum,
            mine.weighted_outer,
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        split = flat.split([part.numel() for part in parts])
        count, *rest = [piece.reshape(part.shape) for piece, part in zip(split, parts, strict=True)]
        return Moments(count, shift, *rest)

    def covariance(self) -> torch.Tensor:
        """``sum w (x - mu)(x - mu)^T`` with mu the plain (unweighted) mean: (G, D, D), not normalised.

        Zeros when no token was seen.
        """
        mean = self.plain_sum / self.count.clamp(min=1)  # of y, that is mu - shift
        return self._outer_about(-mean)

    def _outer_about(self, step: torch.Tensor) -> torch.Tensor:
        """sum w (y + step)(y + step)^T: it adds a step^T + step a^T, where a = sum w y + weight step / 2."""
        half = torch.addcmul(self.weighted_sum, self.weight[:, None], step, value=0.5)
        left, right = torch.stack([half, step], -1), torch.stack([step, half], -2)
        return torch.baddbmm(self.weighted_outer, left, right)


def token_moments(x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None = None) -> Moments:
    """Moments of the tokens of one batch, weighted by the mean over d of ``|x * grad|`` (METHOD 1, WPAC).

    Args:
        x: features, (..., G, D), any floating dtype and strides; every leading index is a token. At the output of a
            qkv projection G runs over (q, k, v) x heads.
        grad: gradient of the cost at `x`, same shape, dtype and device.
        shift: (G, D), the point the sums are taken about; None: the mean of this call. Pass the first batch's
            ``moments.shift`` to later calls, or just add the results: ``+`` re-bases its right operand.

    Returns:
        `Moments`, float64. An empty batch gives zeros. NaN and Inf propagate. Differentiable in `x` and `grad`.
        Products of bfloat16 input may be of values rounded to bfloat16 once more (CPUs with AVX-512 BF16): each
        entry of `weighted_outer` is then off by a few 2^-9 of its terms, which average out over tokens.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    check_pair(x, grad)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have shape (..., G, D)")
    if shift is not None:
        check_tensor("shift", shift, tuple(x.shape[-2:]))
        if shift.device != x.device:
            raise ValueError(f"shift is on {shift.device}; x is on {x.device}")
    return _operation(x=x, grad=grad, shift=shift)


def weighted_covariance(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``token_moments(x, grad).covariance()``: (G, D, D) float64, centred by the plain mean of this call."""
    return token_moments(x, grad).weighted_outer  # which is about that mean


_operation = operation(token_moments)


@_operation.implementation("compiled", refuses_moments)
def token_moments_compiled(x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> Moments:
    """csrc/moments_cpu.cpp, csrc/moments_cuda.cu: one pass over the tokens, and nothing before or after it.

    On a GPU the launches of PyTorch's small kernels would take longer than the work itself. Therefore the operation
    writes the whole result, and returns a copy of the shift. Inputs are copied beforehand only if `shift` is not
    contiguous float64, or if tokens are not evenly spaced or their coordinates not contiguous.
    """
    x, grad = rows(x, 2), rows(grad, 2)
    if shift is None:
        return Moments(*torch.ops.skd_kernels.centred_moments.default(x, grad))
    constant = shift.detach() if shift.requires_grad else shift
    return Moments(*torch.ops.skd_kernels.token_moments.default(x, grad, constant.double().contiguous()))


@_operation.implementation("reference", always)
def token_moments_reference(x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None) -> Moments:
    tokens = x.shape[:-2].numel()
    x64 = x.double().reshape(tokens, *x.shape[-2:])  # (T, G, D)
    grad64 = grad.double().reshape(x64.shape)
    # The mean depends on x. A given shift is a constant, and is copied, since its owner may change it later.
    shift64 = x64.sum(0) / max(tokens, 1) if shift is None else shift.detach().to(x64, copy=True)
    weight = (x64 * grad64).abs().sum(-1) / max(x.shape[-1], 1)  # (T, G)
    y = x64 - shift64
    weighted = weight[..., None] * y
    return Moments(
        count=torch.full((), float(tokens), dtype=torch.float64, device=x.device),
        shift=shift64,
        weight=weight.sum(0),
        plain_sum=y.sum(0),
        weighted_sum=weighted.sum(0),
        weighted_outer=weighted.permute(1, 2, 0) @ y.permute(1, 0, 2),
    )
