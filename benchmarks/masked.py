"""masked_mlp and masked_attention as benchmarks: shapes, inputs, bytes and FLOPs, and the contenders.

published       boolean masks gather the kept weights, attention is written out
slices          leading rows and columns of the weights, library attention
torch.compile   `slices`, compiled for any width
ours            `skd_kernels`: by slices on a CPU, by Triton with the width on the device on a GPU
auto            on a GPU, `skd_kernels` with the width on the host: what it chooses by itself, as ours on a CPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import skd_kernels
from benchmarks import published, sliced
from benchmarks.compiled import Compiled
from benchmarks.operations import COMPILED, HEAD_WIDTH, HEADS, TOKENS, Work

Layer = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Masked:
    """One masked operation of a DeiT; `work` is THE count of bytes and FLOPs, whoever computes it.

    Attributes:
        full: its full width, from the number of heads.
        parameters: their shapes, from the number of heads.
        scores: the shape of its scores, from the number of heads.
    """

    name: str
    full: Callable[[int], int]
    parameters: Callable[[int], Sequence[tuple[int, ...]]]
    scores: Callable[[int], tuple[int, ...]]
    work: Callable[[int, int, int, torch.dtype, bool], Work]
    published: Layer
    slices: Layer
    ours: Layer

    def arguments(self, heads: int) -> dict[str, int]:
        return {"num_heads": heads} if self.name == "masked_attention" else {}


def mlp_work(tokens: int, heads: int, width: int, dtype: torch.dtype, backward: bool) -> Work:
    """x and the kept weights in, y out; backward: dy, x, weights, h and z in, dx and weight gradients out.

    Activations are of `dtype`, h and z are written by the forward where there is a backward. FLOPs of the products.
    """
    channels = heads * HEAD_WIDTH
    streams, hidden, weights = tokens * channels, tokens * width, 2 * channels * width
    flops = 4 * tokens * channels * width
    elements = 2 * streams + weights
    if backward:
        elements += 2 * hidden + 3 * streams + 2 * weights + 2 * hidden
        flops *= 3
    return Work(elements * dtype.itemsize, flops)


def attention_work(tokens: int, heads: int, width: int, dtype: torch.dtype, backward: bool) -> Work:
    """As `mlp_work`; kept for the backward are q, k, v and the heads' output. FLOPs of all products, none twice."""
    channels, inner = heads * HEAD_WIDTH, heads * width
    streams, kept, weights = tokens * channels, 4 * tokens * inner, 4 * channels * inner
    flops = 2 * tokens * weights + 4 * tokens * TOKENS * inner
    elements = 2 * streams + weights
    if backward:
        elements += 2 * kept + 3 * streams + 2 * weights
        flops = 3 * 2 * tokens * weights + 3 * 4 * tokens * TOKENS * inner
    return Work(elements * dtype.itemsize, flops)


def _mlp_shapes(heads: int) -> list[tuple[int, ...]]:
    channels, hidden = heads * HEAD_WIDTH, 4 * heads * HEAD_WIDTH
    return [(hidden, channels), (hidden,), (channels, hidden), (channels,)]


def _attention_shapes(heads: int) -> list[tuple[int, ...]]:
    channels = heads * HEAD_WIDTH
    return [(3 * channels, channels), (3 * channels,), (channels, channels), (channels,)]


MASKED = {
    "masked_mlp": Masked(
        "masked_mlp",
        full=lambda heads: 4 * heads * HEAD_WIDTH,
        parameters=_mlp_shapes,
        scores=lambda heads: (4 * heads * HEAD_WIDTH,),
        work=mlp_work,
        published=published.masked_mlp,
        slices=sliced.masked_mlp,
        ours=skd_kernels.masked_mlp,
    ),
    "masked_attention": Masked(
        "masked_attention",
        full=lambda heads: HEAD_WIDTH,
        parameters=_attention_shapes,
        scores=lambda heads: (3, heads, HEAD_WIDTH),
        work=attention_work,
        published=published.masked_attention,
        slices=sliced.masked_attention,
        ours=skd_kernels.masked_attention,
    ),
}


class Case:
    """One operation of one DeiT: inputs, contenders and what they are checked against.

    On a GPU parameters are float32 and every contender runs under autocast to `dtype`, as training does.
    """

    def __init__(self, name: str, model: str, batch: int, device: str, dtype: torch.dtype) -> None:
        self.operation, self.heads, self.batch = MASKED[name], HEADS[model], batch
        self.device, self.dtype = device, dtype
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(size, generator=generator) * scale).to(device)

        channels = self.heads * HEAD_WIDTH
        stored = torch.float32 if self.autocast else dtype
        shapes = self.operation.parameters(self.heads)
        self.x = randn(batch, TOKENS, channels).to(dtype).requires_grad_()
        self.parameters = [randn(*shape, scale=shape[-1] ** -0.5).to(stored).requires_grad_() for shape in shapes]
        self.dy = randn(batch, TOKENS, channels).to(dtype)
        self.scores = torch.zeros(self.operation.scores(self.heads), device=device)
        self.compiled = Compiled(self.operation.slices)
        self.arguments = self.operation.arguments(self.heads)

    @property
    def autocast(self) -> bool:
        return self.device == "cuda" and self.dtype != torch.float32

    def width(self, fraction: float) -> int:
        return int(self.operation.full(self.heads) * fraction)

    def work(self, width: int, backward: bool) -> Work:
        return self.operation.work(self.batch * TOKENS, self.heads, width, self.dtype, backward)

    def layers(self, width: int) -> dict[str, Callable[[], torch.Tensor]]:
        """A forward pass of each contender, ours first; `ours, scores` also adds up Taylor scores."""
        inputs, names = (self.x, *self.parameters), self.arguments
        on_gpu = self.device == "cuda"
        own: Any = torch.tensor(width, dtype=torch.int32, device=self.device) if on_gpu else width
        operation = self.operation
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda: operation.ours(*inputs, own, **names),
            "slices": lambda: operation.slices(*inputs, width, **names),
            COMPILED: lambda: self.compiled(*inputs, width, **names),
            "published": lambda: operation.published(*inputs, width, **names),
            "ours, scores": lambda: operation.ours(*inputs, own, scores=self.scores, **names),
        }
        if on_gpu:
            calls["auto"] = lambda: operation.ours(*inputs, width, **names)
        return {name: (lambda call=call: self._cast(call)) for name, call in calls.items()}  # type: ignore[misc]

    def _cast(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        context: AbstractContextManager[Any] = nullcontext()
        if self.autocast:
            context = torch.autocast("cuda", self.dtype, cache_enabled=False)
        with context:
            return call()

    def gradients(self, layer: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Output, and gradients of x and of all parameters."""
        out = layer()
        return out.detach(), *torch.autograd.grad(out, (self.x, *self.parameters), self.dy)

    def exact(self, width: int) -> list[torch.Tensor]:
        """The same by the reference in float64."""
        leaves = [tensor.detach().double().requires_grad_() for tensor in (self.x, *self.parameters)]
        with skd_kernels.use("reference"):
            out = self.operation.ours(*leaves, width, **self.arguments)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dy.double())]

    def check(self, width: int, tolerance: float) -> dict[str, float]:
        """Each contender's largest relative error (Frobenius norm) over output and gradients.

        Raises:
            RuntimeError: one is above `tolerance`.
        """
        exact, errors = self.exact(width), {}
        for name, layer in self.layers(width).items():
            pairs = zip(self.gradients(layer), exact, strict=True)
            errors[name] = max(float((found.double() - want).norm() / want.norm()) for found, want in pairs)
            if not errors[name] <= tolerance:
                raise RuntimeError(f"{self.operation.name} at width {width}: {name} is off by {errors[name]:.1e}")
        return errors
