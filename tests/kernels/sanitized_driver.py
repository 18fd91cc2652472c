"""Runs the CPU kernels of a library over operation, dtype and layout: `python sanitized_driver.py LIBRARY`.

Inputs are cut to exactly the memory they need, so a sanitizer sees the first byte that is read or written beyond it.
Results are compared with float64. test_sanitizers.py starts it; nothing of `skd_kernels` is imported.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from tolerances import kernel_tolerance, statistics_tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    (1, 1, 1),
    (1, 2, 64),
    (5, 3, 7),
    (129, 1, 13),
    (130, 2, 24),
    (257, 3, 64),
    (1100, 7, 40),
    (0, 2, 8),
    (64, 2, 128),
)


def layouts(exact: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of (T, G, D) with unit stride along D whose last element is the last one of its memory."""
    tokens, groups, _ = exact.shape
    yield "contiguous", exact.clone()
    yield "unaligned", torch.cat([exact.reshape(-1)[:1], exact.reshape(-1)])[1:].reshape(exact.shape)
    yield "sliced", torch.cat([exact.new_zeros(tokens, groups, 3), exact], -1)[..., 3:]
    yield "transposed", exact.transpose(0, 1).contiguous().transpose(0, 1)
    yield "zero stride", exact[:1].clone().expand(exact.shape)


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    if not (found - expected).norm() <= tolerance * expected.norm() + 1e-12:
        raise SystemExit(f"{what}: off by {(found - expected).norm() / expected.norm():.1e}")


def check_exactly(count: torch.Tensor, about: torch.Tensor, tokens: int, shift: torch.Tensor, what: str) -> None:
    if count.item() != tokens or not torch.equal(about, shift):
        raise SystemExit(f"{what}: another count or shift")


def run(x: torch.Tensor, grad: torch.Tensor, what: str) -> None:
    tolerance, of_products = (
        statistics_tolerance("compiled", x.dtype, products=products, alike="zero stride" in what)
        for products in (False, True)
    )
    y, g = x.double(), grad.double()
    shift = torch.full(y.shape[1:], 0.5, dtype=torch.float64)
    weight = (y * g).abs().sum(-1) / y.shape[-1]

    def sums(shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        about = y - shift
        outer = torch.einsum("tg,tgi,tgj->gij", weight, about, about)
        return weight.sum(0), about.sum(0), (weight[..., None] * about).sum(0), outer

    count, about, *found = torch.ops.skd_kernels.token_moments(x, grad, shift)
    check_exactly(count, about, len(x), shift, f"token_moments, {what}")
    for a, b in zip(found, sums(shift), strict=True):
        check(a, b, of_products if a.ndim == 3 else tolerance, f"token_moments, {what}")
    count, mean, *_, outer = torch.ops.skd_kernels.centred_moments(x, grad)
    check_exactly(count, mean, len(x), mean, f"centred_moments, {what}")
    about, like = sums(mean)[-1], sums(torch.zeros_like(shift))[-1]  # what cancels is as large as what it leaves
    check(outer + like, about + like, of_products, f"centred_moments, {what}")
    product = (x[:, 0].double() * grad[:, 0].double()).abs()
    for power in (1, 2):
        scores = torch.ops.skd_kernels.taylor_scores(x[:, 0], grad[:, 0], power)
        check(scores, (product**power).sum(0), tolerance, f"taylor_scores {power}, {what}")


def run_attention(batch: int, tokens: int, heads: int, dims: int, generator: torch.Generator) -> None:
    """There and back."""
    qkv = torch.randn(batch, tokens, 3, heads, dims, generator=generator)
    grad = torch.randn(batch, tokens, heads, dims, generator=generator)
    exact, rounded = attend(qkv.double(), grad.double()), attend(qkv, grad)
    out, sums = torch.ops.skd_kernels.attention(qkv, dims**-0.5)
    back = torch.ops.skd_kernels.attention_backward(grad, qkv, out, sums, dims**-0.5)
    for name, found, expected, pytorch in zip(("there", "back"), (out, back), exact, rounded, strict=True):
        error = float((pytorch - expected).norm() / expected.norm().clamp(min=1e-30))
        rows = batch * heads * tokens  # each is rounded in its own way
        check(found, expected, kernel_tolerance(error, torch.float32, rows), f"attention {name}, {tuple(qkv.shape)}")


def attend(qkv: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's attention and its gradient."""
    qkv = qkv.clone().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def main(library: str) -> None:
    torch.ops.load_library(library)
    generator = torch.Generator().manual_seed(0)
    cases = 0
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        draw = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        for (layout, x), (other, grad) in itertools.product(*(tuple(layouts(tensor)) for tensor in draw)):
            run(x, grad, f"{dtype} {shape} {layout}, {other}")
            cases += 1
    for sizes in itertools.product((1, 2), (2, 64, 65, 197), (1, 3), (1, 8, 13, 40, 64, 100)):
        run_attention(*sizes, generator)
        cases += 1
    print(f"ok: {cases} cases")


if __name__ == "__main__":
    main(sys.argv[1])
