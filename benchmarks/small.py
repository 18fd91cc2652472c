"""Small runs of the Triton kernels, checked against the reference: what compute-sanitizer can watch in a minute.

compute-sanitizer --tool racecheck python -m benchmarks.small masked_attention --sizes aligned --dtype bfloat16
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

import skd_kernels
from benchmarks.masked import MASKED
from benchmarks.sizes import DEVICE


@dataclass(frozen=True)
class Sizes:
    """Of the inputs of both operations; the masked width is of the hidden features, or of each head."""

    images: int
    tokens: int
    heads: int
    head_dim: int
    hidden: int
    gated: bool = False

    def full(self, name: str) -> int:
        return self.hidden if name == "masked_mlp" else self.head_dim

    def inputs(self, name: str) -> list[tuple[int, ...]]:
        """Shapes of x and the parameters."""
        channels = self.heads * self.head_dim
        if name == "masked_attention":
            parameters = [(3 * channels, channels), (3 * channels,), (channels, channels), (channels,)]
        else:
            rows = 2 * self.hidden if self.gated else self.hidden
            parameters = [(rows, channels), (rows,), (channels, self.hidden), (channels,)]
        return [(self.images, self.tokens, channels), *parameters]

    def scores(self, name: str) -> tuple[int, ...]:
        return (self.hidden,) if name == "masked_mlp" else (3, self.heads, self.head_dim)

    def arguments(self, name: str) -> dict[str, Any]:
        return {"gated": self.gated} if name == "masked_mlp" else {"num_heads": self.heads}


SIZES = {
    # Every kernel has a last, incomplete tile; 16 does not divide C = 72: half precision takes its small tiles.
    "odd": Sizes(2, 37, 3, 24, 200),
    # C = 256 and F = 256: in half precision the products compile to the very kernels of DeiT-Base, which on an H100
    # have tiles of 128 x 64 to 128 x 256. float32 keeps its small tiles.
    "aligned": Sizes(16, 36, 4, 64, 256),
    "gated": Sizes(16, 36, 4, 64, 256, gated=True),
}
DTYPES = ("float32", "float16", "bfloat16")
# What tells something of its own: in float32 "aligned" has the tiles of "odd".
CASES = [
    (operation, sizes, dtype)
    for operation in MASKED
    for sizes in SIZES
    for dtype in DTYPES
    if (operation, sizes) != ("masked_attention", "gated") and (sizes, dtype) != ("aligned", "float32")
]


def largest_error(name: str, sizes: Sizes, dtype: torch.dtype, device: str, width: int) -> float:
    """Relative (Frobenius norm) over output, gradients and scores, against float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)
        for shape in sizes.inputs(name)
    ]
    results = []
    for implementation, precision in (("triton", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(precision).requires_grad_() for tensor in drawn]
        scores = torch.zeros(sizes.scores(name), device=device)
        count = torch.tensor(width, dtype=torch.int32, device=device)
        with skd_kernels.use(implementation):
            out = MASKED[name].ours(*leaves, count, scores=scores, **sizes.arguments(name))
        results.append([out.detach(), scores, *torch.autograd.grad(out, leaves, drawn[0].to(precision))])
    pairs = zip(*results, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description="Small, checked kernel runs.")
    parser.add_argument("operation", choices=MASKED)
    parser.add_argument("--sizes", choices=SIZES, default="odd", help="gated is of masked_mlp")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default=DEVICE)
    args = parser.parse_args(arguments)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    limit = 1e-4 if args.dtype == "float32" else 5e-2
    sizes = SIZES[args.sizes]
    full = sizes.full(args.operation)
    for width in (0, 8, full // 2 + 1, full):
        error = largest_error(args.operation, sizes, getattr(torch, args.dtype), args.device, width)
        print(f"{args.operation} {args.dtype} {args.sizes} width {width}: {error:.1e}")
        if not error <= limit:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
