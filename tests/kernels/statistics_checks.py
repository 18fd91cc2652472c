"""How the CUDA kernels of the statistics are compared with float64, by emulation on the CPU and on a GPU."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around a mean of 0.5 and small gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, *shape, generator=generator)
    return (x + 0.5).to(dtype), (grad * 1e-3).to(dtype)


def class_tokens_apart(batch: int, groups: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 197 tokens; the first of each is far from the others and has no gradient, thus no weight."""
    x, grad = pair(batch, 197, groups, dims)
    x[:, 0] += 1e4
    grad[:, 0] = 0
    return x.flatten(0, 1), grad.flatten(0, 1)


def exact_moments(x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weight, plain, weighted and outer sums of (T, G, D) in float64."""
    x, grad = x.double(), grad.double()
    weight = (x * grad).abs().mean(-1)
    y = x - shift
    outer = torch.einsum("tg,tgi,tgj->gij", weight, y, y)
    return weight.sum(0), y.sum(0), torch.einsum("tg,tgi->gi", weight, y), outer


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return relative(found - expected, expected)


def relative(difference: torch.Tensor, scale: torch.Tensor) -> float:
    """Of norms; zero where there is no difference."""
    return float(difference.norm() / scale.norm().clamp(min=1e-300))


def check_moments(found: tuple[torch.Tensor, ...], x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor) -> None:
    """Weight, plain, weighted and outer sums about `shift`."""
    weight, plain, weighted, outer = exact_moments(x, grad, shift)
    spread = (x.double() - shift).abs()  # the linear sums cancel: their error is that of the sum of magnitudes
    heavy = torch.einsum("tg,tgi->gi", (x.double() * grad.double()).abs().mean(-1), spread)
    assert error(found[0], weight) < 1e-6
    assert relative(found[1] - plain, spread.sum(0)) < 1e-6
    assert relative(found[2] - weighted, heavy) < 1e-6
    assert error(found[3], outer) < 1e-5
    assert torch.equal(found[3], found[3].mT)


def check_results(
    found: tuple[torch.Tensor, ...], x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None
) -> None:
    """All six of a compiled operation: about the given `shift`, or about the mean."""
    count, about, *sums = found
    assert count.shape == () and float(count) == len(x)
    if shift is None:
        mean = x.double().mean(0)
        assert relative(about - mean, (x.double() - mean).abs().mean(0)) < 1e-6
        assert float(sums[1].abs().max()) <= 1e-10 * float(x.double().abs().sum())
    else:
        assert torch.equal(about, shift) and about.data_ptr() != shift.data_ptr()
    check_moments(tuple(sums), x, grad, about)
