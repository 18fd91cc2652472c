"""Check and time one operation at a shape of yours; `Case` and `measure` do it for the suites too.

python -m benchmarks.op token_moments --shape 25216,36,64 --dtype bfloat16 --threads 2
python -m benchmarks.op taylor_scores --shape 3152,3072 --device cuda --contenders ours,eager
python -m benchmarks.op masked_mlp --shape 16,197,192,768,384 --forward
python -m benchmarks.op masked_mlp --shape 2,37,72,200,200 --check      only ours, at several widths, and not timed
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import cast

import torch

import skd_kernels
from benchmarks import registry
from benchmarks.registry import OPERATIONS, Draw, Inputs, Operation, Shape, Tensor, Way, Work
from benchmarks.timing import BACKEND, Call, clock_of, side_by_side

HALF = (torch.float16, torch.bfloat16)
# The error that our statistics may have, if that is more than twice the error of "eager".
OURS_FLOOR = 1e-6
# On CUDA `token_moments` keeps each factor of its products as two bfloat16 halves, which have 16 bits together: two
# roundings of 2^-17.
MOMENTS_FLOOR = 2.0**-16
OURS, OURS_SCORES, OURS_AUTO = "ours", "ours, scores", "auto"
COPY = "copy"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPES = {name_of(dtype): dtype for dtype in registry.LAYER_TOLERANCE}


class Compiled:
    """`function` under torch.compile.

    Args:
        dynamic: ints and sizes may change without another compilation.

    Attributes:
        compilations: how many graphs were compiled, the first one included.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *,
        dynamic: bool = True,
        fullgraph: bool = False,
        backend: str = BACKEND,
    ) -> None:
        self.compilations = 0
        self.backend = backend
        self.call = torch.compile(function, dynamic=dynamic, fullgraph=fullgraph, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.compilations += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def __call__(self, *arguments: object, **named: object) -> Tensor:
        return cast(Tensor, self.call(*arguments, **named))


class Case:
    """One operation at one shape: its inputs, the calls of its contenders, and what they are checked against.

    In half precision a layer's parameters are float32 and every contender runs under autocast, as in training. The
    inputs of a statistic are used in turn, because together they are larger than any cache.

    Args:
        total_bytes: of the inputs of a statistic.
    """

    def __init__(
        self, operation: Operation, shape: Shape, dtype: torch.dtype, device: str, total_bytes: int = 0
    ) -> None:
        self.operation, self.shape, self.dtype, self.device = operation, shape, dtype, device
        generator = torch.Generator(device).manual_seed(0)

        def draw(size: Shape) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        self.inputs = operation.inputs(shape, dtype, torch.float32 if dtype in HALF else dtype, draw)
        self.rotated = [self.inputs]
        self.cast: AbstractContextManager[object] = nullcontext()
        if operation.trains:
            self.inputs = tuple(tensor.requires_grad_() for tensor in self.inputs)
            self.rotated = [self.inputs]
            outputs = self.inputs[: operation.outputs]
            self.gradients = [draw(tuple(out.shape)).to(out.dtype) for out in outputs]
            if dtype in HALF:
                self.cast = torch.autocast(torch.device(device).type, dtype, cache_enabled=False)
        else:
            copies = total_bytes // max(1, sum(tensor.nbytes for tensor in self.inputs))
            self.rotated += [tuple(t.clone() for t in self.inputs) for _ in range(min(max(copies, 2), 32) - 1)]
        self.turn = cycle(self.rotated)
        self.scores = None if operation.scores is None else torch.zeros(operation.scores(shape), device=device)
        self.compiled = Compiled(operation.plain, dynamic=operation.dynamic)

    def at(self, width: int) -> Case:
        """The case at another width of a masked layer; it shares the inputs and torch.compile's graphs."""
        found = copy.copy(self)
        found.shape = (*self.shape[:-1], width)
        return found

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def work(self, backward: bool) -> Work:
        return self.operation.work(self.shape, self.dtype, backward)

    def own_arguments(self) -> dict[str, object]:
        """The arguments of our operation beside its inputs; on a GPU the width of a masked layer is on the device."""
        found: dict[str, object] = {**self.operation.arguments(self.shape)}
        if self.on_gpu and "width" in found:
            found["width"] = torch.tensor(found["width"], dtype=torch.int32, device=self.device)
        return found

    def contenders(self, names: Sequence[str] | None = None) -> dict[str, Way]:
        """The contenders as functions of the inputs, ours first; only those in `names`, if given.

        On a GPU `auto` is what `skd_kernels` chooses if it has the width of a masked layer on the host. The contender
        "ours, scores" also adds up Taylor scores. `blocked` is for the caches of a CPU, and left out on a GPU.
        """
        operation, arguments, own = self.operation, self.operation.arguments(self.shape), self.own_arguments()
        ways = {name: partial(way, **arguments) for name, way in operation.ways.items()}
        published = {registry.PUBLISHED: ways.pop(registry.PUBLISHED)} if registry.PUBLISHED in ways else {}
        found: dict[str, Way] = {OURS: partial(operation.ours, **own), **ways}
        found |= {registry.COMPILED: partial(self.compiled, **arguments), **published}
        if self.scores is not None:
            found[OURS_SCORES] = partial(operation.ours, scores=self.scores, **own)
        if self.on_gpu and "width" in own:
            found[OURS_AUTO] = partial(operation.ours, **arguments)
        if names is None:
            names = [name for name in found if name != registry.BLOCKED or not self.on_gpu]
        if unknown := set(names) - set(found):
            raise ValueError(f"contenders has {sorted(unknown)}; it may have {list(found)}")
        return {name: found[name] for name in names}

    def forward(self, way: Way) -> Tensor | Inputs:
        """Call a contender on the next set of inputs."""
        with self.cast:
            return way(*next(self.turn))

    def without_graph(self, way: Way) -> Tensor | Inputs:
        """The same under no_grad, so that nothing is saved for a backward pass."""
        with torch.no_grad():
            return self.forward(way)

    def both(self, way: Way) -> Inputs:
        """Outputs, and gradients of all inputs."""
        out = tensors(self.forward(way))
        return *(found.detach() for found in out), *torch.autograd.grad(out, self.inputs, self.gradients)

    def calls(self, contenders: Mapping[str, Way], backward: bool = True) -> dict[str, Call]:
        """The calls that are timed, by contender: forward and backward of a layer, or the forward pass alone."""
        whole = self.both if backward and self.operation.trains else self.without_graph
        return {name: partial(whole, way) for name, way in contenders.items()}

    def exact(self, scores: Tensor | None = None) -> Inputs:
        """Outputs and gradients of all inputs, by the reference in float64; it adds Taylor scores to `scores`."""
        leaves = [tensor.detach().double().requires_grad_(self.operation.trains) for tensor in self.inputs]
        named: dict[str, object] = {**self.operation.arguments(self.shape)}
        with skd_kernels.use("reference"):
            out = tensors(self.operation.ours(*leaves, **named, **({} if scores is None else {"scores": scores})))
            if not self.operation.trains:
                return out
            gradients = torch.autograd.grad(out, leaves, [gradient.double() for gradient in self.gradients])
        return *(found.detach() for found in out), *gradients

    def check(self, contenders: Mapping[str, Way], tolerance: float | None = None) -> dict[str, float]:
        """The error of each contender against the reference in float64.

        Args:
            tolerance: the registry's by default. Our statistics may err by twice what eager does, or by a floor.

        Raises:
            RuntimeError: an error is larger than what is allowed.
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

    def check_scores(self, tolerance: float) -> float:
        """The error of ours while it adds up Taylor scores, the scores included; RuntimeError above `tolerance`."""
        assert self.scores is not None
        exact_scores = torch.zeros_like(self.scores)
        exact = self.exact(exact_scores)
        self.scores.zero_()
        found = self.both(self.contenders([OURS_SCORES])[OURS_SCORES])
        error = max(map(frobenius_error, (*found, self.scores), (*exact, exact_scores)))
        if not error <= tolerance:
            raise RuntimeError(f"{self.operation.name} at {self.shape} is off by {error:.1e}")
        return error

    def _error(self, way: Way, exact: Inputs) -> float:
        """The largest one over outputs and gradients."""
        found = self.both(way) if self.operation.trains else tensors(self.forward(way))
        measure_of = frobenius_error if self.operation.trains else largest_error
        return max(measure_of(one, other) for one, other in zip(found, exact, strict=True))

    def chosen(self) -> str:
        """The implementation that `skd_kernels` takes for ours."""
        with self.cast:
            return skd_kernels.explain(self.operation.name, *self.inputs, **self.own_arguments()).chosen  # type: ignore[arg-type]


def tensors(out: Tensor | Inputs) -> Inputs:
    return out if isinstance(out, tuple) else (out,)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    if found.shape != exact.shape:
        return float("inf")
    # One token has no covariance: then nothing but zeros is right.
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny))


def frobenius_error(found: Tensor, exact: Tensor) -> float:
    """Relative; at the width 0 many gradients are zeros."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-6))


@dataclass
class Measurement:
    """What one run of `measure` found."""

    case: Case
    work: Work  # of what was timed
    copied: int  # bytes that `COPY` reads and writes
    errors: dict[str, float]
    calls: dict[str, Call]  # each takes the next of the rotated inputs
    implementation: str
    seconds: dict[str, float] = field(default_factory=dict)  # median of one call

    @property
    def copy_bandwidth(self) -> float:
        return self.copied / self.seconds[COPY]

    def bandwidth(self, contender: str) -> float:
        """Bytes that the operation has to move, per second."""
        return self.work.bytes / self.seconds[contender]

    def extra_info(self) -> dict[str, object]:
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
    case: Case, names: Sequence[str] | None = None, *, backward: bool = True, rounds: int = 7, budget: float = 2.0,
    copied: int = 256 << 20,
) -> Measurement:  # fmt: skip
    """Check every contender of a case, then time all of them and a plain copy in turn.

    Args:
        names: of the contenders; None for all.
        backward: with its backward pass, if the operation has one.
        rounds, budget: as for `side_by_side`.
        copied: bytes that the copy reads and writes.

    Raises:
        RuntimeError: a contender's result is wrong.
    """
    torch.compiler.reset()
    contenders = case.contenders(names)
    errors = case.check(contenders)
    calls = case.calls(contenders, backward)
    source = torch.ones(copied // 2, dtype=torch.uint8, device=case.device)
    target = torch.zeros_like(source)
    found = Measurement(case, case.work(backward), 2 * source.nbytes, errors, calls, case.chosen())
    timed: dict[str, Call] = {**calls, COPY: lambda: target.copy_(source)}
    found.seconds = side_by_side(timed, rounds, budget=budget, clock=clock_of(case.device))
    return found


# The command ----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    operation = gated(OPERATIONS[args.operation]) if args.gated else OPERATIONS[args.operation]
    try:
        shape = parse_shape(args.operation, args.shape)
        with skd_kernels.use(args.implementation) if args.implementation else nullcontext():
            case = Case(operation, shape, DTYPES[args.dtype], args.device, args.megabytes << 20)
            print(checked(case) if args.check else timed(case, args))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.op", description="Time one operation at your shape.")
    axes = "; ".join(f"{operation.axes} for {name}" for name, operation in OPERATIONS.items())
    found.add_argument("operation", choices=OPERATIONS)
    found.add_argument("--shape", required=True, help=f"comma-separated: {axes}")
    found.add_argument("--dtype", choices=DTYPES, default="float32")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=int, help="of PyTorch on the CPU; default: as it is")
    found.add_argument("--implementation", help="force one of ours; default: the one that is chosen by itself")
    found.add_argument("--contenders", help="such as ours,eager; default: all that apply")
    found.add_argument("--forward", action="store_true", help="of a layer, without its backward pass")
    found.add_argument("--check", action="store_true", help="check ours, a masked layer at several widths; no times")
    found.add_argument("--gated", action="store_true", help="the gated masked_mlp, with --check")
    found.add_argument("--rounds", type=int, default=7, help="at least so many")
    found.add_argument("--seconds", type=float, default=2.0, help="go on for so long")
    found.add_argument("--megabytes", type=int, default=256, help="of the inputs used in turn, and of the copy")
    return found


def parse_shape(name: str, text: str) -> Shape:
    axes = OPERATIONS[name].axes
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != len(axes.split(",")) or min(shape) < 1:
        raise ValueError(f"--shape is {text!r}; {name} takes {axes}, positive integers")
    return shape


def gated(operation: Operation) -> Operation:
    """`masked_mlp` with a second first layer, whose output goes through the activation and gates the other's."""
    if operation.name != "masked_mlp":
        raise ValueError(f"--gated is of masked_mlp; {operation.name} has no gate")

    def inputs(shape: Shape, dtype: torch.dtype, stored: torch.dtype, draw: Draw) -> Inputs:
        x, w1, b1, *others = operation.inputs(shape, dtype, stored, draw)
        return x, torch.cat([w1, w1.flip(0)]), torch.cat([b1, b1.flip(0)]), *others

    return replace(operation, inputs=inputs, arguments=lambda shape: operation.arguments(shape) | {"gated": True})


def checked(case: Case) -> str:
    """Print the errors of our operation, one line each. It is kept short, because compute-sanitizer slows it down."""
    name, dtype = case.operation.name, name_of(case.dtype)
    if case.scores is None:
        return f"{name} {dtype}: {case.check(case.contenders([OURS]))[OURS]:.1e}"
    full, limit = case.shape[-1], 5e-2 if case.dtype in HALF else 1e-4
    widths = (0, 8, full // 2 + 1, full)
    return "\n".join(f"{name} {dtype} width {width}: {case.at(width).check_scores(limit):.1e}" for width in widths)


def timed(case: Case, args: argparse.Namespace) -> str:
    """One line per contender; the ratio is its time to the first one's."""
    names = re.split(",(?! )", args.contenders) if args.contenders else None
    found = measure(
        case, names, backward=not args.forward, rounds=args.rounds, budget=args.seconds, copied=args.megabytes << 20
    )
    shape = ",".join(str(size) for size in case.shape)
    threads = f"threads: {torch.get_num_threads()}" if args.device == "cpu" else "launches hidden"
    gigabytes, gigaflops = found.work.bytes / 1e9, found.work.flops / 1e9
    first = found.seconds[next(iter(found.calls))]
    lines = [
        f"{case.operation.name} {shape} {args.dtype} on {args.device}, {threads}; ours: {found.implementation}",
        f"{gigabytes:.3f} GB and {gigaflops:.3f} GFLOP at least; copy {found.copy_bandwidth / 1e9:.1f} GB/s",
        f"{'contender':<14}{'median ms':>10}{'GB/s':>9}{'% of copy':>11}{'GFLOP/s':>10}{'ratio':>8}{'error':>10}",
    ]
    for name in found.calls:
        seconds, bandwidth = found.seconds[name], found.bandwidth(name)
        lines.append(
            f"{name:<14}{1e3 * seconds:>10.3f}{bandwidth / 1e9:>9.2f}{100 * bandwidth / found.copy_bandwidth:>11.1f}"
            f"{found.work.flops / seconds / 1e9:>10.1f}{seconds / first:>8.2f}{found.errors[name]:>10.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
