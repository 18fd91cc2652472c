"""CUDA graphs without a GPU: a capture records its operations, and a replay runs them on the same tensors.

As on a GPU, what Python computes during the capture is not computed again: a Python number that changes from step to
step would keep its captured value. The capture itself leaves all tensors unchanged.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skd_kernels
from skd.training import state

ON_THE_HOST = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def check(func):
    """Refuse operations that read a tensor's value, or make a tensor from values on the host."""
    name = func._schema.name
    assert name not in ON_THE_HOST, f"{name} reads the device"
    assert name not in ("aten::lift_fresh", "aten::rand", "aten::randn"), f"{name} would be recorded once"


class NoLooks(TorchDispatchMode):
    """A mode in which `check` is applied to every operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check(func)
        return func(*args, **kwargs or {})


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def place(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Runs every operation and writes it down; `undo` puts back what has been overwritten."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error  # raised by every operation, unless it is None
        self.calls = []
        self.made = set()  # storages allocated during the capture
        self.before = {}  # for other storages: (tensor, its values) before they were first overwritten

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        check(func)
        if self.error is not None:
            raise self.error
        for declared, value in zip(func._schema.arguments, args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                for tensor in tensors_in(value):
                    if place(tensor) not in self.made | self.before.keys():
                        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                        self.before[place(tensor)] = (whole, whole.clone())
        given = {place(tensor) for tensor in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        self.made |= {place(tensor) for tensor in tensors_in(result)} - given
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self):
        for tensor, values in self.before.values():
            tensor.copy_(values)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_in(result), tensors_in(again), strict=True):
                if place(old) != place(new):
                    old.copy_(new)
            for leaf in tree_leaves(again):
                if isinstance(leaf, torch.ScriptObject):  # the handle of a collective
                    dist.Work.unbox(leaf).wait()


class FakeGraphs:
    """What `Capture` uses of torch.cuda.

    Attributes:
        captures, replays, released: how many there were.
        error: what every capture fails with.
    """

    def __init__(self, monkeypatch):
        self.captures = self.replays = self.released = 0
        self.error = None
        outer = self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

        class CUDAGraph:
            def replay(self):
                outer.replays += 1
                with skd_kernels.use("reference"):
                    self.recording.replay()

            def reset(self):
                outer.released += 1

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "graph": self.graph,
            "synchronize": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(state, "refusal", lambda *_: None)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.captures += 1
        graph.recording = Recording(self.error)
        try:
            with skd_kernels.use("reference"), graph.recording:
                yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        finally:
            graph.recording.undo()
