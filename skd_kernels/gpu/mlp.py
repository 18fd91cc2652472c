"""`masked_mlp` in Triton: the sequence of its kernels, and their registration with torch.library.

The forward pass casts and packs the weights, computes the hidden features h of the first `width` neurons together
with the slopes (the derivatives of their activation, for the backward pass), then the output. The backward pass
computes the gradient at the pre-activation, in a kernel that also sums up the gradient of b1 and the Taylor scores;
from this gradient those of x and w1, and from the saved h that of w2. Gradients that no input needs are not computed.

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


@torch.library.custom_op("skd_kernels::masked_mlp_triton", mutates_args=())
def mlp_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    width: Tensor,
    scores: Tensor | None,
    act: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward operator: arguments as in `masked_mlp`, with the width as a 0-d int32 tensor.

    The dtype of x is the one to compute in; the parameters are cast to it. Only the backward pass uses `scores`.

    Returns:
        y (B, N, C), and what the backward pass needs: h (B N, P), where P is F rounded up to whole tiles; the slopes
        (B N, P), or (B N, 2 P) if gated, or empty unless `save`; and the packed weights. These are uninitialised
        past the tile in which the width ends.
    """
    from skd_kernels.gpu.packing import pack
    from skd_kernels.gpu.products import product

    y, h, slopes, inward, outward = _outputs(x, w2, gated, save)
    layout, rows = _layout(w2.shape[1], gated), as_rows(x)
    bias = None if b1 is None else uninitialised(x, layout.row_pitch)
    pack(w1, b1, w2, (inward, bias, outward), width, layout)
    product(
        rows,
        inward,
        bias,
        h,
        width,
        layout,
        epilogue="activate",
        ragged_columns=True,
        transposed=True,
        by_rows=True,
        act=act,
        slopes=slopes if save else None,
    )
    b2 = None if b2 is None else contiguous(b2)
    product(h, outward, b2, as_rows(y), width, layout, ragged_columns=False, transposed=True, by_rows=False)
    return y, h, slopes, inward, outward


@mlp_forward.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    width: Tensor,
    scores: Tensor | None,
    act: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, w2, gated, save)


def _layout(hidden: int, gated: bool) -> Layout:
    return Layout(hidden, row_groups=2 if gated else 1, column_groups=1, packed=False)


def _outputs(x: Tensor, w2: Tensor, gated: bool, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (channels, hidden) = x.shape[0] * x.shape[1], w2.shape
    layout = _layout(hidden, gated)
    return (
        uninitialised(x, *x.shape),
        uninitialised(x, tokens, layout.column_pitch),
        uninitialised(x, *((tokens, layout.row_pitch) if save else (0,))),
        *layout.empty_weights(x, channels),
    )


@torch.library.custom_op("skd_kernels::masked_mlp_triton_backward", mutates_args=())
def mlp_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    slopes: Tensor,
    inward: Tensor,
    outward: Tensor,
    width: Tensor,
    hidden: int,
    gated: bool,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, b1, w2 and b2, and the scores (F,) float32; empty where not needed.

    Args:
        dy: (B, N, C), the gradient at the output.
        h, ..., outward: what the forward operator returned, without y.
        hidden: F.
        dtype: of the parameters' gradients.
        needs: for each of the six results whether it is needed.
    """
    from skd_kernels.gpu.products import gradient_rows, product
    from skd_kernels.gpu.sums import column_sums, sums
    from skd_kernels.gpu.weight_gradient import weight_gradient

    layout = _layout(hidden, gated)
    results = _gradients(x, hidden, gated, dtype, needs)
    dx, dw1, db1, dw2, db2, scores = results
    need_x, need_w1, need_b1, need_w2, need_b2, need_scores = needs
    dy, x = as_rows(dy), as_rows(x)
    if need_x or need_w1 or need_b1 or need_scores:
        dz = uninitialised(slopes, *slopes.shape) if need_x or need_w1 else None
        terms = None
        if need_b1 or need_scores:
            count = gradient_rows(dy, gated), layout.row_groups + 1
            terms = uninitialised(x, *count, layout.part_stride, dtype=torch.float32)
        product(
            dy,
            outward,
            None,
            dz,
            width,
            layout,
            epilogue="gradient",
            ragged_columns=True,
            transposed=False,
            by_rows=True,
            slopes=slopes,
            features=h if need_scores else None,
            sums=terms,
        )
        if terms is not None:
            sums(terms, hidden, db1 if need_b1 else None, scores if need_scores else None, width, full=hidden)
        if dz is not None and need_x:
            product(
                dz, inward, None, as_rows(dx), width, layout, ragged_columns=False, transposed=False, by_rows=True
            )
        if dz is not None and need_w1:
            weight_gradient(dz, x, width, dw1, layout, by_rows=True)
    if need_w2:
        weight_gradient(dy, h, width, dw2, layout, by_rows=False)
    if need_b2:
        column_sums(dy, width, db2)
    return results


@mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    slopes: Tensor,
    inward: Tensor,
    outward: Tensor,
    width: Tensor,
    hidden: int,
    gated: bool,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, hidden, gated, dtype, needs)


def _gradients(
    x: Tensor, hidden: int, gated: bool, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(index: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return uninitialised(x, *(shape if needs[index] else (0,)), dtype=dtype)

    channels, rows = x.shape[-1], 2 * hidden if gated else hidden
    return (
        empty(0, *x.shape, dtype=x.dtype),
        empty(1, rows, channels),
        empty(2, rows),
        empty(3, channels, hidden),
        empty(4, channels),
        empty(5, hidden, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, width, scores, _, gated, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros as large as h for unused outputs
    ctx.save_for_backward(x, *saved, width)
    # The score buffer is not saved with save_for_backward: the backward pass writes to it, and saved tensors must not
    # be modified in place.
    ctx.scores, ctx.gated, ctx.hidden = scores, gated, parameters[2].shape[1]
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    needed = ctx.needs_input_grad[:5]
    with_scores = ctx.scores is not None and any(needed[:3])
    dtype = gradient_dtype(ctx.dtypes)
    dx, *gradients, added = mlp_backward(dy, *ctx.saved_tensors, ctx.hidden, ctx.gated, dtype, [*needed, with_scores])
    if with_scores:
        ctx.scores.add_(added.detach())
    cast = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return (*(gradient if need else None for gradient, need in zip([dx, *cast], needed, strict=True)), *(None,) * 5)


mlp_forward.register_autograd(_backward, setup_context=_setup_context)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that reach every kernel and configuration, for launch.record."""
    from skd_kernels.gpu.activations import ACTIVATIONS

    yield "quick DeiT-Base bf16", partial(_example, torch.bfloat16)
    for size, channels in (("Tiny", 192), ("Small", 384)):
        yield f"DeiT-{size} bf16", partial(_example, torch.bfloat16, (128, 197, channels), 4 * channels)
    for gated in (False, True):
        suffix = " gated" if gated else ""
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for act in ACTIVATIONS:
                name = f"{str(dtype).removeprefix('torch.')} {act}{suffix}"
                yield name, partial(_example, dtype, act=act, gated=gated)
        for channels, hidden in ((384, 1536), (192, 768), (200, 500), (1152, 4304)):
            shape = (3, 197, channels)
            yield f"{channels} x {hidden} bf16{suffix}", partial(_example, torch.bfloat16, shape, hidden, gated=gated)
        for dtype in (torch.float16, torch.float32):
            for channels, hidden in ((200, 500), (136, 512)):  # rows whose length is no multiple of 16
                name = f"{channels} x {hidden} {str(dtype).removeprefix('torch.')}{suffix}"
                yield name, partial(_example, dtype, (3, 197, channels), hidden, gated=gated)
        for dtype in (torch.bfloat16, torch.float32):  # rows that no descriptor can describe
            name = f"{str(dtype).removeprefix('torch.')} odd sizes{suffix}"
            yield name, partial(_example, dtype, (3, 17, 45), 33, gated=gated)
        yield f"float32 with TF32{suffix}", partial(_example_tf32, gated)


def _example(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (128, 197, 768),
    hidden: int = 3072,
    act: str = "gelu",
    gated: bool = False,
) -> None:
    rows, channels = 2 * hidden if gated else hidden, shape[-1]
    x, w1, b1, w2, b2 = (
        torch.empty(size, dtype=dtype, device="meta")
        for size in (shape, (rows, channels), (rows,), (channels, hidden), (channels,))
    )
    width = torch.empty((), dtype=torch.int32, device="meta")
    _, *saved = mlp_forward._init_fn(x, w1, b1, w2, b2, width, None, act, gated, True)
    mlp_forward._init_fn(x, w1, None, w2, None, width, None, act, gated, False)
    for needs in ([True] * 6, [True] * 5 + [False], [True] + [False] * 5):
        mlp_backward._init_fn(x, x, *saved, width, hidden, gated, dtype, needs)


def _example_tf32(gated: bool) -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        _example(torch.float32, gated=gated)
    finally:
        matmul.fp32_precision = before
