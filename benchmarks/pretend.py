"""A pretended CUDA device, to find out without a GPU which Triton kernels a program would start on one.

Inside `pretended_cuda` tensors "on CUDA" are PyTorch's meta tensors: they have shapes, types and addresses, but no
contents. Their `device` says CUDA, the operators of the Triton kernels run their host code, and each kernel is
recorded instead of being started. So the kernels that the GPU tests and the benchmarks need are found by running
them, and there is no list to maintain. Reading contents gives made-up values: numbers are zero, and conditions are
true. A test may then fail at its last line, but by then all of its kernels are known.

Of skd_kernels.gpu this file needs only the module `launch`, whose `launch.record` describes every launch.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch._dynamo  # it must see PyTorch as it is
import torch.nn.functional as F
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import on_gpu
from benchmarks.registry import HEADS
from skd_kernels.gpu import launch

if TYPE_CHECKING:
    from triton import JITFunction

    from skd_kernels.gpu.launch import Launch

TESTS = [f"tests/kernels/test_gpu_triton_{name}.py" for name in ("mlp", "attention", "norm")]
TRAINING = ["tests/test_gpu_training.py"]
BENCHMARKS = ["benchmarks/test_operations.py::test_masked", "benchmarks/test_steps.py"]

CUDA, META = torch.device("cuda", 0), torch.device("meta")
FACTORIES = ["empty", "zeros", "ones", "full", "rand", "randn"]
FACTORIES += [f"{name}_like" for name in FACTORIES]
FACTORIES += ["tensor", "as_tensor", "arange", "randint", "linspace", "eye", "empty_strided"]
METHODS = ["to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
_true_device = torch._C.TensorBase.device.__get__
Arguments = dict[str, object]
Note = Callable[["JITFunction", Arguments, dict[str, object]], None]
NoteOperation = Callable[[OpOverload, Sequence[object], Arguments, object], None]


# The device -----------------------------------------------------------------------------------------


def is_pretended(value: object) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    with torch._C.DisableTorchFunction():  # otherwise the pretended device would answer that it is CUDA
        return _true_device(value).type == "meta"


def _true(value: object) -> object:
    """Replace CUDA by the device that stands for it; return any other argument unchanged."""
    named = value if isinstance(value, str) else value.type if isinstance(value, torch.device) else ""
    return META if named.partition(":")[0] == "cuda" else value


def _translated(function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def call(*args: object, **named: object) -> object:
        return function(*map(_true, args), **{key: _true(value) for key, value in named.items()})

    return call


class _Devices(TorchFunctionMode):
    """In calls of PyTorch's functions, replaces CUDA by the device that stands for it."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        translated: Callable[..., object] = func if func is torch.device else _translated(func)
        return translated(*args, **(kwargs or {}))


class _Autocast(TorchFunctionMode):
    """Imitates autocast on CUDA, which meta tensors do not have, for the functions that a training step calls."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in (F.linear, F.conv2d, torch.cat) and torch.is_autocast_enabled("cuda"):
            there = [tensor for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
            dtype = torch.get_autocast_dtype("cuda")
            if func is torch.cat:
                dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in there))
            args = tree_map(lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value, args)
        return func(*args, **(kwargs or {}))


class _Contents(TorchDispatchMode):
    """Runs the operators of the Triton kernels, and answers for contents that are not there.

    Attributes:
        inside: PyTorch's own code is running; it must see the tensors as they are.
    """

    inside = False

    def __init__(self, note: NoteOperation | None = None) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs, name = kwargs or {}, func.name()
        if name in OPDEFS:  # operators in Python, as those of the Triton kernels are
            with self._seen_from(False), self, _Devices():
                return OPDEFS[name]._init_fn(*args, **kwargs)
        result = self._result(func, name, args, kwargs)
        if self.note is not None:
            self.note(func, args, kwargs, result)
        return result

    def _result(self, func: OpOverload, name: str, args: Sequence[object], kwargs: dict[str, object]) -> object:
        if any(is_pretended(value) for value in tree_leaves((args, kwargs))):
            if name.startswith("aten::_fused_adam"):
                return None  # an update in place, which meta tensors do not have
            made_up = self._made_up(name, args, kwargs)
            if made_up is not None:
                return made_up
            args, kwargs = tree_map(_moved, (args, kwargs))
        with self._seen_from(True):
            return func(*args, **kwargs)

    @contextmanager
    def _seen_from(self, inside: bool) -> Iterator[None]:
        before, self.inside = self.inside, inside
        try:
            yield
        finally:
            self.inside = before

    def _made_up(self, name: str, args: Sequence[object], kwargs: dict[str, object]) -> object:
        """The answer to a question about contents; None for operations that need none."""
        first, target = args[0], kwargs.get("device")
        if not isinstance(first, torch.Tensor):
            return None  # a list of them, as `torch.cat` takes
        if name == "aten::_local_scalar_dense":
            return True if first.dtype == torch.bool else 0.0 if first.is_floating_point() else 64
        if name == "aten::equal":
            return True
        if name == "aten::index.Tensor" and any(index.dtype == torch.bool for index in tree_leaves(args[1])):
            return first.new_empty((8,))
        if name == "aten::_to_copy" and isinstance(target, torch.device) and target.type == "cpu":
            dtype = kwargs.get("dtype")
            return torch.zeros(first.shape, dtype=dtype if isinstance(dtype, torch.dtype) else first.dtype)
        return None


def _moved(value: object) -> object:
    """Move CPU tensors that are used together with pretended ones, such as a made-up copy, to their device."""
    if isinstance(value, torch.Tensor) and not is_pretended(value) and value.ndim:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return value


class _Stand:
    """Stands for a stream, an event, a graph or a context of CUDA: takes any call."""

    def __init__(self, *args: object, **named: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Stand]:
        return lambda *args, **named: self

    def __enter__(self) -> _Stand:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def elapsed_time(self, other: object) -> float:
        return 1.0


class _Generator(torch.Generator):
    """A generator of the CPU, whatever device is asked for."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        return super().__new__(cls)


@contextmanager
def pretended_cuda(architecture: int, note: Note, operation: NoteOperation | None = None) -> Iterator[None]:
    """Inside the block there seems to be a CUDA device, and ``note(kernel, arguments, options)`` gets each launch.

    Args:
        architecture: 10 * major + minor of the compute capability, one of `launch.RECORDED_DEVICES`.
        note: gets the ``triton.jit`` function, its arguments by name with pretended tensors among them, and the
            options of the launch.
        operation: gets each operation of PyTorch, its positional and its named arguments and its result. Those of
            autograd are among them; an operator in Python is what it calls.
    """
    contents, described = _Contents(operation), launch._describe
    Settings = tuple[int, int, int | None]

    def seems(tensor: torch.Tensor) -> bool:
        return is_pretended(tensor) and not contents.inside

    def describe(kernel: JITFunction, arguments: Arguments, settings: Settings, label: str) -> Launch:
        note(kernel, arguments, launch.options(*settings))
        return described(kernel, arguments, settings, label)

    _device._device_constructors()  # keeps what it finds: it must find PyTorch's own functions
    multiprocessors = launch.RECORDED_DEVICES[architecture].multiprocessors
    with ExitStack() as stack:
        for owner, name, value in [
            *((torch, name, _translated(getattr(torch, name))) for name in FACTORIES),
            *((torch.Tensor, name, _translated(getattr(torch.Tensor, name))) for name in METHODS),
            (torch.Tensor, "device", property(lambda tensor: CUDA if seems(tensor) else _true_device(tensor))),
            (torch.Tensor, "is_cuda", property(seems)),
            (torch.Tensor, "is_meta", property(lambda tensor: is_pretended(tensor) and not seems(tensor))),
            (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor.to(META)),
            (torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)),
            (torch.nn.Module, "cuda", lambda module, *_: module.to(META)),
            (torch, "Generator", _Generator),
            (torch.accelerator, "current_stream", lambda *_, **__: _Stand()),
            (torch, "compile", lambda function=None, **_: function if function is not None else lambda plain: plain),
            *((torch.cuda, name, value) for name, value in _cuda(architecture, multiprocessors).items()),
            (launch, "_describe", describe),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(launch.record(architecture))
        stack.enter_context(contents)
        stack.enter_context(_Autocast())
        stack.enter_context(_Devices())
        yield


def _cuda(architecture: int, multiprocessors: int) -> dict[str, object]:
    """The replacements for functions of `torch.cuda`."""
    major, minor = divmod(architecture, 10)
    properties = mock.Mock(major=major, minor=minor, multi_processor_count=multiprocessors, total_memory=80 << 30)
    answers: dict[str, object] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretended",
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "mem_get_info": (80 << 30, 80 << 30),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "current_stream": _Stand(),
        "is_current_stream_capturing": False,
    }
    silent = ("synchronize", "set_device", "set_sync_debug_mode", "_sleep", "empty_cache", "reset_peak_memory_stats")
    found: dict[str, object] = {name: (lambda *_, value=value, **__: value) for name, value in answers.items()}
    found |= {name: (lambda *_, **__: None) for name in silent}
    return found | dict.fromkeys(("Stream", "Event", "CUDAGraph", "graph", "device", "stream"), _Stand)


# What programs start on it ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor in a launch: its type, and the remainder of its place in memory by 16."""

    dtype: torch.dtype
    remainder: int

    def data_ptr(self) -> int:
        return self.remainder


def replace_tensors(value: object, stand_in: Callable[[Any], object]) -> object:
    """An argument of a launch with ``stand_in(tensor)`` for a tensor, or for the one that a descriptor describes."""
    if isinstance(value, TensorDescriptor):
        return replace(value, base=stand_in(value.base))
    return stand_in(value) if isinstance(value, (torch.Tensor, Pointer)) else value


@dataclass(frozen=True)
class Wanted:
    """A launch, with `Pointer`s in place of tensors, also of those that are described."""

    kernel: JITFunction
    arguments: Arguments
    options: dict[str, object]

    def key(self) -> str:
        """Equal for launches with the same arguments."""
        return f"{self.kernel.__name__} {sorted(self.arguments.items(), key=str)} {self.options}"


def wanted_by(architecture: int, run: Callable[[], object]) -> dict[str, Wanted]:
    """The launches of `run` on a pretended CUDA device; what it prints is dropped."""
    found: dict[str, Wanted] = {}

    def pointer(tensor: torch.Tensor) -> Pointer:
        return Pointer(tensor.dtype, tensor.data_ptr() % 16)

    def note(kernel: JITFunction, arguments: Arguments, options: dict[str, object]) -> None:
        pointers = {name: replace_tensors(value, pointer) for name, value in arguments.items()}
        wanted = Wanted(kernel, pointers, options)
        found.setdefault(wanted.key(), wanted)

    with pretended_cuda(architecture, note), contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            run()
        except Exception as error:
            print(f"{error!r}; before:\n{printed.getvalue()[-2000:]}", file=sys.stderr)
    return found


def programs() -> dict[str, Callable[[], object]]:
    """The tests and benchmarks that start Triton kernels on a GPU.

    They are imported when they are called: `benchmarks.timing` looks for the device when it is imported.
    """

    def tests(paths: list[str]) -> Callable[[], object]:
        options = ["-q", "-p", "no:cacheprovider", "--tb=no", "-m", "gpu or not gpu"]
        return lambda: pytest.main([*options, *(str(on_gpu.ROOT / path) for path in paths)])

    def benchmarks() -> None:
        from benchmarks import timing

        # One turn at one size says all: kernels are the same at every width.
        timing.SIZES = replace(timing.SIZES, rounds=1, averaged=1, fractions=(1.0,), step_fractions=(1.0,))
        tests(BENCHMARKS)()

    def quick() -> None:
        from benchmarks import quick

        quick.main([*(word for model in HEADS for word in ("--model", model)), "--device", "cuda"])

    def checked() -> None:
        from benchmarks import op

        for words in on_gpu.checked(("float32", "float16", "bfloat16")).values():
            op.main([*words.split(), "--device", "cuda"])

    return {
        "tests of the kernels": tests(TESTS),
        "tests of training": tests(TRAINING),
        "benchmarks": benchmarks,
        "benchmarks.quick": quick,
        "benchmarks.op --check": checked,
    }


def find_launches(architecture: int) -> tuple[list[Wanted], list[str]]:
    """The launches of all programs, and which of these start none; both are printed as they are found."""
    launches: dict[str, Wanted] = {}
    without = []
    for name, run in programs().items():
        found = wanted_by(architecture, run)
        new = found.keys() - launches.keys()
        launches |= found
        without += [] if found else [f"{name} started no kernel"]
        print(f"sm_{architecture}: {name}: {len(found)} launches, {len(new)} of them new", flush=True)
    return list(launches.values()), without
