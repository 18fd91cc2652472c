"""residual_norm as a benchmark: bytes, and the contenders. On a GPU under autocast to bfloat16, as in training.

eager           the sum, ``F.layer_norm`` and the conversion for the next linear layer, as PyTorch's own kernels
torch.compile   the same, compiled
ours            `skd_kernels`, by Triton
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import skd_kernels
from benchmarks.operations import COMPILED
from benchmarks.sizes import BACKEND, GPU, REHEARSAL

EPS = 1e-6
Norm = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def norm_bytes(elements: int, dtype: torch.dtype, *, backward: bool) -> int:
    """x and the branch in, the sum and the normalised output out; backward: the gradients at both outputs and the sum
    in, those of x and of the branch out. The stream is float32, the others are of `dtype`.
    """
    streams, others = (2 + 3, 2 + 2) if backward else (2, 2)
    return elements * (4 * streams + dtype.itemsize * others)


def eager(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS).to(branch.dtype)


def ours(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with skd_kernels.use("triton"):
        return skd_kernels.residual_norm(x, branch, weight, bias, eps=EPS)


def contenders() -> dict[str, Norm]:
    """Ours first. Compiling for a CPU takes longer than all else, and says nothing of a GPU."""
    found: dict[str, Norm] = {"ours": ours, "eager": eager}
    if GPU or REHEARSAL:
        found[COMPILED] = torch.compile(eager, dynamic=False, backend=BACKEND)
    return found


class Case:
    """Inputs of one norm between two layers, and the passes of each contender."""

    def __init__(self, shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)
        self.leaves = [randn(*shape), randn(*shape, dtype=dtype), randn(shape[-1]), randn(shape[-1])]
        self.leaves = [leaf.requires_grad_() for leaf in self.leaves]
        self.grads = randn(*shape), randn(*shape, dtype=dtype)

    def forward(self, norm: Norm) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), self.autocast:
            return norm(*self.leaves)

    def both(self, norm: Norm) -> tuple[torch.Tensor, ...]:
        """Outputs, and the gradients of x, the branch, weight and bias."""
        with self.autocast:
            out = norm(*self.leaves)
        return *(value.detach() for value in out), *torch.autograd.grad(out, self.leaves, self.grads)

    def check(self, norms: dict[str, Norm], tolerance: float) -> None:
        """RuntimeError where a contender is off by more (Frobenius norm), against float64."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        with skd_kernels.use("reference"):
            out = skd_kernels.residual_norm(*leaves, eps=EPS)
        exact = (
            *(value.detach() for value in out),
            *torch.autograd.grad(out, leaves, [grad.double() for grad in self.grads]),
        )
        for name, norm in norms.items():
            for found, want in zip(self.both(norm), exact, strict=True):
                error = float((found.double() - want).norm() / want.norm())
                if not error <= tolerance:
                    raise RuntimeError(f"residual_norm: {name} is off by {error:.1e}")
