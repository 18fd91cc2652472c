"""`masked_mlp` in Triton: the order of its kernels, and what torch.library has to know of them.

Forward: the hidden features h, and z before the activation, of the first `width` neurons; then the output. Backward:
the gradient at z, which adds up the gradient of b1 and the Taylor scores on its way; from it those of x and w1; and
from the saved h that of w2. What no input needs is not computed.

Two opaque operators, so that a compiled graph holds one node for each and never sees the width's value. Importing
this module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skd_kernels.gpu.buffers import as_rows, contiguous, padded, uninitialised


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as `masked_mlp`, of one dtype; width a 0-d int32 tensor; scores only meant for the backward.

    Returns:
        y (B, N, C), and what the backward needs, uninitialised past the width's tile: h (B N, P), P being F rounded
        up to whole tiles, and z (B N, 1 or, if gated, 2, P), which is empty unless `save`.
    """
    from skd_kernels.gpu.hidden import hidden_features
    from skd_kernels.gpu.linear import output

    y, h, z = _outputs(x, w2, gated, save)
    b1, b2 = (None if bias is None else contiguous(bias) for bias in (b1, b2))
    hidden_features(as_rows(x), as_rows(w1), b1, width, h, z if save else None, act, gated)
    output(h, as_rows(w2), b2, width, as_rows(y))
    return y, h, z


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
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, w2, gated, save)


def _outputs(x: Tensor, w2: Tensor, gated: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, pitch = x.shape[0] * x.shape[1], padded(w2.shape[1])
    return (
        uninitialised(x, *x.shape),
        uninitialised(x, tokens, pitch),
        uninitialised(x, *((tokens, 2 if gated else 1, pitch) if save else (0,))),
    )


@torch.library.custom_op("skd_kernels::masked_mlp_triton_backward", mutates_args=())
def mlp_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    h: Tensor,
    z: Tensor,
    width: Tensor,
    act: str,
    gated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, b1, w2 and b2, and the scores (F,) float32; empty where not needed.

    Args:
        dy: (B, N, C). h, z: what the forward returned.
        needs: for each of the six results whether it is needed.
    """
    from skd_kernels.gpu.hidden import hidden_gradient
    from skd_kernels.gpu.linear import input_gradient
    from skd_kernels.gpu.weight_gradient import column_sums, sums, weight_gradient

    results = _gradients(x, w1, w2, needs)
    dx, dw1, db1, dw2, db2, scores = results
    need_x, need_w1, need_b1, need_w2, need_b2, need_scores = needs
    parts, hidden = 2 if gated else 1, w2.shape[1]
    dy, x, w1, w2 = as_rows(dy), as_rows(x), as_rows(w1), as_rows(w2)
    if need_x or need_w1 or need_b1 or need_scores:
        keep, add_up = need_x or need_w1, need_b1 or need_scores
        dz, pieces = hidden_gradient(dy, w2, z, width, act, keep=keep, add_up=add_up)
        if pieces is not None:
            bias, total = db1 if need_b1 else None, scores if need_scores else None
            sums(pieces, hidden, bias, total, width, parts=parts)
        if dz is not None and need_x:
            input_gradient(dz, w1, width, as_rows(dx))
        if dz is not None and need_w1:
            weight_gradient(dz.flatten(1), x, width, dw1, by_rows=True, parts=parts)
    if need_w2:
        weight_gradient(dy, h, width, dw2, by_rows=False)
    if need_b2:
        column_sums(dy, width, db2)
    return results


@mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    h: Tensor,
    z: Tensor,
    width: Tensor,
    act: str,
    gated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, w1, w2, needs)


def _gradients(
    x: Tensor, w1: Tensor, w2: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(index: int, shape: Sequence[int], dtype: torch.dtype = x.dtype) -> Tensor:
        return uninitialised(x, *(shape if needs[index] else (0,)), dtype=dtype)

    return (
        empty(0, x.shape),
        empty(1, w1.shape),
        empty(2, w1.shape[:1]),
        empty(3, w2.shape),
        empty(4, w2.shape[:1]),
        empty(5, w2.shape[1:], torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, _, w2, _, width, scores, act, gated, _ = inputs
    _, h, z = output
    ctx.mark_non_differentiable(h, z)
    ctx.set_materialize_grads(False)  # or zeros as large as h and z are made for them
    ctx.save_for_backward(x, w1, w2, h, z, width)
    # The buffer is written in the backward pass, perhaps several times: a saved tensor must not change.
    ctx.scores, ctx.act, ctx.gated = scores, act, gated


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    needed = ctx.needs_input_grad[:5]
    with_scores = ctx.scores is not None and any(needed[:3])
    *gradients, added = mlp_backward(dy, *ctx.saved_tensors, ctx.act, ctx.gated, [*needed, with_scores])
    if with_scores:
        ctx.scores.add_(added.detach())
    return (*(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *(None,) * 5)


mlp_forward.register_autograd(_backward, setup_context=_setup_context)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that reach every kernel and configuration, for launch.record."""
    from skd_kernels.gpu.activations import ACTIVATIONS

    yield "quick DeiT-Base bf16", partial(_example, torch.bfloat16)
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
            for channels, hidden in ((200, 500), (136, 512)):  # rows of other lengths than multiples of 16
                name = f"{channels} x {hidden} {str(dtype).removeprefix('torch.')}{suffix}"
                yield name, partial(_example, dtype, (3, 197, channels), hidden, gated=gated)
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
    _, h, z = mlp_forward._init_fn(x, w1, b1, w2, b2, width, None, act, gated, True)
    mlp_forward._init_fn(x, w1, None, w2, None, width, None, act, gated, False)
    mlp_backward._init_fn(x, x, w1, w2, h, z, width, act, gated, [True] * 6)
    mlp_backward._init_fn(x, x, w1, w2, h, z, width, act, gated, [True, False, False, False, False, False])


def _example_tf32(gated: bool) -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        _example(torch.float32, gated=gated)
    finally:
        matmul.fp32_precision = before
