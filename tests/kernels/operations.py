"""The operations that have Triton kernels, and how each is compared with float64, on the CPU and on a GPU.

A class for each operation says what its inputs are, which elements a width keeps, and how it is called. The
comparison itself is written once, for all operations.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar

import torch
from tolerances import kernel_tolerance

import skd_kernels as kernels
from skd_kernels.attention import MOST_IMAGES

Tensors = dict[str, torch.Tensor]
Errors = dict[str, tuple[float, float]]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm; of an expected zero, the norm itself."""
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (norm if norm > 0 else 1))


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The tensors in float64, for the specification; None and integers are returned unchanged."""
    return {
        n: value.double() if value is not None and value.is_floating_point() else value for n, value in inputs.items()
    }


@dataclass(frozen=True)
class Problem:
    """An operation on inputs of one size.

    Attributes:
        shape: of x, (B, N, C).
        dtype: the dtype in which the operation computes.
        mixed: parameters are float32 and autocast is on, as in training.
    """

    shape: tuple[int, int, int]
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    device: str = "cpu"

    operation: ClassVar[str]
    names: ClassVar[tuple[str, ...]]  # of the inputs that may have a gradient
    outputs: ClassVar[tuple[str, ...]] = ("out",)
    library: ClassVar[str] = "reference"  # PyTorch's own way, which the kernels are compared with

    def __str__(self) -> str:
        """For the names of tests: what differs from the default."""
        given = (
            (field.name, getattr(self, field.name), field.default) for field in fields(self) if field.name != "_"
        )
        words = [f"{name} {value}" for name, value, default in given if value != default and name != "device"]
        return " ".join(words).replace("torch.", "")

    def inputs(self) -> Tensors:
        """Exactly representable in `dtype`, so that every precision computes on the same numbers."""
        raise NotImplementedError

    def arguments(self, leaves: Tensors, control: Any) -> dict[str, Any]:
        """The arguments of the operation; `control` may change from call to call without another compilation."""
        raise NotImplementedError

    def call(self, leaves: Tensors, control: Any, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        more = {} if scores is None else {"scores": scores}
        out = getattr(kernels, self.operation)(**self.arguments(leaves, control), **more)
        return out if isinstance(out, tuple) else (out,)

    def chosen(self, leaves: Tensors, control: Any) -> str:
        """The implementation that such a call takes."""
        return kernels.explain(self.operation, **self.arguments(leaves, control)).chosen

    def scores(self) -> torch.Tensor | None:
        """A buffer for Taylor scores, of zeros; None for operations without."""
        return None

    def kept(self, inputs: Tensors, control: Any) -> Tensors:
        """For each input that ends at a width, which elements are kept."""
        return {}

    def logit(self, exact: Tensors, control: Any) -> float:
        """The largest number that an exponential is taken of."""
        return 0.0

    def dtype_of(self, name: str) -> torch.dtype:
        """Of an output or a gradient."""
        return torch.float32 if self.mixed and name not in (*self.outputs, "x") else self.dtype

    def is_telling(self) -> bool:
        """Whether the largest error is more than a matter of luck."""
        return True

    def autocast(self) -> Any:
        return torch.autocast(self.device, self.dtype) if self.mixed else nullcontext()

    def result_shapes(self) -> list[tuple[int, int, int]]:
        """The shape of each output."""
        return [self.shape for _ in self.outputs]

    def gradients(self) -> list[torch.Tensor]:
        """At the outputs."""
        generator = torch.Generator().manual_seed(1)
        made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.result_shapes())
        return [gradient.to(self.device, self.dtype) for gradient in made]

    def terms(self) -> int:
        """The longest sum, of tokens or features."""
        return max(self.shape[0] * self.shape[1], self.shape[2])


@dataclass(frozen=True)
class Masked(Problem):
    """An operation with a width, whose coordinates lie between an inward and an outward weight."""

    full: int = 0  # coordinates, F or D of every head
    bias: bool = True

    kernels_of: ClassVar[dict[str, set[str]]]  # those that the gradient of each input needs, in the backward pass
    scored_by: ClassVar[str]  # the kernel that adds up the scores
    library: ClassVar[str] = "slices"

    @property
    def groups(self) -> int:
        """The number of groups of coordinates in the outward weight."""
        return 1

    @property
    def sets(self) -> int:
        """The number of rows of the inward weight for each coordinate."""
        return 1

    @property
    def inner(self) -> int:
        return self.groups * self.full

    def inputs(self) -> Tensors:
        channels, rows = self.shape[-1], self.sets * self.inner
        generator = torch.Generator().manual_seed(sum(self.shape) + self.inner)

        def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(self.device, self.dtype)

        made = [randn(*self.shape), randn(rows, channels, scale=channels**-0.5)]
        made.insert(2, randn(channels, self.inner, scale=self.inner**-0.5))
        biases = [randn(rows, scale=0.5), randn(channels)]
        found = dict(zip(self.names, (made[0], made[1], biases[0], made[2], biases[1]), strict=True))
        chosen = {name: value for name, value in found.items() if self.bias or name not in self.names[2::2]}
        return {name: value.float() if self.mixed and name != "x" else value for name, value in chosen.items()}

    def arguments(self, leaves: Tensors, control: Any) -> dict[str, Any]:
        return {name: leaves.get(name) for name in self.names} | {"width": control}

    def kept(self, inputs: Tensors, control: Any) -> Tensors:
        width, (x, into, _, out_of, _) = int(control), self.names
        keep = (torch.arange(self.full, device=self.device) < width).repeat(self.groups)
        rows = keep.repeat(self.sets)
        found = [
            torch.ones_like(inputs[x], dtype=torch.bool),
            rows[:, None].expand_as(inputs[into]),
            rows,
            keep.expand_as(inputs[out_of]),
            torch.full((self.shape[-1],), width > 0, device=self.device),
        ]
        return {name: mask for name, mask in zip(self.names, found, strict=True) if name in inputs}

    def terms(self) -> int:
        return max(super().terms(), self.inner)


@dataclass(frozen=True)
class Mlp(Masked):
    act: str = "gelu"
    gated: bool = False

    operation: ClassVar[str] = "masked_mlp"
    names: ClassVar[tuple[str, ...]] = ("x", "w1", "b1", "w2", "b2")
    kernels_of: ClassVar[dict[str, set[str]]] = {
        "x": {"gradient", "linear"},
        "w1": {"gradient", "weight_gradient_kernel", "finish_kernel"},
        "b1": {"gradient", "sums_kernel"},
        "w2": {"weight_gradient_kernel", "finish_kernel"},
        "b2": {"column_sums_kernel", "sums_kernel"},
    }
    scored_by: ClassVar[str] = "sums_kernel"

    @property
    def sets(self) -> int:
        return 2 if self.gated else 1

    def scores(self) -> torch.Tensor:
        return torch.zeros(self.full, device=self.device)

    def arguments(self, leaves: Tensors, control: Any) -> dict[str, Any]:
        return super().arguments(leaves, control) | {"act": self.act, "gated": self.gated}


@dataclass(frozen=True)
class Attention(Masked):
    heads: int = 1
    scale: float | None = None
    queries: int | None = None

    operation: ClassVar[str] = "masked_attention"
    names: ClassVar[tuple[str, ...]] = ("x", "w_qkv", "b_qkv", "w_proj", "b_proj")
    kernels_of: ClassVar[dict[str, set[str]]] = {
        "x": {"linear", "flash_backward"},
        "w_qkv": {"linear", "flash_backward", "weight_gradient_kernel", "finish_kernel"},
        "b_qkv": {"linear", "flash_backward", "sums_kernel"},
        "w_proj": {"weight_gradient_kernel", "finish_kernel"},
        "b_proj": {"column_sums_kernel", "sums_kernel"},
    }
    scored_by: ClassVar[str] = "sums_kernel"

    @property
    def library(self) -> str:  # type: ignore[override]
        """PyTorch's own attention refuses so many images that the grid of a kernel must be folded."""
        return "slices" if self.shape[0] <= MOST_IMAGES else "reference"

    @property
    def groups(self) -> int:
        return self.heads

    @property
    def sets(self) -> int:
        return 3

    def scores(self) -> torch.Tensor:
        return torch.zeros(3, self.heads, self.full, device=self.device)

    def arguments(self, leaves: Tensors, control: Any) -> dict[str, Any]:
        own = {"num_heads": self.heads, "scale": self.scale, "queries": self.queries}
        return super().arguments(leaves, control) | own

    def result_shapes(self) -> list[tuple[int, int, int]]:
        images, tokens, channels = self.shape
        return [(images, tokens if self.queries is None else self.queries, channels)]

    def logit(self, exact: Tensors, control: Any) -> float:
        """The largest absolute value of scale q k^T; 0 at width 0."""
        qkv = torch.nn.functional.linear(exact["x"], exact["w_qkv"], exact.get("b_qkv"))
        qkv = qkv.unflatten(-1, (3, self.heads, self.full))[..., : int(control)]
        q, k = (part.transpose(1, 2) for part in qkv.unbind(2)[:2])
        factor = self.full**-0.5 if self.scale is None else self.scale
        return float((factor * q @ k.mT).abs().max())


def run(
    problem: Problem,
    implementation: str,
    inputs: Tensors,
    control: Any = None,
    gradients: Any = None,
    scores: torch.Tensor | None = None,
    *,
    wanted: Any = None,
) -> dict[str, Any]:
    """The outputs, and the gradients of those inputs that are `wanted`, or of all.

    Args:
        gradients: at the outputs, None for one that no loss reads; in place of the list, None for the problem's own.
    """
    wanted = problem.names if wanted is None else wanted
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    with kernels.use(implementation):
        out = problem.call(leaves, control, scores)
    given = problem.gradients() if gradients is None else gradients
    pairs = [(value, grad.to(value.dtype)) for value, grad in zip(out, given, strict=True) if grad is not None]
    values, given = zip(*pairs, strict=True)
    chosen = [name for name in leaves if name in wanted]
    found = torch.autograd.grad(values, [leaves[name] for name in chosen], given, allow_unused=True)
    outputs = dict(zip(problem.outputs, (value.detach() for value in out), strict=True))
    return outputs | dict(zip(chosen, found, strict=True))


def check(problem: Problem, control: Any = None, implementation: str = "triton") -> Errors:
    """Outputs, gradients and scores against float64, with NaN in every parameter past the width.

    Returns:
        For each of them the kernels' error and that of plain PyTorch in the same precision.
    """
    inputs, gradients = problem.inputs(), problem.gradients()
    exact = in_double(inputs)
    expected_scores, plain_scores, found_scores = (problem.scores() for _ in range(3))
    expected = run(problem, "reference", exact, control, gradients, expected_scores)
    kept = problem.kept(inputs, control)
    poisoned = {n: tensor.masked_fill(~kept[n], torch.nan) if n in kept else tensor for n, tensor in inputs.items()}
    count = control if control is None else torch.tensor(control, dtype=torch.int32, device=problem.device)
    if found_scores is not None:
        found_scores.fill_(1.0)  # added to, not overwritten
    with problem.autocast():
        plain = run(problem, problem.library, inputs, control, gradients, plain_scores)
        found = run(problem, implementation, poisoned, count, gradients, found_scores)
    sizes: dict[str, Any] = {"terms": problem.terms(), "logit": problem.logit(exact, control)}
    errors: Errors = {}
    assert list(found) == list(expected)
    for name, want in expected.items():
        got, other = found[name], plain[name]
        assert got.dtype == other.dtype == problem.dtype_of(name) and got.shape == want.shape, name
        errors[name] = relative_error(got, want), relative_error(other, want)
        tolerance = kernel_tolerance(errors[name][1], got.dtype, int(want.count_nonzero()), **sizes)
        assert errors[name][0] <= tolerance, (name, *errors[name])
    for name, mask in kept.items():
        assert found[name][~mask].eq(0).all(), f"{name}: gradients past the width are exact zeros"
        assert control <= 0 or found[name][mask].ne(0).any()
    if found_scores is not None and expected_scores is not None and plain_scores is not None:
        assert found_scores[..., control:].eq(1.0).all()
        error, other = (
            relative_error(found_scores - 1, expected_scores),
            relative_error(plain_scores, expected_scores),
        )
        # The buffer rounds at 1, and PyTorch's error there does not count for ours.
        assert error <= kernel_tolerance(other, problem.dtype, **sizes) + 1e-6
        errors["scores"] = error, other
    return errors
