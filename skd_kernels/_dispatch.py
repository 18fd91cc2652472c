"""How a call finds its implementation: a small registry, `explain`, `use` and `build_info`.

Every operation registers its implementations in order of preference. An implementation is a function with the
operation's own arguments and a predicate that returns None, or the reason why it refuses this call. Predicates see
`TensorSpec`s, never tensors, so `explain` answers from shapes alone and selection cannot touch data.
"""

from __future__ import annotations

import inspect
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, NamedTuple, NotRequired, ParamSpec, TypedDict, TypeVar

import torch

from skd_kernels import _native

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class TensorSpec(NamedTuple):
    """What a predicate may know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    needs_grad: bool = False

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        needs_grad = tensor.requires_grad and torch.is_grad_enabled()
        return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device.type, needs_grad)


@dataclass(frozen=True)
class Implementation(Generic[_Result]):
    """One way to compute an operation; `refuses(**arguments)` gives None or the reason."""

    name: str
    function: Callable[..., _Result]
    refuses: Callable[..., str | None]


@dataclass
class Operation(Generic[_Result]):
    """A public function and its implementations, best first."""

    name: str
    signature: inspect.Signature
    implementations: list[Implementation[_Result]] = field(default_factory=list)

    def implementation(
        self, name: str, refuses: Callable[..., str | None]
    ) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
        """A decorator that registers an implementation under `name`."""

        def register(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
            self.implementations.append(Implementation(name, function, refuses))
            return function

        return register

    def names(self) -> list[str]:
        return [implementation.name for implementation in self.implementations]

    def select(self, arguments: dict[str, object]) -> tuple[Implementation[_Result], dict[str, str]]:
        """The implementation for `arguments`, and the reason why each one before it was refused."""
        specs = {name: _spec(value) for name, value in arguments.items()}
        name = forced()
        only = name if name is not None and name in self.names() else None
        refused: dict[str, str] = {}
        for implementation in self.implementations:
            if only and implementation.name != only:
                refused[implementation.name] = f"use({only!r}) is in force"
                continue
            reason = implementation.refuses(**specs)
            if reason is None:
                return implementation, refused
            refused[implementation.name] = reason
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"{self.name}: no implementation accepts this call ({reasons})")

    def __call__(self, **arguments: object) -> _Result:
        implementation, _ = self.select(arguments)
        return implementation.function(**arguments)


_operations: dict[str, Operation[Any]] = {}
# The implementations forced by the open blocks of `use`, innermost last. Each name is wrapped in a list, so that two
# blocks with the same name can be told apart when one ends.
_forced: ContextVar[tuple[list[str], ...]] = ContextVar("skd_kernels_forced", default=())
# The same for torch.compile, which cannot trace a ContextVar but guards on the fields of this object: `name`, the
# implementation in force in this thread, and `entered`, the names of all open blocks.
_forced_in_graphs = threading.local()


def operation(public: Callable[..., _Result]) -> Operation[_Result]:
    """The operation of the public function `public`, which is registered when this is first called for it."""
    return _operations.setdefault(public.__name__, Operation(public.__name__, inspect.signature(public)))


def forced() -> str | None:
    """The name that `use` forces here, if any. A compiled graph is guarded on the name in force in its thread."""
    if torch.compiler.is_compiling():
        return getattr(_forced_in_graphs, "name", None)
    entered = _forced.get()
    return entered[-1][0] if entered else None


def always(**_: object) -> None:
    """The predicate of a reference implementation, which refuses nothing."""


def _spec(value: object) -> object:
    return TensorSpec.of(value) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call gets.

    Attributes:
        operation: name of the operation.
        chosen: name of the implementation that would run.
        refused: for each implementation not taken, the reason.
    """

    operation: str
    chosen: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(
    op: str | Callable[..., object],
    *args: object,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **kwargs: object,
) -> Explanation:
    """Say which implementation of `op` a call would get, and why each other one would not run.

    Args:
        op: the public function or its name, e.g. ``skd_kernels.masked_mlp`` or ``"masked_mlp"``.
        *args, **kwargs: the arguments of the call. Wherever the call takes a tensor, a shape (tuple of int) does
            too: no memory is allocated.
        dtype, device: of the tensors given as shapes.

    Returns:
        An `Explanation`; ``print`` it for a readable table.

    Raises:
        ValueError: unknown operation, arguments that do not bind to it, or no implementation that accepts them.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name == "weighted_covariance":
        name = "token_moments"  # weighted_covariance calls that operation
    if name not in _operations:
        raise ValueError(f"op is {name!r}; it may be one of {sorted(_operations)}")
    entry = _operations[name]
    try:
        bound = entry.signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    bound.apply_defaults()
    spec_device = torch.device(device).type

    def spec(value: object) -> object:
        if isinstance(value, tuple | list | torch.Size):
            return TensorSpec(tuple(int(size) for size in value), dtype, spec_device)
        return _spec(value)

    chosen, refused = entry.select({key: spec(value) for key, value in bound.arguments.items()})
    after = entry.names()[entry.names().index(chosen.name) + 1 :]
    refused |= {other: f"{chosen.name} is preferred" for other in after if other not in refused}
    return Explanation(name, chosen.name, refused)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force the implementation called `name` in every operation that has one of that name.

    Inside the block such an operation raises ValueError when `name` refuses the call; operations without an
    implementation of that name choose as usual. Blocks nest, and the innermost counts.

    It holds only for the thread (and the asyncio task) that is in the block. Code under torch.compile follows it as
    well: a call inside the block gets a graph of its own, compiled once, and a call after the block gets the earlier
    graph again. If several asyncio tasks of one thread are in blocks at the same time, compiled code follows the
    block that was entered last, whichever task calls.

    Raises:
        ValueError: no operation has an implementation of that name.
    """
    known = sorted({n for entry in _operations.values() for n in entry.names()})
    if name not in known:
        raise ValueError(f"name is {name!r}; it may be one of {known}")
    this = [name]
    _forced.set((*_forced.get(), this))
    try:
        with _used_in_graphs(this):
            yield
    finally:
        _forced.set(tuple(other for other in _forced.get() if other is not this))


@contextmanager
def _used_in_graphs(this: list[str]) -> Iterator[None]:
    """Set the name that compiled code of this thread sees; asyncio tasks may leave their blocks in any order."""
    entered: list[list[str]] = _forced_in_graphs.__dict__.setdefault("entered", [])
    entered.append(this)
    _forced_in_graphs.name = this[0]
    try:
        yield
    finally:
        entered[:] = [other for other in entered if other is not this]
        _forced_in_graphs.name = entered[-1][0] if entered else None


class BuildInfo(TypedDict):
    """What `build_info` returns; the last fields are there where the extension is compiled."""

    skd: str | None
    python: str
    torch: str
    triton: str | None
    timm: str | None
    cuda_available: bool
    compiled: bool
    reason: str
    implementations: dict[str, list[str]]
    compiler: NotRequired[str]
    built_with_torch: NotRequired[str]
    cpu_levels: NotRequired[str]
    cpu_level_in_use: NotRequired[str]
    cuda: NotRequired[bool]
    cuda_toolkit: NotRequired[str]
    cuda_architectures: NotRequired[str]


def build_info() -> BuildInfo:
    """The versions, and which parts of the package are compiled in this installation."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    module = _native.module
    info: BuildInfo = {
        "skd": installed("skd"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "timm": installed("timm"),
        "cuda_available": torch.cuda.is_available(),
        "compiled": module is not None,
        "reason": _native.failure,
        "implementations": {name: entry.names() for name, entry in _operations.items()},
    }
    if module is not None:
        info.update(module.build_info())
    return info
