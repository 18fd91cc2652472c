"""The gradient of attention on packed heads, in two passes.

In the first pass each program owns a block of queries and computes dq; in the second, each owns a block of keys and
computes dk and dv. So every sum is made by one program in a fixed order, without atomics, at the price of computing
the logits twice. The first pass also stores ``delta``, the sum over coordinates of out * dout, for the second. Every
program stores partial sums over its tokens: of dqkv (for the bias gradient) and of |qkv * dqkv| (Taylor scores).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.flash import (
    Blocks,
    attention_kernel,
    largest_tile,
    load_tokens,
    owned_block,
    store_tail,
    store_tokens,
)
from skd_kernels.gpu.launch import Device, device_of, launch
from skd_kernels.gpu.tiles import precision, read_width


def backward_blocks(dtype: torch.dtype, head_dim: int, device: Device) -> Blocks:
    """The configuration of both backward passes: a program owns 64 tokens and loops over 32 at a time.

    On sm_90 with heads of 64 coordinates a thread needs 138 registers in the first pass and 168 in the second; blocks
    of 64 by 64 would need 174 and 225, and one program fewer would fit on a multiprocessor in either pass. On sm_80,
    whose mma instructions read their operands from registers, a program owns 32 tokens. At 128 coordinates, dk and dv
    of 64 keys need the registers of 8 warps. The explicit limit keeps ptxas, on sm_80 and sm_100, from aiming at
    fewer registers than the kernels need.
    """
    if dtype == torch.float32:
        return Blocks(16, 32, 4, stages=1, registers=255) if head_dim <= 64 else Blocks(16, 16, 8, 1, registers=255)
    if device.architecture < 90:
        return Blocks(32, 64, warps=4 if head_dim <= 64 else 8, stages=2, registers=255)
    if head_dim <= 64:
        return Blocks(64, 32, 4, stages=2, registers=255 if device.architecture >= 100 else None)
    return Blocks(64, 32, 8, stages=2, registers=255)


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def store_sums(bias_sums, score_sums, target, value, gradient, inside, keep, WIDTH: tl.constexpr):
    """Store sums over a block's tokens, where `inside` says which exist, at offset `target` of each buffer.

    bias_sums gets the sum of `gradient`, score_sums that of |value * gradient|; either may be None.
    """
    column = tl.arange(0, WIDTH)
    gradient = tl.where(inside[:, None], gradient, 0.0)
    if bias_sums is not None:
        tl.store(bias_sums + target + column, tl.sum(gradient, 0), mask=column < keep)
    if score_sums is not None:
        tl.store(score_sums + target + column, tl.sum(tl.abs(value.to(tl.float32) * gradient), 0), mask=column < keep)


@triton.jit
def queries_body(
    qkv,
    out,
    dout,
    logsumexp,
    delta,
    dqkv,
    bias_sums,
    score_sums,
    keep,
    tokens,
    queries,
    heads,
    stride_qkv,
    stride_out,
    head_dim,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pitch, blocks, block, pair, image, head = owned_block(keep, tokens, heads, BLOCK_M)
    first = block * BLOCK_M
    inner = heads * pitch
    query = image * tokens * stride_qkv + head * pitch
    key = qkv + query + inner
    output = image * queries * stride_out + head * pitch
    q = load_tokens(qkv + query, first, queries, stride_qkv, pitch, BLOCK_M, WIDTH)
    do = load_tokens(dout + output, first, queries, stride_out, pitch, BLOCK_M, WIDTH)
    o = load_tokens(out + output, first, queries, stride_out, pitch, BLOCK_M, WIDTH)
    row = tl.arange(0, BLOCK_M)
    inside = row < queries - first
    line = pair.to(tl.int64) * queries + first + row
    log_total = tl.load(logsumexp + line, mask=inside, other=0.0)
    correction = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + line, correction, mask=inside)
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    factor = scale * 1.4426950408889634
    # Tokens that are no queries get a gradient of zeros, since the products that follow read it: in a block with
    # queries because q and dout are zero there, and in a block without because its loop is empty.
    for start in range(0, tl.where(first < queries, tokens, 0), BLOCK_N):
        k = load_tokens(key, start, tokens, stride_qkv, pitch, BLOCK_N, WIDTH)
        v = load_tokens(key + inner, start, tokens, stride_qkv, pitch, BLOCK_N, WIDTH)
        p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * factor - log_total[:, None])
        ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - correction[:, None])
        ds = tl.where((tl.arange(0, BLOCK_N) < tokens - start)[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= scale
    store_tokens(dqkv + query, dq, first, tokens, stride_qkv, pitch, BLOCK_M, WIDTH)
    target = ((image * blocks + block) * 3 * heads + head) * head_dim
    store_sums(bias_sums, score_sums, target, q, dq, inside, keep, WIDTH)


@triton.jit
def keys_body(
    qkv,
    out,
    dout,
    logsumexp,
    delta,
    dqkv,
    bias_sums,
    score_sums,
    keep,
    tokens,
    queries,
    heads,
    stride_qkv,
    stride_out,
    head_dim,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pitch, blocks, block, pair, image, head = owned_block(keep, tokens, heads, BLOCK_M)
    first = block * BLOCK_M
    inner = heads * pitch
    query = qkv + image * tokens * stride_qkv + head * pitch
    key = image * tokens * stride_qkv + inner + head * pitch
    output = dout + image * queries * stride_out + head * pitch
    k = load_tokens(qkv + key, first, tokens, stride_qkv, pitch, BLOCK_M, WIDTH)
    v = load_tokens(qkv + key + inner, first, tokens, stride_qkv, pitch, BLOCK_M, WIDTH)
    dk = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    factor = scale * 1.4426950408889634
    for start in range(0, queries, BLOCK_N):
        q = load_tokens(query, start, queries, stride_qkv, pitch, BLOCK_N, WIDTH)
        do = load_tokens(output, start, queries, stride_out, pitch, BLOCK_N, WIDTH)
        # Past the last query, q, dout, log_total and correction are all zero: p is 1 there, but only zeros are added.
        column = tl.arange(0, BLOCK_N)
        line = pair.to(tl.int64) * queries + start + column
        log_total = tl.load(logsumexp + line, mask=column < queries - start, other=0.0)
        correction = tl.load(delta + line, mask=column < queries - start, other=0.0)
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * factor - log_total[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - correction[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale
    store_tokens(dqkv + key, dk, first, tokens, stride_qkv, pitch, BLOCK_M, WIDTH)
    store_tokens(dqkv + key + inner, dv, first, tokens, stride_qkv, pitch, BLOCK_M, WIDTH)
    if head == heads - 1:
        store_tail(dqkv + image * tokens * stride_qkv, 3 * inner, first, tokens, stride_qkv, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < tokens - first
    target = ((image * blocks + block) * 3 * heads + heads + head) * head_dim
    store_sums(bias_sums, score_sums, target, k, dk, inside, keep, WIDTH)
    store_sums(bias_sums, score_sums, target + heads * head_dim, v, dv, inside, keep, WIDTH)


@attention_kernel
def flash_backward(
    qkv,
    out,
    dout,
    logsumexp,
    delta,
    dqkv,
    bias_sums,
    score_sums,
    width,
    tokens,
    queries,
    heads,
    stride_qkv,
    stride_out,
    head_dim,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    LARGEST: tl.constexpr,
    BODY: tl.constexpr,
):
    """One of the two passes: BODY is `queries_body`, which writes dq and delta, or `keys_body`, for dk and dv.

    delta has the shape of logsumexp. bias_sums and score_sums are (images * blocks, 3, heads, head_dim) float32, or
    None; each pass writes its own thirds.
    """
    keep = read_width(width, head_dim)
    for bits in tl.static_range(4, 8):  # 16, 32, 64 and 128 coordinates
        if (1 << bits) <= LARGEST:  # noqa: SIM102  (known at compile time)
            if (keep <= (1 << bits)) & (keep > ((1 << bits) // 2 if bits > 4 else 0)):
                BODY(
                    qkv, out, dout, logsumexp, delta, dqkv, bias_sums, score_sums, keep, tokens, queries,
                    heads, stride_qkv, stride_out, head_dim, scale, BLOCK_M, BLOCK_N, PRECISION, 1 << bits,
                )  # fmt: skip


# Launches ------------------------------------------------------------------------------------------


def differentiate_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    logsumexp: torch.Tensor,
    width: torch.Tensor,
    head_dim: int,
    scale: float,
    *,
    bias: bool,
    scores: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient at qkv, packed like qkv; `out` and `logsumexp` are what `attend` wrote in the forward pass.

    It is zeros for q of tokens that are no queries.

    Returns:
        dqkv; and its sums over blocks of tokens, (images * blocks, parts, 3 H head_dim) float32, uninitialised past
        each head's width, or None: if `bias`, a part with the sums of dqkv; if `scores`, one with those of
        |qkv * dqkv|.
    """
    images, heads, queries = logsumexp.shape
    tokens = qkv.shape[0] // images
    blocks = backward_blocks(qkv.dtype, head_dim, device_of(qkv))
    count = triton.cdiv(tokens, blocks.rows)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(logsumexp)
    terms = qkv.new_empty((bias + scores, images * count, 3 * heads * head_dim), dtype=torch.float32)
    bias_sums, score_sums = terms[0] if bias else None, terms[-1] if scores else None
    arguments: dict[str, Any] = {
        "qkv": qkv,
        "out": out,
        "dout": dout,
        "logsumexp": logsumexp,
        "delta": delta,
        "dqkv": dqkv,
    }
    arguments |= {"bias_sums": bias_sums, "score_sums": score_sums, "width": width}
    arguments |= {"tokens": tokens, "queries": queries, "heads": heads}
    arguments |= {"stride_qkv": qkv.stride(0), "stride_out": out.stride(0)}
    arguments |= {"head_dim": head_dim, "scale": float(scale), "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns}
    arguments |= {"PRECISION": precision(), "LARGEST": largest_tile(head_dim)}
    for body in (queries_body, keys_body):
        launch(
            flash_backward,
            (count * images * heads,),
            {**arguments, "BODY": body},
            **blocks.settings(),
        )
    return dqkv, terms.transpose(0, 1) if bias or scores else None
