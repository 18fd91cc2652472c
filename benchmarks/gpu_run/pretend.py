"""A CUDA device that is not there, to find out which Triton kernels a program would start on one.

Inside `pretended_cuda` tensors "on CUDA" are PyTorch's meta tensors: they have shapes, types and places in memory,
and no contents. Whoever asks for their device is told that it is CUDA, the operators of the Triton kernels run their
host code, and each kernel that they would start is noted in place of being started. So the tests for a GPU and the
benchmarks say themselves what they need, and nobody keeps a list. A question about contents has a made-up answer:
numbers are zero, conditions hold. A test may then fail at its last line, when all of its kernels are known.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # it must see PyTorch as it is
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from skd_kernels.gpu import attention, entry, launch, mlp
from skd_kernels.residual_norm import residual_norm_backward, residual_norm_forward

CUDA, META = torch.device("cuda", 0), torch.device("meta")
STARTERS = ("hidden", "linear", "weight_gradient", "flash", "projections", "norm")  # modules that start kernels
OPERATORS = {
    operator._qualname: operator
    for operator in (
        *(mlp.mlp_forward, mlp.mlp_backward, attention.attention_forward, attention.attention_backward),
        *(residual_norm_forward, residual_norm_backward),
    )
}
FACTORIES = ["empty", "zeros", "ones", "full", "rand", "randn"]
FACTORIES += [f"{name}_like" for name in FACTORIES]
FACTORIES += ["tensor", "as_tensor", "arange", "randint", "linspace", "eye", "empty_strided"]
METHODS = ["to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
_true_device = torch._C.TensorBase.device.__get__
Note = Callable[[Any, dict[str, Any], dict[str, Any]], None]


def is_pretended(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _true_device(value).type == "meta"


def _true(value: Any) -> Any:
    """The device that stands for CUDA; everything else as it is."""
    named = value if isinstance(value, str) else value.type if isinstance(value, torch.device) else ""
    return META if named.partition(":")[0] == "cuda" else value


def _translated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        return function(*map(_true, args), **{key: _true(value) for key, value in named.items()})

    return call


class _Devices(TorchFunctionMode):
    """Functions of PyTorch that are asked for CUDA get the device that stands for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if func is torch.device else _translated(func)(*args, **(kwargs or {}))


class _Contents(TorchDispatchMode):
    """Runs the operators of the Triton kernels, and answers for contents that are not there.

    Attributes:
        inside: PyTorch's own code is running; it must see the tensors as they are.
    """

    inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        if name in OPERATORS:
            with self._seen_from(False), self, _Devices():
                return OPERATORS[name]._init_fn(*args, **kwargs)
        pretended = [value for value in tree_leaves((args, kwargs)) if is_pretended(value)]
        if pretended and name.startswith("aten::_fused_adam"):
            return None  # an update in place, which meta tensors do not have
        if pretended:
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

    def _made_up(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The answer to a question about contents; None for operations that need none."""
        first = args[0]
        if name == "aten::_local_scalar_dense":
            return True if first.dtype == torch.bool else 0.0 if first.is_floating_point() else 64
        if name == "aten::equal":
            return True
        if name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            return first.new_empty((8,))
        target = kwargs.get("device")
        if name == "aten::_to_copy" and target is not None and target.type == "cpu":
            return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        return None


def _moved(value: Any) -> Any:
    """A tensor of the CPU beside pretended ones, such as a copy that was made up, goes where they are."""
    if isinstance(value, torch.Tensor) and not is_pretended(value) and value.ndim:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return value


class _Stand:
    """Stands for a stream, an event, a graph or a context of CUDA: takes any call."""

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **named: self

    def __enter__(self) -> _Stand:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def elapsed_time(self, other: object) -> float:
        return 1.0


class _Generator(torch.Generator):
    """A generator of the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


@contextmanager
def pretended_cuda(architecture: int, note: Note) -> Iterator[None]:
    """Inside the block there seems to be a CUDA device, and ``note(kernel, arguments, options)`` gets each launch.

    Args:
        architecture: 10 * major + minor of the compute capability, one of `launch.RECORDED_DEVICES`.
        note: gets the ``triton.jit`` function, its arguments by name with pretended tensors among them, and the
            options of the launch.
    """
    contents = _Contents()

    def seems(tensor: torch.Tensor) -> bool:
        return is_pretended(tensor) and not contents.inside

    def start(kernel: Any, grid: Any, arguments: dict[str, Any], **settings: Any) -> None:
        limit = settings.get("max_registers")
        note(kernel, arguments, launch.options(settings["num_warps"], settings["num_stages"], limit))

    _device._device_constructors()  # keeps what it finds: it must find PyTorch's own functions
    modules = [importlib.import_module(f"skd_kernels.gpu.{name}") for name in STARTERS]
    device = launch.RECORDED_DEVICES[architecture]
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
            (torch, "compile", lambda function=None, **_: function if function is not None else lambda plain: plain),
            *((torch.cuda, name, value) for name, value in _cuda(architecture, device.multiprocessors).items()),
            (launch, "_cuda_device", lambda index: device),
            (entry, "_capability", lambda: divmod(architecture, 10)),
            *((module, "launch", start) for module in modules),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(contents)
        stack.enter_context(_Devices())
        yield


def _cuda(architecture: int, multiprocessors: int) -> dict[str, Any]:
    """What `torch.cuda` seems to hold."""
    major, minor = divmod(architecture, 10)
    properties = mock.Mock(major=major, minor=minor, multi_processor_count=multiprocessors, total_memory=80 << 30)
    answers: dict[str, Any] = {
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
    found = {name: (lambda *_, value=value, **__: value) for name, value in answers.items()}
    found |= {name: (lambda *_, **__: None) for name in silent}
    return found | dict.fromkeys(("Stream", "Event", "CUDAGraph", "graph", "device", "stream"), _Stand)
