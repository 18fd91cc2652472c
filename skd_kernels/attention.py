"""Masked-width attention: the first k coordinates of every head, one set of weights for every k."""

from __future__ import annotations

import numbers
from typing import Protocol

import torch
import torch.nn.functional as F

from skd_kernels import _native
from skd_kernels._autograd import Context
from skd_kernels._checks import check_alike, check_range, check_scores, check_tensor, check_width
from skd_kernels._dispatch import TensorSpec, always, operation
from skd_kernels.gpu.attention import LARGEST_HEAD, attention_forward
from skd_kernels.gpu.entry import after_autocast, cast_as_linear, device_width, refuses_tensors, refuses_triton
from skd_kernels.mlp import refuses_to_slice, select, select_bias
from skd_kernels.taylor import with_taylor_scores

# Heads with at most this many coordinates are padded with zeros to twice as many, which is faster (float32, 197
# tokens, AVX-512: 6.5 ms forward and backward instead of 10.7 ms).
SLOW_ON_CPU = 8
# The most images in one call of PyTorch's attention on CUDA in half precision: 70,000 images made cuDNN fail on an
# H100 (PyTorch 2.11). It is the limit of the second and third dimension of a CUDA grid.
MOST_IMAGES = 65_535


def masked_attention(
    x: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    width: int | torch.Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    scores: torch.Tensor | None = None,
    queries: int | None = None,
) -> torch.Tensor:
    """Multi-head self-attention with only the first `width` of the D coordinates of every head.

    The same k coordinates are kept in Q, K, V and in the columns of the output projection, for all H heads.

    Args:
        x: (B, N, C), float32, float64, bfloat16 or float16.
        w_qkv: (3 H D, C), rows in timm's order (3, H, D). b_qkv: (3 H D,) or None.
        w_proj: (C, H D). b_proj: (C,) or None.
        width: int in 0..D, or a 0-d int32 tensor on the device of `x` (never read by the host on a GPU and not
            range-checked). Width 0 gives zeros, the bias included; every parameter stays in the graph and gets a
            zero gradient, as does everything past the width.
        num_heads: H.
        scale: softmax scale; None: ``D ** -0.5`` of the full head width D, whatever the width kept.
        scores: (3, H, D) float32 buffer (float64 accepted) to which the backward pass adds the sum over tokens of
            ``|x * dx|`` at the kept coordinates of q, k and v (bias included).
        queries: only the results at the first so many tokens, 1..N; they still see all N. None: all.

    Returns:
        (B, N, C), or (B, queries, C). Under autocast the result is what ``F.linear`` would give.

    Raises:
        ValueError: wrong shape, dtype, device, number of heads or of queries, or an int width out of range.
    """
    check_tensor("x", x, (None, None, None))
    channels = x.shape[-1]
    check_tensor("w_proj", w_proj, (channels, None))
    inner = w_proj.shape[1]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or inner % num_heads:
        raise ValueError(f"num_heads is {num_heads!r}; it must be an int that divides the {inner} columns of w_proj")
    check_tensor("w_qkv", w_qkv, (3 * inner, channels))
    for name, bias, size in (("b_qkv", b_qkv, 3 * inner), ("b_proj", b_proj, channels)):
        if bias is not None:
            check_tensor(name, bias, (size,))
    for name, tensor in (("w_qkv", w_qkv), ("b_qkv", b_qkv), ("w_proj", w_proj), ("b_proj", b_proj)):
        check_alike(name, tensor, "x", x)
    head_dim = inner // num_heads
    check_width(width, head_dim, x.device)
    check_scores(scores, (3, num_heads, head_dim), x.device)
    whole = isinstance(queries, int) and not isinstance(queries, bool)
    if queries is not None and not (whole and 1 <= queries <= x.shape[1]):
        raise ValueError(f"queries is {queries!r}; it may be 1..{x.shape[1]}, or None")
    result: torch.Tensor = _operation(
        x=x,
        w_qkv=w_qkv,
        b_qkv=b_qkv,
        w_proj=w_proj,
        b_proj=b_proj,
        width=width,
        num_heads=num_heads,
        scale=_scale(scale, head_dim),
        scores=scores,
        queries=queries,
    )
    return result


def _scale(scale: object, head_dim: int) -> float | None:
    """The factor of the logits; None for an empty head, which has none."""
    if scale is None:
        return head_dim**-0.5 if head_dim else None
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ValueError(f"scale is {scale!r}; it must be a number, or None for head_dim ** -0.5")
    return float(scale)


_operation = operation(masked_attention)


def refuses_to_compute(
    *,
    x: TensorSpec,
    w_qkv: TensorSpec,
    b_qkv: TensorSpec | None,
    w_proj: TensorSpec,
    b_proj: TensorSpec | None,
    width: int | TensorSpec,
    queries: int | None,
    **_: object,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile generates code of its own"
    if x.device != "cpu":
        return f"there is no kernel for {x.device}"
    if queries is not None:
        return "the kernel computes all queries"
    if _native.module is None:
        return _native.failure
    tensors = x, w_qkv, b_qkv, w_proj, b_proj
    return (
        _native.refuses_transforms() or refuses_tensors((torch.float32,), *tensors) or refuses_to_slice(width=width)
    )


@_operation.implementation("compiled", refuses_to_compute)
def masked_attention_compiled(
    x: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    width: int | torch.Tensor,
    num_heads: int,
    scale: float | None,
    scores: torch.Tensor | None,
    queries: int | None,
) -> torch.Tensor:
    """As "slices", but csrc/attention_cpu.cpp computes attention and its gradient, on qkv without a copy."""
    k = check_range(int(width), w_proj.shape[1] // num_heads)
    if k == 0:
        return masked_attention_slices(x, w_qkv, b_qkv, w_proj, b_proj, k, num_heads, scale, scores, queries)
    weight, bias, columns = _kept(w_qkv, b_qkv, w_proj, num_heads, k)
    qkv = with_taylor_scores(_heads(x, weight, bias), None if scores is None else scores[:, :, :k])
    assert scale is not None  # an empty head is refused
    out: torch.Tensor = Attention.apply(qkv, float(scale))
    return F.linear(out.flatten(2), columns, b_proj)


class _AttentionContext(Context, Protocol):
    scale: float


class Attention(torch.autograd.Function):
    """softmax(scale q k^T) v of qkv (B, N, 3, H, D) float32: (B, N, H, D)."""

    @staticmethod
    def forward(ctx: _AttentionContext, qkv: torch.Tensor, scale: float) -> torch.Tensor:
        qkv, ctx.scale = qkv.contiguous(), scale
        out, sums = torch.ops.skd_kernels.attention.default(qkv, scale)
        ctx.save_for_backward(qkv, out, sums)
        return out

    @staticmethod
    def backward(ctx: _AttentionContext, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return AttentionGradient.apply(grads[0], *ctx.saved_tensors, ctx.scale), None


class AttentionGradient(torch.autograd.Function):
    """The gradient at qkv. Its own backward raises an error, so that a second derivative is not silently zero."""

    @staticmethod
    def forward(
        ctx: Context, grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, scale: float
    ) -> torch.Tensor:
        found: torch.Tensor = torch.ops.skd_kernels.attention_backward.default(
            grad.contiguous(), qkv, out, sums, scale
        )
        return found

    @staticmethod
    def backward(ctx: Context, *_: torch.Tensor) -> None:
        raise RuntimeError("the compiled masked_attention has no second derivative; use('reference') has")


def refuses_to_attend(*, x: TensorSpec, width: int | TensorSpec, **_: object) -> str | None:
    """As `refuses_to_slice`; and what PyTorch's own attention does not take."""
    half = after_autocast(x.dtype, x.device) in (torch.float16, torch.bfloat16)
    if x.device == "cuda" and half and x.shape[0] > MOST_IMAGES:
        return f"cuDNN fails at the attention of {x.shape[0]} images in half precision; {MOST_IMAGES} may be tried"
    if _native.forward_mode():
        return "forward-mode derivatives may be asked for; scaled_dot_product_attention has none"
    return refuses_to_slice(width=width)


@_operation.implementation("slices", refuses_to_attend)
def masked_attention_slices(
    x: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    width: int | torch.Tensor,
    num_heads: int,
    scale: float | None,
    scores: torch.Tensor | None,
    queries: int | None,
) -> torch.Tensor:
    """Exact shapes for the library: the kept rows and columns are gathered, work follows the width."""
    k = check_range(int(width), w_proj.shape[1] // num_heads)
    if k == 0:
        # The slices end at 0, not at k: under torch.compile k may be a symbol, which fails for empty tensors.
        weight, bias, columns = _kept(w_qkv, b_qkv, w_proj, num_heads, 0)
        # (B, N, 0) times (0, C) is zero and keeps every weight in the graph; so does the sum of nothing.
        nothing = _heads(x[:, :queries], weight, bias)[:, :, 0].flatten(2)
        out = F.linear(nothing, columns)
        return out if b_proj is None else out + b_proj[:0].sum()
    weight, bias, columns = _kept(w_qkv, b_qkv, w_proj, num_heads, k)
    kept = None if scores is None else scores[:, :, :k]
    if queries is None:
        q, keys, values = with_taylor_scores(_heads(x, weight, bias), kept).unbind(2)
    else:
        first, others = slice(0, 1), slice(1, 3)
        q, keys, values = (
            part
            for tokens, which in ((x[:, :queries], first), (x, others))
            for part in with_taylor_scores(
                _heads(tokens, weight[which], None if bias is None else bias[which]),
                None if kept is None else kept[which],
            ).unbind(2)
        )
    return F.linear(_attend(q, keys, values, scale), columns, b_proj)


def _kept(
    w_qkv: torch.Tensor, b_qkv: torch.Tensor | None, w_proj: torch.Tensor, num_heads: int, k: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The first k coordinates of every head: weight (3, H, k, C) and bias (3, H, k) of qkv, columns (C, H k)."""
    channels = w_qkv.shape[1]
    weight = w_qkv.reshape(3, num_heads, -1, channels)[:, :, :k]
    bias = None if b_qkv is None else b_qkv.reshape(3, num_heads, -1)[:, :, :k]
    return weight, bias, w_proj.reshape(channels, num_heads, -1)[:, :, :k].reshape(channels, -1)


def _heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (B, N, C) by weight (S, H, k, C) and bias (S, H, k): (B, N, S, H, k)."""
    flat = F.linear(x, weight.reshape(-1, x.shape[-1]), None if bias is None else bias.reshape(-1))
    return flat.reshape(*x.shape[:-1], *weight.shape[:-1])


def refuses_to_launch(
    *,
    x: TensorSpec,
    w_qkv: TensorSpec,
    b_qkv: TensorSpec | None,
    w_proj: TensorSpec,
    b_proj: TensorSpec | None,
    num_heads: int,
    **_: object,
) -> str | None:
    head_dim = w_proj.shape[1] // num_heads
    if head_dim > LARGEST_HEAD:
        return f"heads of {head_dim} coordinates; the kernels take up to {LARGEST_HEAD}"
    return refuses_triton(x, w_qkv, b_qkv, w_proj, b_proj)


# Registered after "slices": where the host knows the width, the vendor's library on exact shapes is preferred. On an
# H100 its softmax attention takes about a tenth less time than these kernels (benchmarks/results/h100-quick.json,
# commit 38bc3b68).
@_operation.implementation("triton", refuses_to_launch)
def masked_attention_triton(
    x: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    width: int | torch.Tensor,
    num_heads: int,
    scale: float | None,
    scores: torch.Tensor | None,
    queries: int | None,
) -> torch.Tensor:
    """skd_kernels/gpu: the width is read on the device, so one graph and one compilation serve every width."""
    x = cast_as_linear(x)
    assert scale is not None  # an empty head is refused
    kept = device_width(width, x.device)
    out: torch.Tensor
    first = x.shape[1] if queries is None else queries
    out, *_ = attention_forward(x, w_qkv, b_qkv, w_proj, b_proj, kept, scores, num_heads, float(scale), first)
    return out


@_operation.implementation("reference", always)
def masked_attention_reference(
    x: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    width: int | torch.Tensor,
    num_heads: int,
    scale: float | None,
    scores: torch.Tensor | None,
    queries: int | None,
) -> torch.Tensor:
    """The specification: parameters past the width are zero, selected and never multiplied (0 * NaN is NaN).

    Zero coordinates of q and k add nothing to the attention logits, zero coordinates of v give zero outputs.
    """
    inner = w_proj.shape[1]
    keep_head = torch.arange(inner // num_heads, device=x.device) < width
    keep = keep_head.repeat(num_heads)
    keep_rows = keep.repeat(3)
    some = torch.arange(1, device=x.device) < width
    qkv = F.linear(select(some, x), select(keep_rows[:, None], w_qkv), select_bias(keep_rows, b_qkv))
    qkv = qkv.reshape(*x.shape[:-1], 3, num_heads, inner // num_heads)
    qkv = with_taylor_scores(qkv, scores)
    q, keys, values = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, D)
    # Logits are computed in float32 at least, because they may exceed the range of float16.
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        q = q[:, :, :queries].to(wide) * (1.0 if scale is None else scale)
        weights = (q @ keys.to(wide).mT).softmax(-1).to(values.dtype)
        out = (weights @ values).transpose(1, 2).flatten(2)
    return F.linear(out, select(keep, w_proj), select_bias(some, b_proj))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """softmax(scale q k^T) v of q (B, queries, H, k), k and v (B, N, H, k): (B, queries, H k)."""
    kept = q.shape[-1]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if kept <= SLOW_ON_CPU and q.device.type == "cpu":
        q, k, v = (F.pad(tensor, (0, 2 * SLOW_ON_CPU - kept)) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :kept]
    return out.transpose(1, 2).flatten(2)
