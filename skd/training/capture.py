"""A function of tensors, captured once as a CUDA graph and replayed from then on.

A graph reads the same memory at every replay. The arguments are therefore copied to fixed tensors, and everything
that changes from call to call is read from tensors. On an H100 one capture of a training step served every entry, and
1,000 steps of changing entries stayed finite.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping

import torch

WARMUP = 3  # calls before the capture, so that everything is allocated and tuned

Inputs = Mapping[str, torch.Tensor]


class Capture:
    """``capture(inputs)`` is ``function(inputs)``, after the first calls as one CUDA graph.

    Between replays anything may run that changes no tensor which the graph reads, except in place.

    Attributes:
        graph: what is replayed; None before the capture.
        failed: it could not be captured, and calls run one by one.
    """

    def __init__(
        self,
        function: Callable[[Inputs], torch.Tensor],
        device: torch.device,
        *,
        reads: Callable[[], tuple[object, ...]] = tuple,
        fixed: bool = True,
    ) -> None:
        """
        Args:
            function: of named tensors, to one tensor whose shape is always the same.
            device: where they are.
            reads: the objects that the function looks up by itself. If one of them has been replaced, the graph is
                discarded: the next call runs without it, so that kernels compile outside of a capture, and a new
                graph is captured after that.
            fixed: inputs of another shape are an error; otherwise such a call runs by itself, and the graph is made
                for the shape that comes most often.
        """
        self.function, self.device, self.reads, self.fixed = function, device, reads, fixed
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False
        self.stream = torch.cuda.Stream(device)
        self._read: tuple[object, ...] | None = None  # the objects of `reads` that the graph was captured with
        self._inputs: dict[str, torch.Tensor] = {}
        self._others: Counter[tuple[object, ...]] = Counter()  # how often inputs of other shapes came
        self._result: torch.Tensor | None = None

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """One call.

        Raises:
            ValueError: with `fixed`, an input of another shape or dtype than at the first call.
        """
        # Streams and captures are of the current device, which need not be the tensors'.
        with torch.cuda.device(self.device):
            if not self._inputs:
                self._inputs = {name: value.to(self.device, copy=True) for name, value in inputs.items()}
            if not self.fixed and any(not _alike(value, self._inputs[name]) for name, value in inputs.items()):
                if self.graph is not None or self.failed or not self._came_more_often(inputs):
                    return self._on_the_side(inputs).clone()
                # The shape so far was that of an odd batch, such as the last one of the epoch in which a run resumed.
                self._inputs = {name: value.to(self.device, copy=True) for name, value in inputs.items()}
                self.calls = 0
            for name, value in inputs.items():
                there = self._inputs[name]
                if not _alike(value, there):
                    shapes = f"{value.dtype} {tuple(value.shape)} after {there.dtype} {tuple(there.shape)}"
                    raise ValueError(f"train_loader gives {name} of {shapes}; with cuda_graph they must not change")
                there.copy_(value, non_blocking=True)
            result = self._run()
        self.calls += 1
        return result.clone()

    def _came_more_often(self, inputs: Inputs) -> bool:
        """Count this shape, and say whether it has come more often than the one that the graph would be made for."""
        shape = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        self._others[shape] += 1
        return self._others[shape] > self.calls

    def _run(self) -> torch.Tensor:
        reads = self.reads()
        changed = self._read is None or any(old is not new for old, new in zip(self._read, reads, strict=True))
        if changed:  # other kernels may run now; they are compiled in this call, outside of a capture
            self.graph, self._read = None, reads
        if self.graph is None and not (changed or self.failed or self.calls < WARMUP):
            self._capture()
        if self.graph is None or self._result is None:
            return self._on_the_side(self._inputs)
        self.graph.replay()
        return self._result

    def release(self) -> None:
        """Give the graph up, and the tensors that it reads and writes."""
        if self.graph is not None:
            torch.cuda.synchronize(self.device)
            self.graph.reset()
            self.graph = None
        self._inputs, self._result, self._read = {}, None, None

    def _capture(self) -> None:
        """Record a call without executing it. If the capture fails, all later calls run without a graph."""
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # The capture uses the stream of the first calls, because the libraries have their workspaces there. The
            # mode is not "global", because then a loader's thread that pins memory would end the capture. The outer
            # context restores the current stream, which PyTorch 2.11 does not do after a failed capture.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = self.function(self._inputs)
                except RuntimeError as error:
                    cause = error  # ending the capture fails too, with a less informative error
                    raise
        except RuntimeError as error:
            self.failed = True
            reason = str(cause or error).partition("\n")[0]
            warnings.warn(f"cuda_graph: the steps run one by one, because the capture failed: {reason}", stacklevel=2)
        else:
            self.graph = graph

    def _on_the_side(self, inputs: Inputs) -> torch.Tensor:
        """Run the function on the capture's stream: PyTorch requires such warm-up runs there before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)
