"""`masked_attention` in Triton: the sequence of its kernels, and their registration with torch.library.

The forward pass casts and packs the kept rows of W_qkv and columns of W_proj, computes qkv = x W_qkv^T + b, runs the
attention kernel, and computes out = o W_proj^T + b. Where only the first tokens are queries, as in a last block whose
class token alone is read, the attention kernels and all products after them compute only these. The backward pass
computes the gradient at o, at qkv (in two passes), at x, and of the parameters; gradients that no input needs are not
computed. The forward pass saves qkv and o, which are packed (packing.py), the log-sum-exp of each row of logits, and
the packed weights.

The forward and the backward pass are each one opaque custom operator, so that a compiled graph holds one node for
each and never sees the value of the width. Importing this module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skd_kernels.gpu.buffers import as_rows, contiguous, gradient_dtype, uninitialised
from skd_kernels.gpu.layout import Layout

LARGEST_HEAD = 128  # coordinates; more would not fit the registers of one program


@torch.library.custom_op("skd_kernels::masked_attention_triton", mutates_args=())
def attention_forward(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    width: Tensor,
    scores: Tensor | None,
    num_heads: int,
    scale: float,
    queries: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward operator: arguments as in `masked_attention`, with the width as a 0-d int32 tensor.

    The dtype of x is the one to compute in; the parameters are cast to it. Only the backward pass uses `scores`.

    Returns:
        out (B, queries, C), and what the backward pass needs: qkv (B N, >= 3 H D) and o (B queries, >= H D), both
        packed; logsumexp (B, H, queries) float32; and the packed weights. These are uninitialised past the width.
    """
    from skd_kernels.gpu.flash import attend
    from skd_kernels.gpu.packing import pack
    from skd_kernels.gpu.products import product

    head_dim = w_proj.shape[1] // num_heads
    layout, rows = _layout(head_dim, num_heads), as_rows(x)
    out, qkv, o, logsumexp, inward, outward = _outputs(x, w_proj, num_heads, queries)
    bias = None if b_qkv is None else uninitialised(x, layout.row_pitch)
    pack(w_qkv, b_qkv, w_proj, (inward, bias, outward), width, layout)
    product(rows, inward, bias, qkv, width, layout, ragged_columns=True, transposed=True, by_rows=True)
    attend(qkv, o, logsumexp, width, head_dim, scale)
    b_proj = None if b_proj is None else contiguous(b_proj)
    product(o, outward, b_proj, as_rows(out), width, layout, ragged_columns=False, transposed=True, by_rows=False)
    return out, qkv, o, logsumexp, inward, outward


@attention_forward.register_fake
def _(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    width: Tensor,
    scores: Tensor | None,
    num_heads: int,
    scale: float,
    queries: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, w_proj, num_heads, queries)


def _layout(head_dim: int, num_heads: int) -> Layout:
    return Layout(head_dim, row_groups=3 * num_heads, column_groups=num_heads, packed=True)


def _outputs(
    x: Tensor, w_proj: Tensor, num_heads: int, queries: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, tokens, channels = x.shape
    layout = _layout(w_proj.shape[1] // num_heads, num_heads)
    return (
        uninitialised(x, images, queries, channels),
        uninitialised(x, images * tokens, layout.row_pitch),
        uninitialised(x, images * queries, layout.column_pitch),
        uninitialised(x, images, num_heads, queries, dtype=torch.float32),
        *layout.empty_weights(x, channels),
    )


@torch.library.custom_op("skd_kernels::masked_attention_triton_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    x: Tensor,
    qkv: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    inward: Tensor,
    outward: Tensor,
    width: Tensor,
    head_dim: int,
    scale: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w_qkv, b_qkv, w_proj and b_proj, and the scores (3 H D,) float32; empty where not needed.

    Args:
        dout: (B, queries, C), the gradient at the output.
        qkv, ..., outward: what the forward operator returned, without out.
        head_dim: D.
        dtype: of the parameters' gradients.
        needs: for each of the six results whether it is needed.
    """
    from skd_kernels.gpu.flash_backward import differentiate_attention
    from skd_kernels.gpu.products import product
    from skd_kernels.gpu.sums import column_sums, sums
    from skd_kernels.gpu.weight_gradient import weight_gradient

    num_heads = logsumexp.shape[1]
    layout = _layout(head_dim, num_heads)
    results = _gradients(x, num_heads * head_dim, dtype, needs)
    dx, dw_qkv, db_qkv, dw_proj, db_proj, scores = results
    rows, drows = as_rows(x), as_rows(dout)
    if needs[3]:
        weight_gradient(drows, o, width, dw_proj, layout, by_rows=False)
    if needs[4]:
        column_sums(drows, width, db_proj)
    if needs[0] or needs[1] or needs[2] or needs[5]:
        do = uninitialised(o, *o.shape)
        product(drows, outward, None, do, width, layout, ragged_columns=True, transposed=False, by_rows=False)
        dqkv, terms = differentiate_attention(
            qkv, o, do, logsumexp, width, head_dim, scale, bias=needs[2], scores=needs[5]
        )
        if terms is not None:
            bias, columns = db_qkv if needs[2] else None, 3 * num_heads * head_dim
            sums(terms, columns, bias, scores if needs[5] else None, width, full=head_dim)
        if needs[1]:
            weight_gradient(dqkv, rows, width, dw_qkv, layout, by_rows=True)
        if needs[0]:
            product(
                dqkv, inward, None, as_rows(dx), width, layout, ragged_columns=False, transposed=False, by_rows=True
            )
    return results


@attention_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    qkv: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    inward: Tensor,
    outward: Tensor,
    width: Tensor,
    head_dim: int,
    scale: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, logsumexp.shape[1] * head_dim, dtype, needs)


def _gradients(
    x: Tensor, inner: int, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(index: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return uninitialised(x, *(shape if needs[index] else (0,)), dtype=dtype)

    channels = x.shape[-1]
    return (
        empty(0, *x.shape, dtype=x.dtype),
        empty(1, 3 * inner, channels),
        empty(2, 3 * inner),
        empty(3, channels, inner),
        empty(4, channels),
        empty(5, 3 * inner, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, width, ctx.scores, num_heads, ctx.scale, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros as large as qkv for unused outputs
    ctx.save_for_backward(x, *saved, width)
    ctx.head_dim = parameters[2].shape[1] // num_heads
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 10
    needed = ctx.needs_input_grad[:5]
    with_scores = ctx.scores is not None and any(needed[:3])
    dtype = gradient_dtype(ctx.dtypes)
    dx, *gradients, added = attention_backward(
        dout, *ctx.saved_tensors, ctx.head_dim, ctx.scale, dtype, [*needed, with_scores]
    )
    if with_scores:
        ctx.scores.add_(added.detach().view(ctx.scores.shape))
    cast = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return (*(gradient if need else None for gradient, need in zip([dx, *cast], needed, strict=True)), *(None,) * 5)


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that reach every kernel and configuration, for launch.record."""
    yield "quick DeiT-Base bf16", partial(_example, torch.bfloat16)
    for size, heads in (("Tiny", 3), ("Small", 6)):
        yield f"DeiT-{size} bf16", partial(_example, torch.bfloat16, (128, 197, 64 * heads), heads)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (16, 32, 64, 128):
            label = f"{str(dtype).removeprefix('torch.')}, heads of {head_dim}"
            yield label, partial(_example, dtype, head_dim=head_dim)
    yield "float32 with TF32", _example_tf32
    for dtype in (torch.bfloat16, torch.float32):
        label = f"{str(dtype).removeprefix('torch.')}, odd sizes"
        yield label, partial(_example, dtype, (3, 17, 45), 3, 15)
    yield "one of everything", partial(_example, torch.bfloat16, (1, 1, 1), 1, 1)


def _example(
    dtype: torch.dtype, shape: tuple[int, int, int] = (128, 197, 768), num_heads: int = 12, head_dim: int = 64
) -> None:
    """All tokens are queries; fewer take the same kernels."""
    inner, channels = num_heads * head_dim, shape[-1]
    x, w_qkv, b_qkv, w_proj, b_proj = (
        torch.empty(size, dtype=dtype, device="meta")
        for size in (shape, (3 * inner, channels), (3 * inner,), (channels, inner), (channels,))
    )
    width = torch.empty((), dtype=torch.int32, device="meta")
    _, *saved = attention_forward._init_fn(x, w_qkv, b_qkv, w_proj, b_proj, width, None, num_heads, 0.125, shape[1])
    attention_forward._init_fn(x, w_qkv, None, w_proj, None, width, None, num_heads, 0.125, shape[1])
    for bias, scores in ((True, True), (True, False), (False, False)):
        needs = [True, True, bias, True, bias, scores]
        attention_backward._init_fn(x, x, *saved, width, head_dim, 0.125, dtype, needs)


def _example_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        for head_dim in (16, 32, 64, 128):
            _example(torch.float32, head_dim=head_dim)
    finally:
        matmul.fp32_precision = before
