"""The residual stream between modules: one operation adds a branch to it and norms the sum for the next module.

A pre-norm block computes ``x = x + branch(norm(x))`` for each of its modules. Between two modules this is always the
same operation, also at the border of two blocks: a sum, followed by the norm of the next module.
`skd_kernels.residual_norm` computes it in one pass. Therefore a module hands on both the stream and its normed form.

Where the operation runs as a kernel, it also adds the output bias of the attention or MLP that made the branch. The
gradient of that bias then costs no pass of its own, because the backward kernel reads the data anyway.

Where the operation would not compute exactly what the layers compute, or one of the layers has hooks or a replaced
forward (is "watched"), the layers are called one by one. Then the normed form is missing, and the next module
computes it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, RmsNorm
from torch import nn

from skd.vit.protocol import TimmLayer, Width
from skd_kernels import residual_norm
from skd_kernels.residual_norm import runs_as_kernel

# Classes that compute exactly F.layer_norm or F.rms_norm, by the names of `skd_kernels.residual_norm`.
_KINDS: dict[type[nn.Module], str] = {nn.LayerNorm: "layer", LayerNorm: "layer", nn.RMSNorm: "rms", RmsNorm: "rms"}
# In half precision the operation would return the sum in float32, unlike timm's blocks.
_STREAMS = (torch.float32, torch.float64)


class Stream(NamedTuple):
    """What one module hands to the next.

    Attributes:
        x: (B, N, C), the residual stream; of a last block's input only the first tokens, where it reads no others.
        normed: (B, N, C), the stream after the norm of the module that reads it next, under autocast in the dtype of
            its linear layers; None: that module has yet to norm it.
    """

    x: torch.Tensor
    normed: torch.Tensor | None = None

    def leading(self, tokens: int | None) -> Stream:
        """The first `tokens` alone; None: all."""
        if tokens is None:
            return self
        return Stream(self.x[:, :tokens], None if self.normed is None else self.normed[:, :tokens])


class Norm(NamedTuple):
    """A norm as `residual_norm` takes it.

    Attributes:
        weight, bias: (C,) or None.
        casts_under_autocast: under autocast the result has autocast's dtype, because a linear layer reads it and
            would cast it.
        sum_tokens: of the sum itself, nobody reads more than the first so many tokens; None: all are read.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    kind: str
    casts_under_autocast: bool
    sum_tokens: int | None = None

    @classmethod
    def of(cls, layer: TimmLayer, *, casts_under_autocast: bool = True) -> Norm | None:
        """The norm that `layer` computes; None if it computes something else, or is watched and must be called."""
        kind = _KINDS.get(type(layer))
        if kind is None or len(layer.normalized_shape) != 1 or layer.eps is None or is_watched(layer):
            return None
        if getattr(layer, "_fast_norm", False):  # timm's other implementation, in half precision under autocast
            return None
        return cls(layer.weight, getattr(layer, "bias", None), layer.eps, kind, casts_under_autocast)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the stream `x` has a dtype in which the sum and the norm are those of the layers."""
        parameters = (self.weight, self.bias)
        return x.dtype in _STREAMS and all(p is None or p.dtype == x.dtype for p in parameters)


def begin(x: torch.Tensor, norm: Norm | None) -> Stream:
    """The stream that enters the first module, whose norm is `norm` (None: it is not known)."""
    return Stream(x) if norm is None or not norm.takes(x) else _summed(x, None, norm)


class Addition(NamedTuple):
    """``x + drop_path(scale(branch))`` as one operation with the norm of the module that reads the sum next.

    Attributes:
        scale: (C,), the block's layer scale, or None.
        mask: (B,), the factors of stochastic depth, or None.
        norm: what norms the sum.
        takes_bias: whether the operation should also add the output bias of the branch. It should where it runs as a
            kernel, which does so at no cost; PyTorch's operations would need another pass.
    """

    scale: torch.Tensor | None
    mask: torch.Tensor | None
    norm: Norm
    takes_bias: bool

    @classmethod
    def of(cls, x: torch.Tensor, scale: TimmLayer, drop_path: TimmLayer, norm: Norm | None) -> Addition | None:
        """The operation, or None where the layers must be called one by one by `add`.

        Args:
            x: (B, N, C), the stream.
            scale: the block's layer scale, a layer, a parameter (C,) or None.
            drop_path: the block's layer for stochastic depth.
            norm: None where the reader norms the sum itself.
        """
        if norm is None or not norm.takes(x) or not _only_multiply(scale, drop_path):
            return None
        gamma = factors_of(scale)
        mask = drop_path.factors(x.dtype) if isinstance(drop_path, CountedDropPath) else None
        return cls(gamma, mask, norm, runs_as_kernel(x))

    def add(
        self, x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor | None = None, width: Width | None = None
    ) -> Stream:
        """The sum, normed.

        Args:
            x, branch: (B, N, C).
            bias: (C,), the output bias, if the branch was computed without it; or None.
            width: the width at which the branch was computed. Bias and branch are added only if it is above 0. It is
                not needed for a branch that includes its bias, because that is zeros at width 0.
        """
        of_branch = {"scale": self.scale, "mask": self.mask}
        if bias is not None:
            of_branch["branch_bias"] = bias
            if isinstance(width, torch.Tensor):
                of_branch["branch_width"] = width
        return _summed(x, branch, self.norm, **of_branch)


def add(x: torch.Tensor, branch: torch.Tensor, scale: TimmLayer, drop_path: TimmLayer) -> Stream:
    """``x + drop_path(scale(branch))`` by its layers, which are as for `Addition.of`; the reader norms it."""
    if scale is not None:
        branch = scale(branch) if isinstance(scale, nn.Module) else scale * branch
    return Stream(x + drop_path(branch))


def factors_of(scale: TimmLayer) -> torch.Tensor | None:
    """(C,) the factors of a layer scale, which is a layer or a parameter; None if there is none."""
    factors: torch.Tensor | None = getattr(scale, "gamma", None) if isinstance(scale, nn.Module) else scale
    return factors  # an Identity has none


def _summed(x: torch.Tensor, branch: torch.Tensor | None, norm: Norm, **beside: torch.Tensor | None) -> Stream:
    """`beside` are arguments of `residual_norm` that come with a branch."""
    device, (weight, bias, eps, kind, casts, tokens) = x.device.type, norm
    exact = not casts and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if exact else nullcontext():
        return Stream(*residual_norm(x, branch, weight, bias, eps=eps, kind=kind, sum_tokens=tokens, **beside))


def _only_multiply(scale: TimmLayer, drop_path: TimmLayer) -> bool:
    """Whether the two layers only multiply, by a factor for each channel and one for each image, and are not watched.

    timm's own DropPath draws its mask when it is called; so it has to be called, unless it drops nothing.
    """
    if isinstance(scale, nn.Module):
        if type(scale) not in (LayerScale, nn.Identity) or is_watched(scale):
            return False
    elif scale is not None and not isinstance(scale, torch.Tensor):
        return False
    drops_nothing = type(drop_path) is DropPath and not (drop_path.training and drop_path.drop_prob)
    plain = type(drop_path) in (CountedDropPath, nn.Identity) or drops_nothing
    return plain and not is_watched(drop_path)


class CountedDropPath(nn.Module):
    """Replaces timm's DropPath in one branch; the trainer sets `mask` (B,), 0 or 1 / (1 - rate), before each step."""

    mask: torch.Tensor | None = None

    def factors(self, dtype: torch.dtype) -> torch.Tensor | None:
        """(B,) the factor of each image; None if nothing is dropped."""
        return None if not self.training or self.mask is None else self.mask.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = self.factors(x.dtype)
        return x if factors is None else x * factors[:, None, None]


def is_watched(layer: nn.Module) -> bool:
    """Whether `layer` must be called as a module: it has hooks of its own, or somebody has replaced its forward."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(len(kind) > 0 for kind in hooks) or "forward" in vars(layer)
