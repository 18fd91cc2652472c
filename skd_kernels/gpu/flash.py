"""FlashAttention on packed heads whose width is read on the device; flash_backward.py has the gradient.

packing.py describes the packed layout. A row of qkv holds one token's 3 H groups; a row of the output, or of its
gradient, holds H groups of one query. The queries are the first tokens of each image, or all. Rows have a fixed
length. These kernels write zeros behind the last group, as far as the products that follow will read. Logits and
probabilities never reach memory (Dao et al., 2022, arXiv 2205.14135): the backward pass recomputes them with the log-
sum-exp of each row of logits, which the forward pass stores.

Tensor cores work on 16, 32, 64 or 128 coordinates of a head. Each kernel contains its body once for each of these
sizes, and branches on the width. Each head has `pitch` columns, its kept coordinates and zeros up to a multiple of 8;
loads are masked beyond them.

Exponentials are base 2: ``exp(scale x) = exp2(scale log2(e) x)``. The configurations compile without spills. In a
sweep on an H100 in bfloat16 at DeiT-Base (benchmarks/results/h100-sweep.json), ten other configurations of the
forward pass were not faster, and ten others of the backward pass were faster by 2 % at most.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from skd_kernels.gpu.buffers import PAD
from skd_kernels.gpu.launch import Device, device_of, launch
from skd_kernels.gpu.tiles import precision, read_width, rounded

# Zeros behind the last head end at a multiple of this number: a multiple of every inner step of the products, which
# therefore read no further, and a divisor of the length of the rows.
STEP: tl.constexpr = tl.constexpr(64)
assert PAD % 64 == 0
# `tiles.width_kernel` for kernels that also take a number of queries: one compiled kernel serves every number.
attention_kernel = triton.jit(do_not_specialize=["queries"], do_not_specialize_on_alignment=["width"])


@dataclass(frozen=True)
class Blocks:
    """A launch configuration: a program owns `rows` tokens and loops over all tokens, `columns` at a time.

    In the forward pass it owns queries and loops over keys. `registers` is the limit of a thread's registers; None
    leaves it to ptxas.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `launch`."""
        return {"num_warps": self.warps, "num_stages": self.stages, "max_registers": self.registers}


def forward_blocks(dtype: torch.dtype, head_dim: int, device: Device) -> Blocks:
    """The configuration of the forward pass: blocks of 64 queries by 32 keys in half precision.

    64 queries are the fewest that wgmma takes with 4 warps. Blocks of 32 keys pad the 197 tokens of a ViT to 224,
    where 64 would pad them to 256. With heads of 64 coordinates a thread needs 94 registers on sm_90, so that five
    programs share a multiprocessor; with 64 keys it would need 164, and three would. float32 runs on CUDA cores,
    whose operands live in registers: blocks are small, and an explicit limit keeps ptxas from aiming at fewer
    registers than the kernel needs, which would spill.
    """
    if dtype == torch.float32:
        return Blocks(32, 32, 4, stages=1, registers=255) if head_dim <= 64 else Blocks(32, 16, 8, 2, registers=255)
    return Blocks(64, 32, warps=4, stages=3)


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def load_tokens(base, first, tokens, stride, pitch, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens first .. first + ROWS of one head at `base`, (ROWS, WIDTH); zeros past the last token and the pitch."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    address = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    return tl.load(address, mask=(row < tokens - first)[:, None] & (column < pitch)[None, :], other=0.0)


@triton.jit
def store_tokens(base, value, first, tokens, stride, pitch, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store what `load_tokens` would load, cast to the type of `base`; rows and columns outside are left out."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    address = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    mask = (row < tokens - first)[:, None] & (column < pitch)[None, :]
    tl.store(address, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_tail(base, size, first, tokens, stride, ROWS: tl.constexpr):
    """Write zeros behind the `size` packed coordinates of tokens first .. first + ROWS, up to a multiple of STEP.

    The products that read these rows next load whole steps.
    """
    zeros = tl.zeros((ROWS, STEP), tl.float32)
    store_tokens(base + size, zeros, first, tokens, stride, tl.cdiv(size, STEP) * STEP - size, ROWS, STEP)


@triton.jit
def owned_block(keep, tokens, heads, ROWS: tl.constexpr):
    """Which tokens, or queries, of which head a program owns, as (pitch, blocks, block, pair, image, head).

    A packed head has `pitch` columns. A sequence has `blocks` blocks of ROWS tokens, and the program owns `block` of
    them. Its head is `head` of `image`, or `pair` if the heads of all images are counted through.
    """
    blocks = tl.cdiv(tokens, ROWS)
    pair = tl.program_id(0) // blocks
    return rounded(keep), blocks, tl.program_id(0) % blocks, pair, (pair // heads).to(tl.int64), pair % heads


@triton.jit
def forward_body(
    qkv,
    out,
    logsumexp,
    keep,
    tokens,
    queries,
    heads,
    stride_qkv,
    stride_out,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pitch, _, block, pair, image, head = owned_block(keep, queries, heads, BLOCK_M)
    first = block * BLOCK_M
    inner = heads * pitch
    query = qkv + image * tokens * stride_qkv + head * pitch
    key = query + inner
    q = load_tokens(query, first, queries, stride_qkv, pitch, BLOCK_M, WIDTH)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    factor = scale * 1.4426950408889634
    for start in range(0, tokens, BLOCK_N):
        k = load_tokens(key, start, tokens, stride_qkv, pitch, BLOCK_N, WIDTH)
        v = load_tokens(key + inner, start, tokens, stride_qkv, pitch, BLOCK_N, WIDTH)
        s = tl.dot(q, k.T, input_precision=PRECISION) * factor
        s = tl.where((tl.arange(0, BLOCK_N) < tokens - start)[None, :], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        mean = tl.dot(p.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
        largest = larger
    store_tokens(
        out + image * queries * stride_out + head * pitch,
        mean / total[:, None],
        first,
        queries,
        stride_out,
        pitch,
        BLOCK_M,
        WIDTH,
    )
    if head == heads - 1:
        store_tail(out + image * queries * stride_out, inner, first, queries, stride_out, BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    tl.store(
        logsumexp + pair.to(tl.int64) * queries + first + row, largest + tl.log2(total), mask=row < queries - first
    )


@attention_kernel
def flash_forward(
    qkv,
    out,
    logsumexp,
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
):
    """out = softmax(scale q k^T) v, packed; logsumexp (images, heads, queries) is float32 and to base 2.

    The loop is unrolled at compile time, and each body is compiled for its number of coordinates; only the one that
    fits the width runs.
    """
    keep = read_width(width, head_dim)
    for bits in tl.static_range(4, 8):  # 16, 32, 64 and 128 coordinates
        if (1 << bits) <= LARGEST:  # noqa: SIM102  (known at compile time)
            if (keep <= (1 << bits)) & (keep > ((1 << bits) // 2 if bits > 4 else 0)):
                forward_body(
                    qkv, out, logsumexp, keep, tokens, queries, heads, stride_qkv, stride_out, scale,
                    BLOCK_M, BLOCK_N, PRECISION, 1 << bits,
                )  # fmt: skip


# Launches ------------------------------------------------------------------------------------------


def largest_tile(head_dim: int) -> int:
    """The number of coordinates that tensor cores work on at full width; bodies for more are not compiled."""
    return max(16, triton.next_power_of_2(head_dim))


def attend(
    qkv: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor, width: torch.Tensor, head_dim: int, scale: float
) -> None:
    """out = softmax(scale q k^T) v of the first tokens of each image, the queries, which see all tokens.

    qkv is packed, of images * tokens rows; so is out, of images * queries rows. logsumexp (images, heads, queries)
    float32 gets the base-2 log-sum-exp of each row of scaled logits. At width 0 neither tensor is written.
    """
    images, heads, queries = logsumexp.shape
    blocks = forward_blocks(qkv.dtype, head_dim, device_of(qkv))
    arguments: dict[str, Any] = {
        "qkv": qkv,
        "out": out,
        "logsumexp": logsumexp,
        "width": width,
        "tokens": qkv.shape[0] // images,
        "queries": queries,
        "heads": heads,
        "stride_qkv": qkv.stride(0),
        "stride_out": out.stride(0),
    }
    arguments |= {"head_dim": head_dim, "scale": float(scale), "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns}
    arguments |= {"PRECISION": precision(), "LARGEST": largest_tile(head_dim)}
    grid = (triton.cdiv(queries, blocks.rows) * images * heads,)
    launch(flash_forward, grid, arguments, **blocks.settings())
