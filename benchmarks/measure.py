"""Measure an operation at one shape: check every contender, then time all of them and a plain copy in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch

import skd_kernels
from benchmarks.contenders import BLOCKED, COMPILED, PUBLISHED, Compiled
from benchmarks.registry import Inputs, Operation, Shape, Way, Work
from benchmarks.timing import Call, clock_of, side_by_side

HALF = (torch.float16, torch.bfloat16)
# Our statistics may err by this, or by twice what eager does.
OURS_FLOOR = 1e-6
# On CUDA `token_moments` keeps each factor of its products as two bfloat16 halves, 16 bits together: two roundings of
# 2^-17.
MOMENTS_FLOOR = 2.0**-16
OURS, OURS_SCORES, OURS_AUTO = "ours", "ours, scores", "auto"
COPY = "copy"


class Case:
    """One operation at one shape: its inputs, the calls of its contenders, and what they are checked against.

    In half precision a layer's parameters are float32 and every contender runs under autocast, as in training. The
    inputs of a statistic are used in turn: together they are larger than any cache.

    Args:
        total_bytes: of the inputs of a statistic.
    """

    def __init__(
        self, operation: Operation, shape: Shape, dtype: torch.dtype, device: str, total_bytes: int = 0
    ) -> None:
        self.operation, self.shape, self.dtype, self.device = operation, shape, dtype, device
        generator = torch.Generator(device).manual_seed(0)

        def draw(size: Shape) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        self.inputs = operation.inputs(shape, dtype, torch.float32 if dtype in HALF else dtype, draw)
        self.rotated = [self.inputs]
        self.cast: AbstractContextManager[Any] = nullcontext()
        if operation.trains:
            self.inputs = tuple(tensor.requires_grad_() for tensor in self.inputs)
            outputs = self.inputs[: operation.outputs]
            self.gradients = [draw(tuple(out.shape)).to(out.dtype) for out in outputs]
            if dtype in HALF:
                self.cast = torch.autocast(torch.device(device).type, dtype, cache_enabled=False)
        else:
            copies = total_bytes // max(1, sum(tensor.nbytes for tensor in self.inputs))
            self.rotated += [tuple(t.clone() for t in self.inputs) for _ in range(min(max(copies, 2), 32) - 1)]
        self.turn = cycle(self.rotated)
        if operation.scores is not None:
            self.scores = torch.zeros(operation.scores(shape), device=device)
        self.compiled = Compiled(operation.plain, dynamic=operation.dynamic)

    def at(self, width: int) -> Case:
        """The same inputs, and what torch.compile has compiled, at another width of a masked layer."""
        found = copy.copy(self)
        found.shape = (*self.shape[:-1], width)
        return found

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def work(self, backward: bool) -> Work:
        return self.operation.work(self.shape, self.dtype, backward)

    def contenders(self, names: list[str] | None = None) -> dict[str, Way]:
        """Functions of the inputs, ours first; all that apply, or those named.

        On a GPU ours takes the width of a masked layer from the device; `auto` has it on the host, and is what
        `skd_kernels` chooses then. `ours, scores` also adds up Taylor scores. Blocks are for the caches of a CPU.
        """
        operation, arguments = self.operation, self.operation.arguments(self.shape)
        own = dict(arguments)
        if self.on_gpu and "width" in own:
            own["width"] = torch.tensor(own["width"], dtype=torch.int32, device=self.device)
        ways = {name: partial(way, **arguments) for name, way in operation.ways.items()}
        published = {PUBLISHED: ways.pop(PUBLISHED)} if PUBLISHED in ways else {}
        found: dict[str, Way] = {OURS: partial(operation.ours, **own), **ways}
        found |= {COMPILED: partial(self.compiled, **arguments), **published}
        if operation.scores is not None:
            found[OURS_SCORES] = partial(operation.ours, scores=self.scores, **own)
        if self.on_gpu and "width" in own:
            found[OURS_AUTO] = partial(operation.ours, **arguments)
        if names is None:
            names = [name for name in found if name != BLOCKED or not self.on_gpu]
        if unknown := set(names) - set(found):
            raise ValueError(f"contenders has {sorted(unknown)}; it may have {list(found)}")
        return {name: found[name] for name in names}

    def forward(self, way: Way) -> Any:
        """What a contender gives for the next of the inputs."""
        with self.cast:
            return way(*next(self.turn))

    def without_graph(self, way: Way) -> Any:
        """The same where nothing is kept for a backward pass."""
        with torch.no_grad():
            return self.forward(way)

    def both(self, way: Way) -> Inputs:
        """Outputs, and gradients of all inputs."""
        out = tensors(self.forward(way))
        return *(found.detach() for found in out), *torch.autograd.grad(out, self.inputs, self.gradients)

    def calls(self, contenders: Mapping[str, Way], backward: bool = True) -> dict[str, Call]:
        """What is timed of each contender: forward and backward of a layer, or the forward pass alone."""
        whole = self.both if backward and self.operation.trains else self.without_graph
        return {name: partial(whole, way) for name, way in contenders.items()}

    def exact(self) -> Inputs:
        """By the reference in float64: outputs, and gradients of all inputs."""
        leaves = [tensor.detach().double().requires_grad_(self.operation.trains) for tensor in self.inputs]
        with skd_kernels.use("reference"):
            out = tensors(self.operation.ours(*leaves, **self.operation.arguments(self.shape)))
        if not self.operation.trains:
            return out
        gradients = torch.autograd.grad(out, leaves, [gradient.double() for gradient in self.gradients])
        return *(found.detach() for found in out), *gradients

    def check(self, contenders: Mapping[str, Way], tolerance: float | None = None) -> dict[str, float]:
        """The error of each contender against the reference in float64.

        Args:
            tolerance: the registry's by default. Our statistics may err by twice what eager does, or by a floor.

        Raises:
            RuntimeError: one is above what is allowed.
        """
        name, exact, limit = self.operation.name, self.exact(), tolerance or self.operation.tolerance[self.dtype]
        errors = {contender: self._error(way, exact) for contender, way in contenders.items()}
        ours = limit
        if not self.operation.trains:
            floor = MOMENTS_FLOOR if name == "token_moments" and self.on_gpu else OURS_FLOOR
            ours = max(floor, 2 * self._error(self.operation.plain, exact))
        for contender, error in errors.items():
            allowed = ours if contender == OURS else limit
            if not error <= allowed:
                where = f"{name} at {','.join(map(str, self.shape))}"
                raise RuntimeError(f"{where}: {contender} is off by {error:.1e}; {allowed:.1e} is allowed")
        return errors

    def _error(self, way: Way, exact: Inputs) -> float:
        """The largest over outputs and gradients."""
        found = self.both(way) if self.operation.trains else tensors(self.forward(way))
        measure_of = frobenius_error if self.operation.trains else largest_error
        return max(measure_of(one, other) for one, other in zip(found, exact, strict=True))

    def chosen(self) -> str:
        """The implementation that `skd_kernels` takes for ours."""
        ours = self.contenders([OURS])[OURS]
        with self.cast:
            return skd_kernels.explain(self.operation.name, *self.inputs, **ours.keywords).chosen  # type: ignore[attr-defined]


def tensors(out: Any) -> Inputs:
    return out if isinstance(out, tuple) else (out,)


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    if found.shape != exact.shape:
        return float("inf")
    # One token has no covariance: then nothing but zeros is right.
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny))


def frobenius_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@dataclass
class Measurement:
    """What one run of `measure` found.

    Attributes:
        work: of what was timed.
        seconds: median of one call, by contender; `COPY` is a `Tensor.copy_` of `copied` bytes read and written.
        calls: the contenders themselves, each taking the next of the rotated inputs.
    """

    case: Case
    work: Work
    copied: int
    errors: dict[str, float]
    calls: dict[str, Call]
    implementation: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def copy_bandwidth(self) -> float:
        return self.copied / self.seconds[COPY]

    def bandwidth(self, contender: str) -> float:
        """Bytes the operation has to move, per second."""
        return self.work.bytes / self.seconds[contender]

    def extra_info(self) -> dict[str, Any]:
        """Everything, in plain numbers, for the JSON of a benchmark run. Ours must be among the contenders."""
        ours = self.seconds[OURS]
        return {
            "operation": self.case.operation.name,
            "shape": list(self.case.shape),
            "dtype": name_of(self.case.dtype),
            "implementation": self.implementation,
            "bytes": self.work.bytes,
            "flops": self.work.flops,
            "gigabytes_per_second": round(self.bandwidth(OURS) / 1e9, 2),
            "gigaflops_per_second": round(self.work.flops / ours / 1e9, 2),
            "copy_gigabytes_per_second": round(self.copy_bandwidth / 1e9, 2),
            "percent_of_copy": round(100 * self.bandwidth(OURS) / self.copy_bandwidth, 1),
            "median_ms": {name: round(1e3 * seconds, 4) for name, seconds in self.seconds.items()},
            "ratio": {name: round(self.seconds[name] / ours, 3) for name in self.calls if name != OURS},
            "error": {name: float(f"{error:.2g}") for name, error in self.errors.items()},
        }


def measure(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    names: list[str] | None = None,
    backward: bool = True,
    rounds: int = 7,
    budget: float = 2.0,
    total_bytes: int = 256 << 20,
) -> Measurement:
    """Time `operation` at `shape`.

    Args:
        names: of the contenders; None: all.
        backward: with its backward pass, where there is one.
        rounds, budget: as for `side_by_side`.
        total_bytes: of a statistic's rotated inputs, and of the buffers of the copy.

    Raises:
        RuntimeError: a contender's result is wrong.
    """
    torch.compiler.reset()
    case = Case(operation, shape, dtype, device, total_bytes)
    contenders = case.contenders(names)
    errors = case.check(contenders)
    calls = case.calls(contenders, backward)
    source = torch.ones(total_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found = Measurement(case, case.work(backward), 2 * source.nbytes, errors, calls, case.chosen())
    timed: dict[str, Callable[[], object]] = {**calls, COPY: lambda: target.copy_(source)}
    found.seconds = side_by_side(timed, rounds, budget=budget, clock=clock_of(device))
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
