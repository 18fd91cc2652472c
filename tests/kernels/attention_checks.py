"""How masked_attention's kernels are compared with float64, on the CPU by the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from tolerances import kernel_tolerance

import skd_kernels as kernels
from skd_kernels.attention import MOST_IMAGES

NAMES = ("x", "w_qkv", "b_qkv", "w_proj", "b_proj")
Inputs = list[torch.Tensor | None]


def make_inputs(
    shape: tuple[int, int, int],
    heads: int,
    head_dim: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Exactly representable in `dtype`, so that every precision computes on the same numbers."""
    channels, inner = shape[-1], heads * head_dim
    generator = torch.Generator().manual_seed(sum(shape) + inner)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    x, w_qkv = randn(*shape), randn(3 * inner, channels, scale=channels**-0.5)
    w_proj = randn(channels, inner, scale=inner**-0.5)
    biases = (randn(3 * inner, scale=0.5), randn(channels)) if bias else (None, None)
    return [x, w_qkv, biases[0], w_proj, biases[1]]


def kept_elements(inputs: Inputs, heads: int, width: int) -> list[torch.Tensor]:
    """For x and each parameter, which elements the width keeps."""
    x, w_qkv, _, w_proj, _ = inputs
    assert x is not None and w_qkv is not None and w_proj is not None
    keep = (torch.arange(w_proj.shape[1] // heads, device=x.device) < width).repeat(heads)
    rows, columns = keep.repeat(3), keep
    always = torch.ones_like(x, dtype=torch.bool)
    expanded = [rows[:, None].expand_as(w_qkv), rows, columns.expand_as(w_proj)]
    return [always, *expanded, torch.full((w_proj.shape[0],), width > 0, device=x.device)]


def run(
    name: str, inputs: Inputs, width: Any, heads: int, dy: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any
) -> list[torch.Tensor]:
    """The output, and the gradients of those inputs that there are."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    with kernels.use(name):
        out = kernels.masked_attention(*leaves, width, num_heads=heads, scores=scores, **kwargs)
    out.backward(dy.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[misc]


def largest_logit(inputs: Inputs, heads: int, width: int, scale: float | None) -> float:
    """The largest absolute value of scale q k^T, from float64 inputs; 0 at width 0."""
    x, w_qkv, b_qkv, w_proj, _ = inputs
    assert x is not None and w_qkv is not None and w_proj is not None
    head_dim = w_proj.shape[1] // heads
    qkv = torch.nn.functional.linear(x, w_qkv, b_qkv).unflatten(-1, (3, heads, head_dim))[..., :width]
    q, k = (part.transpose(1, 2) for part in qkv.unbind(2)[:2])
    factor = head_dim**-0.5 if scale is None else scale
    return float((factor * q @ k.mT).abs().max())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, Frobenius norm; of an expected zero, the norm."""
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (norm if norm > 0 else 1))


def check(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    heads: int,
    head_dim: int,
    width: int,
    *,
    bias: bool = True,
    device: str = "cpu",
    implementation: str = "triton",
    **kwargs: Any,
) -> dict[str, tuple[float, float]]:
    """Output, gradients and scores against float64, with NaN in every parameter past the width.

    Returns:
        For each of them the kernels' error and that of plain PyTorch in the same precision.
    """
    inputs = make_inputs(shape, heads, head_dim, bias=bias, dtype=dtype, device=device)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
    exact = [None if tensor is None else tensor.double() for tensor in inputs]
    expected_scores, plain_scores, found_scores = torch.zeros(3, 3, heads, head_dim, device=device)
    expected = run("reference", exact, width, heads, dy, expected_scores, **kwargs)
    # PyTorch's own attention refuses so many images that the grid of a kernel must be folded.
    contender = "slices" if shape[0] <= MOST_IMAGES else "reference"
    plain = run(contender, inputs, width, heads, dy, plain_scores, **kwargs)
    kept = kept_elements(inputs, heads, width)
    poisoned = [
        None if tensor is None else tensor.masked_fill(~mask, torch.nan)
        for tensor, mask in zip(inputs, kept, strict=True)
    ]
    found_scores.fill_(1.0)  # added to, not overwritten
    count = torch.tensor(width, dtype=torch.int32, device=device)
    found = run(implementation, poisoned, count, heads, dy, found_scores, **kwargs)
    present = [name for name, tensor in zip(NAMES, inputs, strict=True) if tensor is not None]
    masks = [mask for mask, tensor in zip(kept, inputs, strict=True) if tensor is not None]
    # The longest sum, of tokens or features; and what the exponentials are taken of.
    sizes: dict[str, Any] = {"terms": max(shape[0] * shape[1], shape[2], heads * head_dim)}
    sizes["logit"] = largest_logit(exact, heads, width, kwargs.get("scale"))
    errors = {}
    for name, got, other, want in zip(("out", *present), found, plain, expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        errors[name] = relative_error(got, want), relative_error(other, want)
        tolerance = kernel_tolerance(errors[name][1], dtype, int(want.count_nonzero()), **sizes)
        assert errors[name][0] <= tolerance, (name, *errors[name])
    for name, got, mask in zip(present, found[1:], masks, strict=True):
        assert got[~mask].eq(0).all(), f"{name}: gradients past the width are exact zeros"
        assert width == 0 or got[mask].ne(0).any()
    assert found_scores[..., width:].eq(1.0).all()
    # The buffer rounds at 1, and PyTorch's error there does not count for ours.
    errors["scores"] = (
        relative_error(found_scores - 1, expected_scores),
        relative_error(plain_scores, expected_scores),
    )
    assert errors["scores"][0] <= kernel_tolerance(errors["scores"][1], dtype, **sizes) + 1e-6
    return errors
