"""CUDA graphs without a GPU: a "capture" keeps the function, a "replay" calls it, and no value may be looked at."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import skd_kernels
from skd.training import graph, trainer
from skd.training.graph import StepGraph

ON_THE_HOST = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class NoLooks(TorchDispatchMode):
    """Inside of it nothing may read a tensor's value, or make a tensor of values that the host has now."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ON_THE_HOST, f"{name} reads the device"
        assert name not in ("aten::lift_fresh", "aten::rand", "aten::randn"), f"{name} would be recorded once"
        return func(*args, **kwargs or {})


class FakeGraphs:
    """What `StepGraph` uses of torch.cuda; a graph's replay calls the step that was captured."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = self.released = 0
        self.capturing = None
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
                outer.step()

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
        step = StepGraph._step

        def spy(own):
            if self.capturing is None:
                return step(own)
            if self.error is not None:
                raise self.error
            table = own.trainer.supernet.width_table

            def replayed():
                assert own.trainer.supernet.width_table is table, "the graph reads the table it was captured with"
                with skd_kernels.use("reference"), NoLooks():
                    step(own)

            self.step = replayed

        monkeypatch.setattr(StepGraph, "_step", spy)
        monkeypatch.setattr(graph, "refusal", lambda trainer: None)
        monkeypatch.setattr(trainer, "refusal", lambda trainer: None)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.captures += 1
        self.capturing = graph
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        finally:
            self.capturing = None
