"""How masked_mlp's kernels are compared with float64, on the CPU by the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from tolerances import kernel_tolerance

import skd_kernels as kernels

NAMES = ("x", "w1", "b1", "w2", "b2")
Inputs = list[torch.Tensor | None]


def make_inputs(
    shape: tuple[int, int, int],
    hidden: int,
    *,
    gated: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Exactly representable in `dtype`, so that every precision computes on the same numbers."""
    channels, rows = shape[-1], 2 * hidden if gated else hidden
    generator = torch.Generator().manual_seed(sum(shape) + hidden)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    x, w1 = randn(*shape), randn(rows, channels, scale=channels**-0.5)
    w2 = randn(channels, hidden, scale=hidden**-0.5)
    biases = (randn(rows, scale=0.5), randn(channels)) if bias else (None, None)
    return [x, w1, biases[0], w2, biases[1]]


def kept_elements(inputs: Inputs, width: int) -> list[torch.Tensor]:
    """For x and each parameter, which elements the width keeps."""
    x, w1, _, w2, _ = inputs
    assert x is not None and w1 is not None and w2 is not None
    keep = torch.arange(w2.shape[1], device=x.device) < width
    rows = keep.repeat(w1.shape[0] // len(keep))
    always = torch.ones_like(x, dtype=torch.bool)
    output = torch.full((w2.shape[0],), width > 0, device=x.device)
    return [always, rows[:, None].expand_as(w1), rows, keep.expand_as(w2), output]


def run(
    name: str, inputs: Inputs, width: Any, dy: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any
) -> list[torch.Tensor]:
    """The output, and the gradients of those inputs that there are."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    with kernels.use(name):
        out = kernels.masked_mlp(*leaves, width, scores=scores, **kwargs)
    out.backward(dy.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[misc]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm; of an expected zero, the norm itself."""
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (norm if norm > 0 else 1))


def check(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    hidden: int,
    width: int,
    *,
    gated: bool = False,
    bias: bool = True,
    device: str = "cpu",
    **kwargs: Any,
) -> dict[str, tuple[float, float]]:
    """Output, gradients and scores against float64, with NaN in every parameter past the width.

    Returns:
        For each of them the kernels' error and that of plain PyTorch in the same precision.
    """
    inputs = make_inputs(shape, hidden, gated=gated, bias=bias, dtype=dtype, device=device)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
    exact = [None if tensor is None else tensor.double() for tensor in inputs]
    expected_scores, plain_scores, found_scores = torch.zeros(3, hidden, device=device)
    kwargs["gated"] = gated
    expected = run("reference", exact, width, dy, expected_scores, **kwargs)
    plain = run("slices", inputs, width, dy, plain_scores, **kwargs)
    kept = kept_elements(inputs, width)
    poisoned = [
        None if tensor is None else tensor.masked_fill(~mask, torch.nan)
        for tensor, mask in zip(inputs, kept, strict=True)
    ]
    count = torch.tensor(width, dtype=torch.int32, device=device)
    found_scores.fill_(1.0)  # added to, not overwritten
    found = run("triton", poisoned, count, dy, found_scores, **kwargs)
    present = [name for name, tensor in zip(NAMES, inputs, strict=True) if tensor is not None]
    masks = [mask for mask, tensor in zip(kept, inputs, strict=True) if tensor is not None]
    errors, terms = {}, max(shape[0] * shape[1], shape[2], hidden)  # the longest sum, of tokens or features
    for name, got, other, want in zip(("y", *present), found, plain, expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        errors[name] = relative_error(got, want), relative_error(other, want)
        tolerance = kernel_tolerance(errors[name][1], dtype, int(want.count_nonzero()), terms=terms)
        assert errors[name][0] <= tolerance, (name, *errors[name])
    for name, got, mask in zip(present, found[1:], masks, strict=True):
        assert got[~mask].eq(0).all(), f"{name}: gradients past the width are exact zeros"
        assert width == 0 or got[mask].ne(0).any()
    assert found_scores[width:].eq(1.0).all()
    # The buffer's own rounding at 1 comes on top.
    error, other = relative_error(found_scores - 1, expected_scores), relative_error(plain_scores, expected_scores)
    assert error <= kernel_tolerance(other, dtype, terms=terms) + 1e-6
    return {**errors, "scores": (error, other)}
