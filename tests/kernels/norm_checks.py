"""How residual_norm's kernels are compared with float64, on the CPU by the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from mlp_checks import relative_error
from tolerances import kernel_tolerance

import skd_kernels as kernels

NAMES = ("x", "branch", "weight", "bias", "scale", "branch_bias")  # those that have a gradient
PLAIN = ("mask", "branch_width")  # those that have none
OF_A_BRANCH = ("scale", "mask", "branch_bias", "branch_width")
OPTIONAL = ("branch", "weight", "bias", *OF_A_BRANCH)
Inputs = dict[str, Any]


def make_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    stream: torch.dtype | None = None,
    without: Collection[str] = (),
    device: str = "cpu",
    width: int = 3,
) -> Inputs:
    """All that residual_norm takes, or None for what is left out; `stream` is the dtype of all but the branch.

    Exactly representable in `dtype`, so that every precision computes on the same numbers. One image of several is
    dropped. `width` is the branch's.
    """
    images, _, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    found = {
        "x": randn(*shape),
        "branch": randn(*shape),
        "weight": 1 + 0.5 * randn(channels),
        "bias": randn(channels),
    }
    found |= {"scale": randn(channels), "branch_bias": randn(channels)}
    found["mask"] = torch.where(torch.arange(images) == 1, 0.0, 1.25).to(dtype)
    found = {name: value.to(device, dtype if name == "branch" else stream or dtype) for name, value in found.items()}
    # An element of a table, at an odd address.
    found["branch_width"] = torch.tensor([-1, width, -1], dtype=torch.int32, device=device)[1]
    return {name: None if name in without else value for name, value in found.items()}


def in_double(inputs: Inputs) -> Inputs:
    """The same numbers, for the specification; a width stays an integer."""
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def run(
    name: str, inputs: Inputs, kind: str, grads: Any, *, wanted: Collection[str] = NAMES, **options: Any
) -> dict[str, torch.Tensor]:
    """sum, normed, and the gradients of those inputs that there are and that are `wanted`.

    Args:
        grads: at sum and normed; None for one that no loss reads.
    """
    leaves = {
        key: None if value is None else value.detach().requires_grad_(key in wanted) for key, value in inputs.items()
    }
    with kernels.use(name):
        out = kernels.residual_norm(**leaves, eps=1e-6, kind=kind, **options)
    pairs = [(value, grad.to(value.dtype)) for value, grad in zip(out, grads, strict=True) if grad is not None]
    chosen = {key: leaf for key, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    values, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(values, list(chosen.values()), given, allow_unused=True)
    return {"sum": out[0].detach(), "normed": out[1].detach(), **dict(zip(chosen, found, strict=True))}


def check(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    kind: str,
    *,
    mixed: bool = False,
    without: Collection[str] = (),
    device: str = "cpu",
    width: int = 3,
) -> dict[str, tuple[float, float]]:
    """Outputs and gradients against float64, in the dtypes that the reference has.

    Args:
        mixed: the stream and all parameters are float32 and autocast is on, as in training.

    Returns:
        For each of them the kernels' error and that of plain PyTorch in the same precision.
    """
    inputs = make_inputs(
        shape, dtype, stream=torch.float32 if mixed else None, without=without, device=device, width=width
    )
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2)]
    expected = run("reference", in_double(inputs), kind, grads)
    with torch.autocast(device, dtype) if mixed else nullcontext():
        plain, found = (run(name, inputs, kind, grads) for name in ("reference", "triton"))
    errors, terms = {}, max(shape[0] * shape[1], shape[2])
    assert list(found) == list(expected)
    for name, want in expected.items():
        got, other = found[name], plain[name]
        assert got.dtype == other.dtype and got.shape == want.shape, name
        errors[name] = relative_error(got, want), relative_error(other, want)
        tolerance = kernel_tolerance(errors[name][1], got.dtype, int(want.count_nonzero()), terms=terms)
        assert errors[name][0] <= tolerance, (name, *errors[name])
    assert found["normed"].dtype == dtype and found["sum"].dtype == torch.float32
    return errors
