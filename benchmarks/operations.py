"""The two operations as benchmarks: shapes, inputs, bytes and FLOPs, and the contenders of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import contenders
from benchmarks.contenders import Contender
from benchmarks.sizes import BACKEND

TOKENS = 197  # of one 224-pixel image in patches of 16, and the class token
HEADS = {"tiny": 3, "small": 6, "base": 12}  # of DeiT, each of width 64
HEAD_WIDTH = 64
COMPILED = "torch.compile"

Shape = tuple[int, ...]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """The least an operation has to do: every input read once, every output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Operation:
    """One operation: `axes` names its shape, `work` is THE count of bytes and FLOPs, whoever computes it."""

    name: str
    axes: str
    work: Callable[[Shape, torch.dtype], Work]
    layer: Callable[[int], Shape]  # number of heads of a DeiT -> shape without tokens
    eager: Contender
    blocked: Contender
    published: Contender
    ours: Callable[[torch.Tensor], Contender]  # from the first input

    def shape(self, model: str, batch: int) -> Shape:
        """Where a DeiT of that size calls the operation."""
        return (batch * TOKENS, *self.layer(HEADS[model]))

    def contenders(self, first: torch.Tensor, names: list[str] | None = None) -> dict[str, Contender]:
        """All of them, ours first, or those named. Blocks are for the caches of a CPU."""
        found = {
            "ours": self.ours(first),
            "eager": self.eager,
            "blocked": self.blocked,
            COMPILED: torch.compile(self.eager, dynamic=False, backend=BACKEND),
            "published": self.published,
        }
        if names is None:
            names = [name for name in found if name != "blocked" or not first.is_cuda]
        unknown = set(names) - set(found)
        if unknown:
            raise ValueError(f"contenders has {sorted(unknown)}; it may have {list(found)}")
        return {name: found[name] for name in names}


def moments_work(shape: Shape, dtype: torch.dtype) -> Work:
    """x and grad in, the shift and four float64 sums out; the outer products once per symmetric pair."""
    tokens, groups, dims = shape
    sums = groups * (1 + 2 * dims + dims * dims)
    # Per element: |x grad| and its sum, shift, plain sum, weighted sum, sqrt(w) y: 7 FLOPs.
    flops = tokens * groups * (7 * dims + dims * (dims + 1))
    return Work(2 * math.prod(shape) * dtype.itemsize + 8 * (groups * dims + sums), flops)


def scores_work(shape: Shape, dtype: torch.dtype) -> Work:
    """x and grad in, one float64 sum per coordinate out; a product and an addition per element."""
    return Work(2 * math.prod(shape) * dtype.itemsize + 8 * shape[-1], 2 * math.prod(shape))


OPERATIONS = {
    "token_moments": Operation(
        name="token_moments",
        axes="T,G,D",
        work=moments_work,
        layer=lambda heads: (3 * heads, HEAD_WIDTH),  # q, k and v of every head
        eager=contenders.covariance_eager,
        blocked=contenders.covariance_blocked,
        published=contenders.covariance_published,
        ours=contenders.covariance_ours,
    ),
    "taylor_scores": Operation(
        name="taylor_scores",
        axes="T,D",
        work=scores_work,
        layer=lambda heads: (4 * heads * HEAD_WIDTH,),  # the hidden neurons of the MLP
        eager=contenders.scores_eager,
        blocked=contenders.scores_blocked,
        published=contenders.scores_published,
        ours=contenders.scores_ours,
    ),
}


def inputs(shape: Shape, dtype: torch.dtype, device: str, total_bytes: int = 256 << 20) -> list[Pair]:
    """Pairs (x, grad) to be used in turn: together larger than any cache. Equal values, own memory."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(shape: Shape) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    pair = (randn(shape) + 0.5 * randn(shape[1:])).to(dtype), (1e-2 * randn(shape)).to(dtype)
    copies = total_bytes // max(1, 2 * pair[0].nbytes)
    return [pair, *((pair[0].clone(), pair[1].clone()) for _ in range(min(max(copies, 2), 32) - 1))]
