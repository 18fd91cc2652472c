"""Residual sum and norm in one pass: what stands between two layers of a transformer."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skd_kernels._autograd import Context
from skd_kernels._checks import check_tensor
from skd_kernels._dispatch import TensorSpec, always, forced, operation
from skd_kernels.gpu.buffers import contiguous
from skd_kernels.gpu.entry import DTYPES, after_autocast, device_width, refuses_tensors, refuses_triton

KINDS = ("layer", "rms")
MOST_CHANNELS = 4096  # a row lies in the registers of one program


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    kind: str = "layer",
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    branch_bias: Tensor | None = None,
    branch_width: Tensor | None = None,
    sum_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = x + mask * scale * (branch + branch_bias)`` and ``normed = norm(sum)``.

    Args:
        x: (B, N, C), the residual stream: float32, float64, bfloat16 or float16.
        branch: (B, N, C), what a layer adds to it; None before the first layer of a network.
        weight: (C,) or None. bias: (C,) or None. Of the norm, either kind.
        eps: added to the variance, or to the mean square, under the root.
        kind: "layer" for ``F.layer_norm``, "rms" for ``F.rms_norm``, both over the last dimension.
        scale: (C,), such as LayerScale's, or None.
        mask: (B,), the factor of each image, such as stochastic depth's 0 or ``1 / keep``; it gets no gradient. None:
            no image is dropped. It multiplies: NaN in a dropped branch is NaN in the sum.
        branch_bias: (C,), the bias of the linear layer that made the branch, if that layer left it out; or None. Its
            gradient, the column sums of the branch's gradient, then costs no pass of its own.
        branch_width: 0-d int32 or int64 tensor on the device of `x`, such as the width of the layer that made the
            branch; never read by the host on a GPU. The branch and its bias count only where it is above zero:
            otherwise zeros take their place, whatever is in them, and they and scale get zero gradients. None: they
            count.
        sum_tokens: the sum is returned at only the first so many tokens, 1..N, because nobody reads the others; all
            are normed. The gradient of the sum has then no zeros that would have to be written and read. None: all.

        Floating-point tensors may have different dtypes; but if one is float64, all must be.

    Returns:
        sum: (B, N, C) or (B, sum_tokens, C), float32, or float64 for float64. Without a branch it is `x` itself or a
            view of it, if its dtype fits.
        normed: (B, N, C). Its dtype is that of the weight; where there is none, that of the bias, of the branch or of
        `x`, the first that there is; under autocast the one that ``F.linear`` would cast this to.

    Raises:
        ValueError: wrong shape, dtype, device, kind, eps or sum_tokens; scale, mask, branch_bias or branch_width
            without a branch; a mask that requires grad.
    """
    check_tensor("x", x, (None, None, None))
    images, tokens, channels = x.shape
    vectors = {"weight": weight, "bias": bias, "scale": scale, "branch_bias": branch_bias}
    for name, tensor, shape in (
        ("branch", branch, tuple(x.shape)),
        ("mask", mask, (images,)),
        *((name, vector, (channels,)) for name, vector in vectors.items()),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape)
            _check_beside(name, tensor, x)
    if branch is None:
        without = {"scale": scale, "mask": mask, "branch_bias": branch_bias, "branch_width": branch_width}
        for name, tensor in without.items():
            if tensor is not None:
                raise ValueError(f"{name} is given without a branch")
    if branch_width is not None:
        _check_branch_width(branch_width, x.device)
    if mask is not None and mask.requires_grad:
        raise ValueError("mask requires grad; it must be a plain factor")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it may be one of {list(KINDS)}")
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; it must be a number, zero or more")
    whole = isinstance(sum_tokens, int) and not isinstance(sum_tokens, bool)
    if sum_tokens is not None and not (whole and 1 <= sum_tokens <= tokens):
        raise ValueError(f"sum_tokens is {sum_tokens!r}; it may be 1..{tokens}, or None")
    # On a CPU only the reference can run; on small tensors the dispatcher would take as long as the work itself.
    call = residual_norm_reference if not x.is_cuda and forced() is None else _operation
    result: tuple[Tensor, Tensor] = call(
        x=x,
        branch=branch,
        weight=weight,
        bias=bias,
        eps=float(eps),
        kind=kind,
        scale=scale,
        mask=mask,
        branch_bias=branch_bias,
        branch_width=branch_width,
        sum_tokens=sum_tokens,
    )
    return result


def _check_beside(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check that `tensor` is on the device of `x`, and is float64 if and only if `x` is."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; x is on {x.device}")
    if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise ValueError(f"{name} has dtype {tensor.dtype}, x has {x.dtype}; if one is float64, all must be")


def _check_branch_width(width: object, device: torch.device) -> None:
    """Check that `width` is a 0-d integer tensor on `device`; its value is not read."""
    if not isinstance(width, Tensor):
        raise ValueError(f"branch_width is {width!r}; it must be a 0-d int32 tensor, or None")
    if width.ndim != 0 or width.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"branch_width is a {width.dtype} tensor of shape {tuple(width.shape)}; it must be a 0-d int32 tensor"
        )
    if width.device != device:
        raise ValueError(f"branch_width is on {width.device}; x is on {device}")


_operation = operation(residual_norm)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the residual sum."""
    return torch.promote_types(x.dtype, torch.float32)


def normed_dtype(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of the normed output: that of the norm's parameters or of autocast, as in the next layer."""
    like = next(tensor for tensor in (weight, bias, branch, x) if tensor is not None)
    return after_autocast(like.dtype, x.device.type)


def runs_as_kernel(x: Tensor) -> bool:
    """Whether a call with the stream `x` runs as kernels, if its other arguments are ordinary.

    If so, passing a bias as `branch_bias` costs nothing. On a CPU outside of ``use("triton")`` the answer is quick.
    """
    name = forced()
    if name == "reference" or not (x.is_cuda or name == "triton"):
        return False
    return x.shape[-1] <= MOST_CHANNELS and refuses_triton(TensorSpec.of(x)) is None


def refuses_to_launch(
    *,
    x: TensorSpec,
    branch: TensorSpec | None,
    weight: TensorSpec | None,
    bias: TensorSpec | None,
    scale: TensorSpec | None,
    mask: TensorSpec | None,
    branch_bias: TensorSpec | None,
    **_: object,
) -> str | None:
    if x.shape[-1] > MOST_CHANNELS:
        return f"x has {x.shape[-1]} channels; the kernels take {MOST_CHANNELS}"
    return refuses_triton(x, weight, bias, scale, mask, branch_bias) or refuses_tensors(DTYPES, branch)


@_operation.implementation("triton", refuses_to_launch)
def residual_norm_triton(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    mask: Tensor | None,
    branch_bias: Tensor | None,
    branch_width: Tensor | None,
    sum_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """skd_kernels/gpu/norm.py: every stream is read once and written once, in the forward as in the backward pass."""
    if branch is None:
        x = x.to(sum_dtype(x))
    dtype = normed_dtype(x, branch, weight, bias)
    vectors = weight, bias, scale, mask, branch_bias
    width = None if branch_width is None else device_width(branch_width, x.device)
    arguments = x, branch, *vectors, width, eps, kind == "layer", dtype, sum_tokens
    alone = branch is None and sum_tokens is None
    total, first, normed, _, _ = FirstNorm.apply(*arguments) if alone else residual_norm_forward(*arguments)
    return total if sum_tokens is None else first, normed


@_operation.implementation("reference", always)
def residual_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    mask: Tensor | None,
    branch_bias: Tensor | None,
    branch_width: Tensor | None,
    sum_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """The specification. Everything is computed in float32, or in float64 for float64; only the result is rounded."""
    dtype, wide = normed_dtype(x, branch, weight, bias), sum_dtype(x)
    total = _cast(x, wide)
    if branch is not None:
        added = _cast(branch, wide)
        added = added if branch_bias is None else added + _cast(branch_bias, wide)
        added = added if branch_width is None else torch.where(branch_width > 0, added, 0.0)
        added = added if scale is None else added * _cast(scale, wide)
        added = added if mask is None else added * _cast(mask, wide)[:, None, None]
        total = total + added
    shape, returned = total.shape[-1:], total if sum_tokens is None else total[:, :sum_tokens]
    weight, bias = (None if vector is None else _cast(vector, wide) for vector in (weight, bias))
    if kind == "layer":
        return returned, _cast(F.layer_norm(total, shape, weight, bias, eps), dtype)
    normed = F.rms_norm(total, shape, weight, eps)
    return returned, _cast(normed if bias is None else normed + bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, skipped where the dtype is the same, because the call itself takes time."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# The operators of the kernels ------------------------------------------------------------------------


@torch.library.custom_op("skd_kernels::residual_norm_triton", mutates_args=())
def residual_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    branch_bias: Tensor | None,
    branch_width: Tensor | None,
    eps: float,
    layer: bool,
    dtype: torch.dtype,
    sum_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as `residual_norm`, which says what they may be; `dtype` is that of the normalised output.

    Returns:
        total (B, N, C) float32, empty without a branch; its first tokens, a copy (B, sum_tokens, C), empty if
        sum_tokens is None; normed (B, N, C); and what the backward needs besides: mean, empty unless `layer`, and the
        reciprocal of the standard deviation or of the root mean square, (B N,) float32.
    """
    from skd_kernels.gpu.norm import normalise

    total, first, normed, mean, rstd = results = _outputs(x, branch, layer, dtype, sum_tokens)
    inputs = {"x": x, "branch": branch, "weight": weight, "bias": bias}
    inputs |= {"scale": scale, "mask": mask, "branch_bias": branch_bias}
    there = {name: None if tensor is None else contiguous(tensor) for name, tensor in inputs.items()}
    there["width"] = branch_width
    own = {"normed": normed, "rstd": rstd, "total": None if branch is None else total}
    normalise(there, {**own, "mean": mean if layer else None}, x.shape[1], eps, layer)
    if sum_tokens is not None:
        first.copy_((x if branch is None else total)[:, :sum_tokens])
    return results


@residual_norm_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    branch_bias: Tensor | None,
    branch_width: Tensor | None,
    eps: float,
    layer: bool,
    dtype: torch.dtype,
    sum_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, branch, layer, dtype, sum_tokens)


def _outputs(
    x: Tensor, branch: Tensor | None, layer: bool, dtype: torch.dtype, sum_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, tokens, channels = x.shape
    rows = images * tokens
    return (
        x.new_empty((0,) if branch is None else x.shape, dtype=torch.float32),
        x.new_empty((0,) if sum_tokens is None else (images, sum_tokens, channels), dtype=torch.float32),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((rows if layer else 0,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.float32),
    )


@torch.library.custom_op("skd_kernels::residual_norm_triton_backward", mutates_args=())
def residual_norm_backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    branch_bias: Tensor | None,
    branch_width: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and the branch, in their dtypes, and in float32 of weight, bias, scale and branch_bias.

    The last is the sum over tokens of the branch's gradient, whether there was a branch_bias or not: a layer that
    knows its own bias can ask for it here. It is added up before the branch's gradient is rounded.

    Args:
        dtotal: (B, tokens, C), the gradient at the sum of the first tokens, or of all; that of the others is zero.
        dnormed: (B, N, C). One of the two may be None.
        total: the sum, or x if there was no branch. branch, branch_bias: only read for the gradient of scale.
        mean, rstd: what the forward returned; an empty mean means RMSNorm.
        needs: for each of the six results whether it is needed; the others are empty. Without dnormed neither weight
            nor bias has a gradient.
        branch_width: as in `residual_norm`; where it is not above zero, the gradients of the branch, scale and
            branch_bias are zeros.
    """
    from skd_kernels.gpu.norm import differentiate

    results = _gradients(total, x_dtype, branch_dtype, needs)
    dx, dbranch, *vectors = (result if need else None for result, need in zip(results, needs, strict=True))
    layer, of_scale = mean.numel() > 0, needs[4]
    inputs = {"dtotal": dtotal, "dnormed": dnormed, "total": total, "weight": weight, "scale": scale, "mask": mask}
    inputs |= {"branch": branch if of_scale else None, "branch_bias": branch_bias if of_scale else None}
    there = {name: None if tensor is None else contiguous(tensor) for name, tensor in inputs.items()}
    there |= {"width": branch_width, "mean": mean if layer else None, "rstd": rstd}
    differentiate(there, dx, dbranch, vectors, total.shape[1], layer)
    return results


@residual_norm_backward.register_fake
def _(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    branch_bias: Tensor | None,
    branch_width: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(total, x_dtype, branch_dtype, needs)


def _gradients(
    total: Tensor, x_dtype: torch.dtype, branch_dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(index: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return total.new_empty(shape if needs[index] else (0,), dtype=dtype)

    row = total.shape[-1:]
    streams = empty(0, total.shape, x_dtype), empty(1, total.shape, branch_dtype)
    return *streams, empty(2, row), empty(3, row), empty(4, row), empty(5, row)


class _NormContext(Context, Protocol):
    returns_all: bool
    dtypes: list[torch.dtype]
    parameters: list[torch.dtype | None]


# The arguments of `residual_norm_forward`.
_Maybe = Tensor | None
_Inputs = tuple[Tensor, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, float, bool, torch.dtype, int | None]
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _setup_context(ctx: _NormContext, inputs: _Inputs, output: _Outputs) -> None:
    x, branch, weight, bias, scale, mask, branch_bias, branch_width, _, _, _, sum_tokens = inputs
    total, first, _, mean, rstd = output
    ctx.returns_all = sum_tokens is None
    ctx.mark_non_differentiable(mean, rstd, first if ctx.returns_all else total)
    ctx.set_materialize_grads(False)
    of_scale = ctx.needs_input_grad[4]
    ctx.dtypes = [x.dtype, x.dtype if branch is None else branch.dtype]
    ctx.parameters = [None if vector is None else vector.dtype for vector in (weight, bias, scale, branch_bias)]
    read = (branch, branch_bias) if of_scale else (None, None)
    ctx.save_for_backward(x if branch is None else total, *read, weight, scale, mask, branch_width, mean, rstd)


def _backward(
    ctx: _NormContext, dtotal: Tensor | None, dfirst: Tensor | None, dnormed: Tensor | None, *_: object
) -> tuple[Tensor | None, ...]:
    dtotal = dtotal if ctx.returns_all else dfirst  # the other is None, or empty under torch.compile
    total, branch, branch_bias, weight, scale, mask, branch_width, mean, rstd = ctx.saved_tensors
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 2, 3, 4, 6)]
    if dnormed is None:
        needed[2] = needed[3] = False
    if not any(needed) or (dtotal is None and dnormed is None):
        return (None,) * 12
    # Without a scale, a mask and a width, x and the branch have the same gradient, which is written once.
    only_added = scale is None and mask is None and branch_width is None
    alike = needed[0] and needed[1] and only_added and ctx.dtypes[0] == ctx.dtypes[1]
    needs = [needed[0], needed[1] and not alike, *needed[2:]]
    read = branch, weight, scale, mask, branch_bias, branch_width
    results = residual_norm_backward(dtotal, dnormed, total, *read, mean, rstd, *ctx.dtypes, needs)
    dx, dbranch, *vectors = (result if need else None for result, need in zip(results, needs, strict=True))
    dweight, dbias, dscale, dbranch_bias = (
        None if vector is None else vector.to(dtype) for vector, dtype in zip(vectors, ctx.parameters, strict=True)
    )
    return dx, dx if alike else dbranch, dweight, dbias, dscale, None, dbranch_bias, *(None,) * 5


residual_norm_forward.register_autograd(_backward, setup_context=_setup_context)


class FirstNorm(torch.autograd.Function):
    """`residual_norm_forward` without a branch, with a view of x in place of the sum.

    Both gradients of x, through the stream and through the norm, then reach one call of the backward kernel, which
    adds them. A custom operator must not return a view of its input, but an autograd function may.
    """

    @staticmethod
    def forward(*inputs: Any) -> _Outputs:
        _, *others = residual_norm_forward(*inputs)
        return inputs[0].view_as(inputs[0]), *others

    @staticmethod
    def setup_context(ctx: _NormContext, inputs: _Inputs, output: _Outputs) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: _NormContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *gradients)
