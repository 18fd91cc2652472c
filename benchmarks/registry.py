"""What is measured: every operation of skd_kernels, its shapes, inputs, bytes, FLOPs and contenders.

A new operation is one entry of `OPERATIONS`, with a count of its work, and a function in contenders.py for each other
way to compute it. `benchmarks.op` and the tests find it here, and the suite of pytest where it is a statistic or a
masked layer. quick.py has the questions about single kernels, which operations do not have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import skd_kernels
from benchmarks import contenders
from benchmarks.contenders import BLOCKED, EAGER, PUBLISHED, SLICES

TOKENS = 197  # of one 224-pixel image in patches of 16, and the class token
HEADS = {"tiny": 3, "small": 6, "base": 12}  # of DeiT, each of width 64
HEAD_WIDTH = 64
EPS = 1e-6  # of the norms of DeiT

Shape = tuple[int, ...]
Inputs = tuple[torch.Tensor, ...]
Way = Callable[..., Any]
Draw = Callable[..., torch.Tensor]

# Largest error of a contender that computes in its input's dtype. Of a statistic relative to the largest entry: a
# product rounded to bfloat16 is off by 2^-9, and so is a result; sums of thousands of them average it out. Of a layer
# by the Frobenius norm, over outputs and gradients.
STATISTIC_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
LAYER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NORM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Work:
    """The least an operation has to do: every input read once, every output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: of the function in `skd_kernels`.
        axes: what the numbers of a shape are; the last one of a masked layer is the width.
        layer: the shape at a layer of DeiT, from (heads, images, tokens, share of the full width).
        inputs: tensors from (shape, dtype, dtype of what is stored: parameters and residual stream, `Draw`).
        work: THE count of bytes and FLOPs, whoever computes it, from (shape, dtype, with the backward pass).
        ours: takes the inputs and `arguments`, as do all `ways`.
        ways: the other contenders by name; torch.compile is made of the first.
        tolerance: largest error of a contender by dtype.
        arguments: what the function takes beside the inputs, from the shape. "width" is one of a masked layer's.
        scores: the shape of the Taylor scores that it can add up, from the shape; None if it has none.
        outputs: how many it has; each is like the input in its place.
        trains: it has a backward pass; the others are statistics of (x, grad).
        dynamic: torch.compile compiles it for any width.
    """

    name: str
    axes: str
    layer: Callable[[int, int, int, float], Shape]
    inputs: Callable[[Shape, torch.dtype, torch.dtype, Draw], Inputs]
    work: Callable[[Shape, torch.dtype, bool], Work]
    ours: Way
    ways: dict[str, Way]
    tolerance: dict[torch.dtype, float]
    arguments: Callable[[Shape], dict[str, Any]] = field(default=lambda shape: {})
    scores: Callable[[Shape], Shape] | None = None
    outputs: int = 1
    trains: bool = True
    dynamic: bool = False

    def shape(self, model: str, images: int, share: float = 1.0, tokens: int = TOKENS) -> Shape:
        """Where a DeiT of that size calls the operation, at a share of the full width."""
        return self.layer(HEADS[model], images, tokens, share)

    @property
    def plain(self) -> Way:
        """Good PyTorch, the first of the other ways."""
        return next(iter(self.ways.values()))


# Inputs ---------------------------------------------------------------------------------------------


def statistic_inputs(shape: Shape, dtype: torch.dtype, stored: torch.dtype, draw: Draw) -> Inputs:
    """x, with a mean in every coordinate, and its gradient."""
    x = draw(shape) + 0.5 * draw(shape[1:])
    return x.to(dtype), (1e-2 * draw(shape)).to(dtype)


def mlp_inputs(shape: Shape, dtype: torch.dtype, stored: torch.dtype, draw: Draw) -> Inputs:
    images, tokens, channels, hidden, _ = shape
    parameters = (hidden, channels), (hidden,), (channels, hidden), (channels,)
    return draw((images, tokens, channels)).to(dtype), *_parameters(parameters, stored, draw)


def attention_inputs(shape: Shape, dtype: torch.dtype, stored: torch.dtype, draw: Draw) -> Inputs:
    images, tokens, heads, head_width, _ = shape
    channels = heads * head_width
    parameters = (3 * channels, channels), (3 * channels,), (channels, channels), (channels,)
    return draw((images, tokens, channels)).to(dtype), *_parameters(parameters, stored, draw)


def norm_inputs(shape: Shape, dtype: torch.dtype, stored: torch.dtype, draw: Draw) -> Inputs:
    """The residual stream, the branch, weight and bias."""
    stream, branch = draw(shape).to(stored), draw(shape).to(dtype)
    return stream, branch, draw(shape[-1:]).to(stored), draw(shape[-1:]).to(stored)


def _parameters(shapes: tuple[Shape, ...], stored: torch.dtype, draw: Draw) -> Inputs:
    return tuple((draw(shape) * shape[-1] ** -0.5).to(stored) for shape in shapes)


# Work -----------------------------------------------------------------------------------------------


def moments_work(shape: Shape, dtype: torch.dtype, backward: bool = False) -> Work:
    """x and grad in, the shift and four float64 sums out; the outer products once per symmetric pair."""
    tokens, groups, dims = shape
    sums = groups * (1 + 2 * dims + dims * dims)
    # Per element: |x grad| and its sum, shift, plain sum, weighted sum, sqrt(w) y: 7 FLOPs.
    flops = tokens * groups * (7 * dims + dims * (dims + 1))
    return Work(2 * math.prod(shape) * dtype.itemsize + 8 * (groups * dims + sums), flops)


def scores_work(shape: Shape, dtype: torch.dtype, backward: bool = False) -> Work:
    """x and grad in, one float64 sum per coordinate out; a product and an addition per element."""
    return Work(2 * math.prod(shape) * dtype.itemsize + 8 * shape[-1], 2 * math.prod(shape))


def mlp_work(shape: Shape, dtype: torch.dtype, backward: bool) -> Work:
    """x and the kept weights in, y out; backward: dy, x, weights, h and z in, dx and weight gradients out.

    Activations are of `dtype`, h and z are written by the forward where there is a backward. FLOPs of the products.
    """
    images, tokens, channels, _, width = shape
    rows = images * tokens
    streams, hidden, weights = rows * channels, rows * width, 2 * channels * width
    flops = 4 * rows * channels * width
    elements = 2 * streams + weights
    if backward:
        elements += 2 * hidden + 3 * streams + 2 * weights + 2 * hidden
        flops *= 3
    return Work(elements * dtype.itemsize, flops)


def attention_work(shape: Shape, dtype: torch.dtype, backward: bool) -> Work:
    """As `mlp_work`; kept for the backward are q, k, v and the heads' output. FLOPs of all products, none twice."""
    images, tokens, heads, head_width, width = shape
    rows, channels, inner = images * tokens, heads * head_width, heads * width
    streams, kept, weights = rows * channels, 4 * rows * inner, 4 * channels * inner
    flops = 2 * rows * weights + 4 * rows * tokens * inner
    elements = 2 * streams + weights
    if backward:
        elements += 2 * kept + 3 * streams + 2 * weights
        flops *= 3
    return Work(elements * dtype.itemsize, flops)


def norm_work(shape: Shape, dtype: torch.dtype, backward: bool) -> Work:
    """x and the branch in, the sum and the normalised output out; backward: the gradients at both outputs and the sum
    in, those of x and of the branch out. The stream is float32, the others are of `dtype`.

    An element takes an addition, two sums, a subtraction and two products with an addition: 7 FLOPs, and about twice
    as many in the backward pass.
    """
    streams, others, flops = (2 + 3, 2 + 2, 21) if backward else (2, 2, 7)
    stream = max(4, dtype.itemsize)
    return Work(math.prod(shape) * (stream * streams + dtype.itemsize * others), flops * math.prod(shape))


# The registry ---------------------------------------------------------------------------------------

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            name="token_moments",
            axes="T,G,D",
            layer=lambda heads, images, tokens, share: (images * tokens, 3 * heads, HEAD_WIDTH),  # q, k, v of each
            inputs=statistic_inputs,
            work=moments_work,
            ours=skd_kernels.weighted_covariance,
            ways={
                EAGER: contenders.covariance_eager,
                BLOCKED: contenders.covariance_blocked,
                PUBLISHED: contenders.covariance_published,
            },
            tolerance=STATISTIC_TOLERANCE,
            trains=False,
        ),
        Operation(
            name="taylor_scores",
            axes="T,D",
            layer=lambda heads, images, tokens, share: (images * tokens, 4 * heads * HEAD_WIDTH),  # hidden neurons
            inputs=statistic_inputs,
            work=scores_work,
            ours=skd_kernels.taylor_scores,
            ways={
                EAGER: contenders.scores_eager,
                BLOCKED: contenders.scores_blocked,
                PUBLISHED: contenders.scores_published,
            },
            tolerance=STATISTIC_TOLERANCE,
            trains=False,
        ),
        Operation(
            name="masked_mlp",
            axes="B,N,C,F,WIDTH",
            layer=lambda heads, images, tokens, share: (
                *(images, tokens, heads * HEAD_WIDTH),
                *(4 * heads * HEAD_WIDTH, int(4 * heads * HEAD_WIDTH * share)),
            ),
            inputs=mlp_inputs,
            work=mlp_work,
            ours=skd_kernels.masked_mlp,
            ways={SLICES: contenders.mlp_slices, PUBLISHED: contenders.mlp_published},
            tolerance=LAYER_TOLERANCE,
            arguments=lambda shape: {"width": shape[-1]},
            scores=lambda shape: (shape[3],),
            dynamic=True,
        ),
        Operation(
            name="masked_attention",
            axes="B,N,H,D,WIDTH",
            layer=lambda heads, images, tokens, share: (
                *(images, tokens, heads, HEAD_WIDTH),
                int(HEAD_WIDTH * share),
            ),
            inputs=attention_inputs,
            work=attention_work,
            ours=skd_kernels.masked_attention,
            ways={SLICES: contenders.attention_slices, PUBLISHED: contenders.attention_published},
            tolerance=LAYER_TOLERANCE,
            arguments=lambda shape: {"width": shape[-1], "num_heads": shape[2]},
            scores=lambda shape: (3, shape[2], shape[3]),
            dynamic=True,
        ),
        Operation(
            name="residual_norm",
            axes="B,N,C",
            layer=lambda heads, images, tokens, share: (images, tokens, heads * HEAD_WIDTH),
            inputs=norm_inputs,
            work=norm_work,
            ours=skd_kernels.residual_norm,
            ways={EAGER: contenders.norm_eager},
            tolerance=NORM_TOLERANCE,
            arguments=lambda shape: {"eps": EPS},
            outputs=2,
        ),
    )
}
STATISTICS = [name for name, operation in OPERATIONS.items() if not operation.trains]
LAYERS = [name for name, operation in OPERATIONS.items() if operation.trains]
MASKED = [name for name in LAYERS if OPERATIONS[name].scores is not None]
