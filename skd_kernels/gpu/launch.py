"""Starting Triton kernels, and recording what would be started so that it can be compiled without a GPU.

Every kernel of this package is started through `launch`. Inside `record(architecture)` nothing runs: `launch` notes
the kernel with the types, constants and alignment that Triton would specialise on, so that what is compiled ahead of
time is what the host code would really start. A module with kernels takes part in this by

* starting them with `launch` only, and asking `device_of` for whatever a launch configuration depends on;
* having a function ``examples()`` that yields ``(label, call)`` pairs: `call` runs the module's host code on meta
  tensors, so that every kernel and every shipped configuration is reached. A label that starts with "quick" is
  compiled in the ordinary test suite, the others in the slow one;
* being named in `skd_kernels.gpu.MODULES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Device:
    """What launch configurations may depend on.

    Attributes:
        architecture: 10 * major + minor of the compute capability.
        multiprocessors: how many programs run at once, at one per multiprocessor.
    """

    architecture: int
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may ask for (CUDA C++ Programming Guide, technical specifications)."""
        return {80: 163, 90: 227, 100: 227, 103: 227}.get(self.architecture, 99) * 1024

    @property
    def has_descriptors(self) -> bool:
        """Whether tiles are copied between memory and shared memory by descriptors of tensors (TMA)."""
        return self.architecture >= 90


RECORDED_DEVICES = {
    80: Device(80, 108),  # A100
    89: Device(89, 128),  # RTX 4090
    90: Device(90, 132),  # H100
    100: Device(100, 148),  # B200
    120: Device(120, 170),  # RTX 5090
}
# Few programs, so that the loops of a persistent kernel take several turns on small inputs.
INTERPRETED_DEVICE = Device(90, 3)


@dataclass(frozen=True)
class Launch:
    """A kernel and all that Triton specialises it on: what ``triton.compiler.ASTSource`` and ``compile`` take."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    resident: int = field(default=1, compare=False)
    label: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def key(self) -> str:
        """A key that is equal for launches that compile to the same code."""
        constants = sorted((name, str(value)) for name, value in self.constants.items())
        return str(
            (self.name, sorted(self.signature.items()), constants, self.divisible_by_16, *self.options().items())
        )

    def options(self) -> dict[str, Any]:
        return options(self.num_warps, self.num_stages, self.max_registers)


def options(num_warps: int, num_stages: int, max_registers: int | None) -> dict[str, Any]:
    """These settings by Triton's names; the limit on registers is left out where there is none."""
    limit = {} if max_registers is None else {"maxnreg": max_registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **limit}


@dataclass
class Recorder:
    device: Device
    label: str = ""
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("skd_kernels_gpu_recorder", default=None)


@contextmanager
def record(architecture: int) -> Iterator[Recorder]:
    """Inside the block `launch` adds to the recorder's `launches`, and starts nothing."""
    recorder = Recorder(RECORDED_DEVICES[architecture])
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


_watchers: list[Callable[[str, dict[str, Any]], None]] = []


@contextmanager
def watch(look: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Inside the block ``look(name, arguments)`` is called for each kernel before it is started, by any thread."""
    _watchers.append(look)
    try:
        yield
    finally:
        _watchers.remove(look)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """The device that a kernel on `tensor` runs on; inside `record` the recorder's device."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.device
    return _cuda_device(tensor.device.index) if tensor.is_cuda else INTERPRETED_DEVICE


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
    resident: int = 1,
) -> None:
    """Start `kernel` on `grid`, on the device of its first tensor argument.

    Args:
        kernel: a ``triton.jit`` function.
        grid: one to three numbers of programs.
        arguments: every parameter of the kernel by name, constants included: tensors, descriptors of tensors,
            numbers, or None. A tensor's storage must start at a multiple of 16 bytes for the code to be the one that
            `record` notes, unless the kernel does not specialise on its alignment.
        num_warps, num_stages: as Triton defines them.
        max_registers: the limit of a thread's registers. Without it ptxas may choose a lower limit, and spill.
        resident: the number of programs that must fit on a multiprocessor together; a test checks the compiled
            kernels for it.
    """
    recorder = _recorder.get()
    if recorder is not None:
        item = _describe(kernel, arguments, (num_warps, num_stages, max_registers), recorder.label)
        recorder.launches.append(replace(item, resident=resident))
        return
    for look in _watchers:
        look(kernel.__name__, arguments)
    tensors = (value.base if isinstance(value, TensorDescriptor) else value for value in arguments.values())
    first = next(value for value in tensors if isinstance(value, torch.Tensor))
    # Triton starts kernels on the current device, which need not be the tensors'.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[tuple(grid)](**arguments, **options(num_warps, num_stages, max_registers))


def _describe(kernel: Any, arguments: dict[str, Any], settings: tuple[int, int, int | None], label: str) -> Launch:
    """The launch, by Triton's rules of specialisation: on constants, None, the int 1, and alignment to 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    missing = {param.name for param in kernel.params} ^ arguments.keys()
    if missing:
        raise TypeError(f"{kernel.__name__}: arguments that are not its parameters, or not given: {sorted(missing)}")
    for param in kernel.params:
        name, value = param.name, arguments[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if not param.do_not_specialize_on_alignment:
                divisible.append(name)
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special and not param.do_not_specialize_on_alignment:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, tuple(divisible), *settings, label=label)
