"""`masked_attention` in Triton: the order of its kernels, and what torch.library has to know of them.

Forward: transpose the kept columns of W_proj; qkv = x W_qkv^T + b; attention; out = o W_proj^T + b. Backward: the
gradient at o, at qkv (two passes), at x, and of the parameters; what no input needs is not computed. qkv and o are
packed (projections.py) and saved with the softmax's logarithms, and so is the transposed W_proj.

Two opaque operators, so that a compiled graph holds one node for each and never sees the width's value. Importing
this module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skd_kernels.gpu.buffers import contiguous, uninitialised

LARGEST_HEAD = 128  # coordinates; more would not fit the registers of one program
LARGEST_PACKED = 2**20 - 256  # columns of q, k and v side by side, see projections.head_of


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as `masked_attention`, of one dtype; width a 0-d int32 tensor; scores only meant for the backward.

    Returns:
        out (B, N, C), and what the backward needs, uninitialised past the width: qkv (B N, 3 H P) and o (B N, H P)
        packed, P being D rounded up to a multiple of 8; logsumexp (B, H, N) float32; W_proj transposed (H D, C).
    """
    from skd_kernels.gpu.flash import attend
    from skd_kernels.gpu.projections import project, transpose_weight

    head_dim = w_proj.shape[1] // num_heads
    out, qkv, o, logsumexp, transposed = _outputs(x, w_proj, num_heads)
    rows, w_qkv, w_proj = (contiguous(tensor) for tensor in (x.reshape(-1, x.shape[-1]), w_qkv, w_proj))
    b_qkv, b_proj = (None if bias is None else contiguous(bias) for bias in (b_qkv, b_proj))
    transpose_weight(w_proj, transposed, width, num_heads)
    project(True, rows, w_qkv, b_qkv, qkv, width, head_dim)
    attend(qkv, o, logsumexp, width, head_dim, scale)
    project(False, o, transposed, b_proj, out.view(rows.shape), width, head_dim)
    return out, qkv, o, logsumexp, transposed


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, w_proj, num_heads)


def _outputs(x: Tensor, w_proj: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, tokens, channels = x.shape
    inner = w_proj.shape[1]
    pitch = (inner // num_heads + 7) // 8 * 8
    return (
        x.new_empty(x.shape),
        uninitialised(x, images * tokens, 3 * num_heads * pitch),
        uninitialised(x, images * tokens, num_heads * pitch),
        uninitialised(x, images, num_heads, tokens, dtype=torch.float32),
        uninitialised(x, inner, channels),
    )


@torch.library.custom_op("skd_kernels::masked_attention_triton_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    x: Tensor,
    w_qkv: Tensor,
    qkv: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    transposed: Tensor,
    width: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w_qkv, b_qkv, w_proj and b_proj, and the scores (3 H D,) float32; empty where not needed.

    Args:
        dout: (B, N, C). qkv ... transposed: what the forward returned.
        needs: for each of the six results whether it is needed.
    """
    from skd_kernels.gpu.flash import differentiate_attention
    from skd_kernels.gpu.projections import differentiate_weight, project, sum_terms
    from skd_kernels.gpu.weight_gradient import column_sums

    num_heads = logsumexp.shape[1]
    inner, channels = transposed.shape
    head_dim = inner // num_heads
    results = _gradients(x, w_qkv, transposed, needs)
    dx, dw_qkv, db_qkv, dw_proj, db_proj, scores = results
    rows, drows = (contiguous(tensor.reshape(-1, channels)) for tensor in (x, dout))
    if needs[3]:
        differentiate_weight(o, drows, dw_proj, width, num_heads, transposed=True)
    if needs[4]:
        column_sums(drows, width, db_proj)
    if needs[0] or needs[1] or needs[2] or needs[5]:
        do = project(True, drows, transposed, None, torch.empty_like(o), width, head_dim)
        dqkv, bias_sums, score_sums = differentiate_attention(
            qkv, o, do, logsumexp, width, head_dim, scale, bias=needs[2], scores=needs[5]
        )
        if bias_sums is not None:
            sum_terms(bias_sums, db_qkv, width, head_dim)
        if score_sums is not None:
            sum_terms(score_sums, scores, width, head_dim)
        if needs[1]:
            differentiate_weight(dqkv, rows, dw_qkv, width, 3 * num_heads, transposed=False)
        if needs[0]:
            project(False, dqkv, contiguous(w_qkv), None, dx.view(rows.shape), width, head_dim)
    return results


@attention_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    w_qkv: Tensor,
    qkv: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    transposed: Tensor,
    width: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, w_qkv, transposed, needs)


def _gradients(
    x: Tensor, w_qkv: Tensor, transposed: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inner, channels = transposed.shape

    def empty(index: int, shape: Sequence[int], dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(shape if needs[index] else (0,), dtype=dtype)

    return (
        empty(0, x.shape),
        empty(1, w_qkv.shape),
        empty(2, (3 * inner,)),
        empty(3, (channels, inner)),
        empty(4, (channels,)),
        empty(5, (3 * inner,), torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_qkv, _, _, _, width, ctx.scores, _, ctx.scale = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or zeros as large as qkv are made for each of them
    ctx.save_for_backward(x, w_qkv, *saved, width)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    needed = ctx.needs_input_grad
    scores = ctx.scores
    with_scores = scores is not None and any(needed[:3])
    needs = [*needed[:5], with_scores]
    *gradients, added = attention_backward(dout, *ctx.saved_tensors, ctx.scale, needs)
    if with_scores:
        scores.add_(added.detach().view(scores.shape))
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=False)), *(None,) * 4)


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that reach every kernel and configuration, for launch.record."""
    yield "quick DeiT-Base bf16", partial(_example, torch.bfloat16)
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
    inner, channels = num_heads * head_dim, shape[-1]
    x, w_qkv, b_qkv, w_proj, b_proj = (
        torch.empty(size, dtype=dtype, device="meta")
        for size in (shape, (3 * inner, channels), (3 * inner,), (channels, inner), (channels,))
    )
    width = torch.empty((), dtype=torch.int32, device="meta")
    _, *saved = attention_forward._init_fn(x, w_qkv, b_qkv, w_proj, b_proj, width, None, num_heads, 0.125)
    attention_forward._init_fn(x, w_qkv, None, w_proj, None, width, None, num_heads, 0.125)
    for bias, scores in ((True, True), (True, False), (False, False)):
        needs = [True, True, bias, True, bias, scores]
        attention_backward._init_fn(x, x, w_qkv, *saved, width, 0.125, needs)


def _example_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        for head_dim in (16, 32, 64, 128):
            _example(torch.float32, head_dim=head_dim)
    finally:
        matmul.fp32_precision = before
