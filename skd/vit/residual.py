"""The residual stream between modules: one pass adds a branch to it and norms the sum for whoever reads it next.

A block before which norms stand computes ``x = x + branch(norm(x))``, over and over. Seen from between the modules
it is always the same operation: a sum, and the norm of whatever comes next, also across the border of two blocks.
`skd_kernels.residual_norm` is that operation, so what a module hands on is the stream and its normed form.

Where it runs as a kernel, it also adds the output bias of the attention or MLP that made the branch: in its backward
pass the gradient of that bias is a sum over what the pass reads anyway.

Where the operation would not be exactly what the layers compute, or somebody watches one of the layers, the layers
are called one by one: then the normed form is left out, and the next module makes it.
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
# In half precision the sums would come out in float32, and the stream would not be what timm's blocks make of it.
_STREAMS = (torch.float32, torch.float64)


class Stream(NamedTuple):
    """What one module hands to the next.

    Attributes:
        x: (B, N, C), the residual stream.
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
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    kind: str
    casts_under_autocast: bool

    @classmethod
    def of(cls, layer: TimmLayer, *, casts_under_autocast: bool = True) -> Norm | None:
        """None where `layer` computes something else, or must be called because it is watched."""
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
    """``x + drop_path(scale(branch))`` as one operation with the norm of whoever reads the sum next.

    Attributes:
        scale: (C,), the block's layer scale, or None.
        mask: (B,), the factors of stochastic depth, or None.
        norm: what norms the sum.
        takes_bias: the operation runs as a kernel, in which the bias of the layer that makes the branch costs nothing
            and its gradient no pass of its own. In PyTorch's operations it would be a pass more.
    """

    scale: torch.Tensor | None
    mask: torch.Tensor | None
    norm: Norm
    takes_bias: bool

    @classmethod
    def of(cls, x: torch.Tensor, scale: TimmLayer, drop_path: TimmLayer, norm: Norm | None) -> Addition | None:
        """None where the layers must be called one by one, see `add`.

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
            bias: (C,), the output bias that the branch is without, or None.
            width: at which the branch was made. Bias and branch count only where it is above 0; so does a branch
                with a bias of its own without being told, since it is zeros.
        """
        given = None if bias is None else {"branch_bias": bias}
        if given is not None and isinstance(width, torch.Tensor):
            given["branch_width"] = width
        return _summed(x, branch, self.norm, scale=self.scale, mask=self.mask, **given or {})


def add(x: torch.Tensor, branch: torch.Tensor, scale: TimmLayer, drop_path: TimmLayer) -> Stream:
    """``x + drop_path(scale(branch))`` by its layers, which are as for `Addition.of`; the reader norms it."""
    if scale is not None:
        branch = scale(branch) if isinstance(scale, nn.Module) else scale * branch
    return Stream(x + drop_path(branch))


def factors_of(scale: TimmLayer) -> torch.Tensor | None:
    """(C,) what a layer scale, a layer or a parameter, multiplies a branch with; None: nothing is multiplied."""
    factors: torch.Tensor | None = getattr(scale, "gamma", None) if isinstance(scale, nn.Module) else scale
    return factors  # an Identity has none


def _summed(x: torch.Tensor, branch: torch.Tensor | None, norm: Norm, **beside: torch.Tensor | None) -> Stream:
    """`beside` are arguments of `residual_norm` that come with a branch."""
    device, (weight, bias, eps, kind, casts) = x.device.type, norm
    exact = not casts and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if exact else nullcontext():
        return Stream(*residual_norm(x, branch, weight, bias, eps=eps, kind=kind, **beside))


def _only_multiply(scale: TimmLayer, drop_path: TimmLayer) -> bool:
    """Whether a factor of each channel and one of each image are all that these layers are, and nobody watches them.

    timm's DropPath draws its mask when it is called: it is called, unless it drops nothing.
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
    """The place of timm's DropPath in one branch; `mask` (B,) is set before each step, 0 or 1 / (1 - rate)."""

    mask: torch.Tensor | None = None

    def factors(self, dtype: torch.dtype) -> torch.Tensor | None:
        """(B,) what each image is multiplied with; None: nothing is dropped."""
        return None if not self.training or self.mask is None else self.mask.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = self.factors(x.dtype)
        return x if factors is None else x * factors[:, None, None]


def is_watched(layer: nn.Module) -> bool:
    """Whether `layer` must be called as a module: it has hooks of its own, or somebody has replaced its forward."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(len(kind) > 0 for kind in hooks) or "forward" in vars(layer)
