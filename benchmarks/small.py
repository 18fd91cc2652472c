"""Small runs of the Triton kernels, checked against the reference: what compute-sanitizer can watch in a minute.

compute-sanitizer --tool racecheck python -m benchmarks.small masked_attention --dtype bfloat16
"""

from __future__ import annotations

import argparse

import torch

import skd_kernels
from benchmarks.masked import MASKED

TOKENS, HEADS, HEAD_DIM, HIDDEN = 37, 3, 24, 200  # every kernel has a last, incomplete tile


def largest_error(name: str, dtype: torch.dtype, device: str, width: int) -> float:
    """Relative (Frobenius norm) over output, gradients and scores, against float64."""
    channels = HEADS * HEAD_DIM
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(2, TOKENS, channels)]
    if name == "masked_mlp":
        shapes += [(HIDDEN, channels), (HIDDEN,), (channels, HIDDEN), (channels,)]
        score_shape: tuple[int, ...] = (HIDDEN,)
        named = {}
    else:
        shapes += [(3 * channels, channels), (3 * channels,), (channels, channels), (channels,)]
        score_shape, named = (3, HEADS, HEAD_DIM), {"num_heads": HEADS}
    drawn = [(torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype) for shape in shapes]
    results = []
    for implementation, precision in (("triton", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(precision).requires_grad_() for tensor in drawn]
        scores = torch.zeros(score_shape, device=device)
        count = torch.tensor(width, dtype=torch.int32, device=device)
        with skd_kernels.use(implementation):
            out = MASKED[name].ours(*leaves, count, scores=scores, **named)
        results.append([out.detach(), scores, *torch.autograd.grad(out, leaves, drawn[0].to(precision))])
    pairs = zip(*results, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description="Small, checked kernel runs.")
    parser.add_argument("operation", choices=MASKED)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    full = HIDDEN if args.operation == "masked_mlp" else HEAD_DIM
    limit = 1e-4 if args.dtype == "float32" else 5e-2
    for width in (0, 8, full // 2 + 1, full):
        error = largest_error(args.operation, getattr(torch, args.dtype), args.device, width)
        print(f"{args.operation} {args.dtype} width {width}: {error:.1e}")
        if not error <= limit:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
