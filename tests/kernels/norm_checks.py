"""residual_norm as a problem for every_operation.py: what its inputs are, and how it is called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from operations import Problem, Tensors

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
    """All arguments of residual_norm, None for those left out; `stream` is the dtype of all but the branch.

    The numbers are exactly representable in `dtype`, so that every precision computes on the same ones. One image of
    several is dropped. `width` is that of the branch.
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


@dataclass(frozen=True)
class Norm(Problem):
    """residual_norm.

    The width of the branch may change from call to call, and also which images are dropped. Therefore a control is a
    width, or a vector of a width and, for each image, its factor in units of 0.625.
    """

    kind: str = "layer"
    without: tuple[str, ...] = ()
    sum_tokens: int | None = None

    operation: ClassVar[str] = "residual_norm"
    names: ClassVar[tuple[str, ...]] = NAMES
    outputs: ClassVar[tuple[str, ...]] = ("sum", "normed")

    def inputs(self) -> Tensors:
        stream = torch.float32 if self.mixed else None
        made = make_inputs(self.shape, self.dtype, stream=stream, without=self.without, device=self.device)
        return {name: value for name, value in made.items() if value is not None}

    def arguments(self, leaves: Tensors, control: Any) -> dict[str, Any]:
        arguments = dict.fromkeys(("branch", "weight", "bias"), None) | leaves
        arguments |= {"eps": 1e-6, "kind": self.kind, "sum_tokens": self.sum_tokens}
        if control is None or "branch_width" not in leaves:
            return arguments
        if isinstance(control, int):
            control = torch.tensor(control, dtype=torch.int32, device=self.device)
        if control.ndim == 0:
            return arguments | {"branch_width": control}
        return arguments | {"branch_width": control[0], "mask": 0.625 * control[1:]}

    def result_shapes(self) -> list[tuple[int, int, int]]:
        images, tokens, channels = self.shape
        return [(images, tokens if self.sum_tokens is None else self.sum_tokens, channels), self.shape]

    def kept(self, inputs: Tensors, control: Any) -> Tensors:
        """The branch and its bias count above a width of zero."""
        if control is None:
            return {}
        there = (name for name in ("branch", "branch_bias") if name in inputs)
        return {name: torch.full_like(inputs[name], control > 0, dtype=torch.bool) for name in there}

    def dtype_of(self, name: str) -> torch.dtype:
        if name == "sum":
            return torch.float32
        return torch.float32 if self.mixed and name not in ("normed", "branch") else self.dtype

    def is_telling(self) -> bool:
        return self.shape[-1] >= 64
