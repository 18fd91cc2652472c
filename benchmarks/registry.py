"""What is measured: every operation of skd_kernels, with its shapes, inputs, bytes, FLOPs and contenders.

A new operation is one entry of `OPERATIONS`, with a function for its inputs, one for its work, and one for each other
way to compute it. `benchmarks.op` and the tests find it here, and the suite of pytest does if it is a statistic or a
masked layer. The contenders, against which ours are timed:

    eager           whole tensors; a statistic is computed in the input's dtype, with sums in float32 or float64
    blocked         a statistic in blocks of tokens that stay in the cache of a CPU, the fastest PyTorch found there
    slices          a masked layer in good plain PyTorch: leading rows and columns of the weights, library attention
    published       the method of the published implementation, with the same result to rounding: a statistic clones
                    features and centres copies in a Python loop over q, k, v and heads; a masked layer gathers its
                    weights by boolean masks
    torch.compile   the first of these that the operation has, compiled (`op.Compiled`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import skd_kernels

Tensor = torch.Tensor
Shape = tuple[int, ...]
Inputs = tuple[Tensor, ...]
Way = Callable[..., Tensor | Inputs]
Draw = Callable[..., Tensor]
Arguments = dict[str, int | float]

EAGER, BLOCKED, SLICES, PUBLISHED, COMPILED = "eager", "blocked", "slices", "published", "torch.compile"
BLOCK_TOKENS = 256  # of the covariance: 64 to 512 are within 20 %
BLOCK_ELEMENTS = 128 * 1024  # of the scores: they fit the second-level cache with their gradients

TOKENS = 197  # of one 224-pixel image in patches of 16, and the class token
HEADS = {"tiny": 3, "small": 6, "base": 12}  # of DeiT, each of width 64
HEAD_WIDTH = 64
EPS = 1e-6  # of the norms of DeiT

# Largest error of a contender that computes in its input's dtype. Of a statistic relative to the largest entry: a
# product rounded to bfloat16 is off by 2^-9, and so is a result; sums of thousands of them average it out. Of a layer
# by the Frobenius norm, over outputs and gradients.
STATISTIC_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
LAYER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NORM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Work:
    """The least work of an operation: every input is read once, and every output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Operation:
    """One operation."""

    name: str  # of the function in `skd_kernels`
    axes: str  # the last one of a masked layer is the width
    layer: Callable[[int, int, int, float], Shape]  # shape from (heads, images, tokens, share of the width)
    inputs: Callable[[Shape, torch.dtype, torch.dtype, Draw], Inputs]  # the second dtype is of what is stored
    work: Callable[[Shape, torch.dtype, bool], Work]  # of any contender; the bool includes the backward pass
    ours: Way  # takes the inputs and `arguments`, as do all `ways`
    ways: dict[str, Way]  # the other contenders by name; torch.compile is made of the first
    tolerance: dict[torch.dtype, float]  # largest error of a contender by dtype
    arguments: Callable[[Shape], Arguments] = field(default=lambda shape: {})  # beside the inputs
    scores: Callable[[Shape], Shape] | None = None  # the shape of the Taylor scores that it can add up
    outputs: int = 1  # how many it has; each is like the input in its place
    trains: bool = True  # it has a backward pass; the others are statistics of (x, grad)
    dynamic: bool = False  # torch.compile compiles it for any width

    def shape(self, model: str, images: int, share: float = 1.0, tokens: int = TOKENS) -> Shape:
        """Where a DeiT of that size calls the operation, at a share of the full width."""
        return self.layer(HEADS[model], images, tokens, share)

    @property
    def plain(self) -> Way:
        """The plain PyTorch contender, which is the first of the other ways."""
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


# Other ways to compute a statistic ------------------------------------------------------------------


def sums_in(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float32, or that of x if it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


# Weighted covariance of (T, G, D), from the token moments: sum over tokens of w (x - mean)(x - mean)^T with
# w = mean_d |x grad|; (G, D, D).


def covariance_eager(x: Tensor, grad: Tensor) -> Tensor:
    weight = (x * grad).abs_().mean(-1, keepdim=True, dtype=sums_in(x))
    mean = x.mean(0, dtype=sums_in(x)).to(x.dtype)
    scaled = ((x - mean) * weight.sqrt().to(x.dtype)).transpose(0, 1)
    return scaled.mT @ scaled


def covariance_blocked(x: Tensor, grad: Tensor) -> Tensor:
    _, groups, dims = x.shape
    mean = x.mean(0, dtype=sums_in(x))
    total = mean.new_zeros(groups, dims, dims)
    for part, part_grad in zip(x.split(BLOCK_TOKENS), grad.split(BLOCK_TOKENS), strict=True):
        part = part.to(mean.dtype)
        weight = (part * part_grad).abs_().mean(-1, keepdim=True)
        scaled = (part - mean).mul_(weight.sqrt_()).transpose(0, 1)
        total.baddbmm_(scaled.mT, scaled)
    return total


def covariance_published(x: Tensor, grad: Tensor) -> Tensor:
    feature, gradient = x.clone(), grad.clone()
    covariances = []
    for group in range(x.shape[1]):
        head, head_grad = feature[:, group], gradient[:, group]
        weight = (head * head_grad).abs().mean(-1, keepdim=True)
        centred = head - head.mean(0, keepdim=True)
        covariances.append((weight * centred).T @ centred)
    return torch.stack(covariances)


# Taylor scores of (T, D): sum over tokens of |x grad|; (D,).


def scores_eager(x: Tensor, grad: Tensor) -> Tensor:
    return (x * grad).abs().sum(0, dtype=sums_in(x))


def scores_blocked(x: Tensor, grad: Tensor) -> Tensor:
    tokens = max(1, BLOCK_ELEMENTS // x.shape[1])
    total = torch.zeros(x.shape[1], dtype=sums_in(x), device=x.device)
    for part, part_grad in zip(x.split(tokens), grad.split(tokens), strict=True):
        total += (part * part_grad).abs_().sum(0, dtype=total.dtype)
    return total


def scores_published(x: Tensor, grad: Tensor) -> Tensor:
    feature, gradient = x.clone(), grad.clone()
    return (feature * gradient).abs().sum(0)


# Other ways to compute a masked layer, with the arguments of ours ------------------------------------


def mlp_slices(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, width: int) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1[:width], b1[:width])), w2[:, :width], b2)


def attention_slices(
    x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_proj: Tensor, b_proj: Tensor, width: int, num_heads: int
) -> Tensor:
    images, tokens, channels = x.shape
    head_dim = w_proj.shape[1] // num_heads
    rows = w_qkv.view(3, num_heads, head_dim, channels)[:, :, :width].reshape(-1, channels)
    bias = b_qkv.view(3, num_heads, head_dim)[:, :, :width].reshape(-1)
    q, k, v = F.linear(x, rows, bias).view(images, tokens, 3, num_heads, width).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    columns = w_proj.view(channels, num_heads, head_dim)[:, :, :width].reshape(channels, -1)
    return F.linear(out.transpose(1, 2).reshape(images, tokens, -1), columns, b_proj)


# Boolean masks, made on the host for every call and copied to the device, gather the kept rows and columns of the
# weights. Softmax attention is written out.


def mlp_published(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, width: int) -> Tensor:
    mask = torch.zeros(len(b1), dtype=torch.bool)
    mask[:width] = True
    mask = mask.to(x.device)
    return F.linear(F.gelu(F.linear(x, w1[mask], b1[mask])), w2[:, mask], b2)


def attention_published(
    x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_proj: Tensor, b_proj: Tensor, width: int, num_heads: int
) -> Tensor:
    images, tokens, _ = x.shape
    head_dim = w_proj.shape[1] // num_heads
    mask = torch.zeros(num_heads, head_dim, dtype=torch.bool)
    mask[:, :width] = True
    mask = mask.flatten().to(x.device)
    rows = mask.repeat(3)
    qkv = F.linear(x, w_qkv[rows], b_qkv[rows]).reshape(images, tokens, 3, num_heads, width)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q * head_dim**-0.5) @ k.transpose(-2, -1)
    out = attention.softmax(dim=-1) @ v
    return F.linear(out.transpose(1, 2).reshape(images, tokens, -1), w_proj[:, mask], b_proj)


def norm_eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, ``F.layer_norm`` and the conversion for the next linear layer, as PyTorch's own kernels."""
    total = x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(branch.dtype)


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
            ways={EAGER: covariance_eager, BLOCKED: covariance_blocked, PUBLISHED: covariance_published},
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
            ways={EAGER: scores_eager, BLOCKED: scores_blocked, PUBLISHED: scores_published},
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
            ways={SLICES: mlp_slices, PUBLISHED: mlp_published},
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
            ways={SLICES: attention_slices, PUBLISHED: attention_published},
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
            ways={EAGER: norm_eager},
            tolerance=NORM_TOLERANCE,
            arguments=lambda shape: {"eps": EPS},
            outputs=2,
        ),
    )
}
STATISTICS = [name for name, operation in OPERATIONS.items() if not operation.trains]
LAYERS = [name for name, operation in OPERATIONS.items() if operation.trains]
MASKED = [name for name in LAYERS if OPERATIONS[name].scores is not None]
