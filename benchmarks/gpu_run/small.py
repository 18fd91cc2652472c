"""Small runs of the Triton kernels, checked against the reference: what compute-sanitizer can watch in a minute.

compute-sanitizer --tool racecheck python -m benchmarks.gpu_run.small masked_mlp --sizes aligned --dtype bfloat16
"""

from __future__ import annotations

import argparse

import torch

import skd_kernels
from benchmarks.registry import MASKED, OPERATIONS
from benchmarks.timing import DEVICE

# Shapes by name, the full width in place of the width.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    # Every kernel has a last, incomplete tile; 16 does not divide C = 72: half precision takes its small tiles.
    "odd": {"masked_mlp": (2, 37, 72, 200, 200), "masked_attention": (2, 37, 3, 24, 24)},
    # C = 256 and F = 256: in half precision the products compile to the very kernels of DeiT-Base, which on an H100
    # have tiles of 128 x 64 to 128 x 256. float32 keeps its small tiles.
    "aligned": {"masked_mlp": (16, 36, 256, 256, 256), "masked_attention": (16, 36, 4, 64, 64)},
    "gated": {"masked_mlp": (16, 36, 256, 256, 256)},
}
DTYPES = ("float32", "float16", "bfloat16")
# What tells something of its own: in float32 "aligned" has the tiles of "odd".
CASES = [
    (operation, sizes, dtype)
    for operation in MASKED
    for sizes in SIZES
    for dtype in DTYPES
    if operation in SIZES[sizes] and (sizes, dtype) != ("aligned", "float32")
]


def largest_error(name: str, sizes: str, dtype: torch.dtype, device: str, width: int) -> float:
    """Relative (Frobenius norm) over output, gradients and scores, against float64."""
    operation, shape = OPERATIONS[name], SIZES[sizes][name]
    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    drawn = list(operation.inputs(shape, dtype, dtype, draw))
    named = operation.arguments(shape)
    if sizes == "gated":
        drawn[1:3] = (torch.cat([tensor, tensor.flip(0)]) for tensor in drawn[1:3])
        named["gated"] = True
    named["width"] = torch.tensor(width, dtype=torch.int32, device=device)
    results = []
    assert operation.scores is not None
    for implementation, precision in (("triton", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(precision).requires_grad_() for tensor in drawn]
        scores = torch.zeros(operation.scores(shape), device=device)
        with skd_kernels.use(implementation):
            out = operation.ours(*leaves, scores=scores, **named)
        results.append([out.detach(), scores, *torch.autograd.grad(out, leaves, drawn[0].to(precision))])
    pairs = zip(*results, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run.small", description="Small, checked kernel runs."
    )
    parser.add_argument("operation", choices=MASKED)
    parser.add_argument("--sizes", choices=SIZES, default="odd", help="gated is of masked_mlp")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default=DEVICE)
    args = parser.parse_args(arguments)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    limit = 1e-4 if args.dtype == "float32" else 5e-2
    full = SIZES[args.sizes][args.operation][-1]
    for width in (0, 8, full // 2 + 1, full):
        error = largest_error(args.operation, args.sizes, getattr(torch, args.dtype), args.device, width)
        print(f"{args.operation} {args.dtype} {args.sizes} width {width}: {error:.1e}")
        if not error <= limit:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
