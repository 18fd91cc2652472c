"""Measure one operation at one shape: check every contender, then time all of them and a plain copy in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

import skd_kernels
from benchmarks.operations import Operation, Pair, Shape, Work, inputs
from benchmarks.timing import on_device, side_by_side, wall

# Largest error, relative to the largest entry, of a contender that computes in its input's dtype. A product rounded
# to bfloat16 is off by 2^-9, and so is a result; sums of thousands of them average it out.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Ours may err by this, or by twice what eager does.
OURS_FLOOR = 1e-6
# On CUDA it keeps each factor of its products as two bfloat16 halves, 16 bits together: two roundings of 2^-17.
MOMENTS_FLOOR = 2.0**-16
COPY = "copy"


@dataclass
class Measurement:
    """What one run of `measure` found.

    Attributes:
        seconds: median of one call, by contender; `COPY` is a `Tensor.copy_` of `copied` bytes read and written.
        errors: largest difference to float64, relative to the largest entry.
        calls: the contenders themselves, each taking the next of the rotated inputs.
    """

    operation: Operation
    shape: Shape
    dtype: torch.dtype
    implementation: str
    work: Work
    copied: int
    errors: dict[str, float]
    calls: dict[str, Callable[[], object]]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def copy_bandwidth(self) -> float:
        return self.copied / self.seconds[COPY]

    def bandwidth(self, contender: str) -> float:
        """Bytes the operation has to move, per second."""
        return self.work.bytes / self.seconds[contender]

    def extra_info(self) -> dict[str, Any]:
        """Everything, in plain numbers, for the JSON of a benchmark run. Ours must be among the contenders."""
        ours = self.seconds["ours"]
        return {
            "operation": self.operation.name,
            "shape": list(self.shape),
            "dtype": name_of(self.dtype),
            "implementation": self.implementation,
            "bytes": self.work.bytes,
            "flops": self.work.flops,
            "gigabytes_per_second": round(self.bandwidth("ours") / 1e9, 2),
            "gigaflops_per_second": round(self.work.flops / ours / 1e9, 2),
            "copy_gigabytes_per_second": round(self.copy_bandwidth / 1e9, 2),
            "percent_of_copy": round(100 * self.bandwidth("ours") / self.copy_bandwidth, 1),
            "median_ms": {name: round(1e3 * seconds, 4) for name, seconds in self.seconds.items()},
            "ratio": {name: round(self.seconds[name] / ours, 3) for name in self.calls if name != "ours"},
            "error": {name: float(f"{error:.2g}") for name, error in self.errors.items()},
        }


def measure(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    names: list[str] | None = None,
    rounds: int = 7,
    budget: float = 2.0,
    total_bytes: int = 256 << 20,
) -> Measurement:
    """Time `operation` at `shape`.

    Args:
        names: of the contenders; None: all.
        rounds, budget: as for `side_by_side`.
        total_bytes: of the rotated inputs, and of the buffers of the copy.

    Raises:
        RuntimeError: a contender's result is wrong.
    """
    torch.compiler.reset()
    pairs = inputs(shape, dtype, device, total_bytes)
    contenders = operation.contenders(pairs[0][0], names)
    errors = check(operation, contenders, pairs[0])
    turn = cycle(pairs)
    calls = {name: (lambda function=function: function(*next(turn))) for name, function in contenders.items()}
    source = torch.ones(total_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found = Measurement(
        operation,
        shape,
        dtype,
        chosen(operation, pairs[0]),
        operation.work(shape, dtype),
        2 * source.nbytes,
        errors,
        calls,
    )
    clock = on_device if torch.device(device).type == "cuda" else wall
    found.seconds = side_by_side({**calls, COPY: lambda: target.copy_(source)}, rounds, budget=budget, clock=clock)
    return found


def chosen(operation: Operation, pair: Pair) -> str:
    """The implementation that `skd_kernels` takes for this call."""
    return skd_kernels.explain(operation.name, *pair).chosen


def check(operation: Operation, contenders: dict[str, Any], pair: Pair) -> dict[str, float]:
    """The error of every contender against the float64 reference; RuntimeError if one is too large."""
    with skd_kernels.use("reference"):
        exact = operation.ours(pair[0])(*pair)
    errors = {name: relative_error(function(*pair), exact) for name, function in contenders.items()}
    limit = TOLERANCE[pair[0].dtype]
    eager = relative_error(operation.eager(*pair), exact)
    floor = MOMENTS_FLOOR if operation.name == "token_moments" and pair[0].is_cuda else OURS_FLOOR
    for name, error in errors.items():
        allowed = max(floor, 2 * eager) if name == "ours" else limit
        if not error <= allowed:
            raise RuntimeError(f"{operation.name}: {name} is off by {error:.1e}; {allowed:.1e} is allowed")
    return errors


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    if found.shape != exact.shape:
        return float("inf")
    # One token has no covariance: then nothing but zeros is right.
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
