"""torch.compile, with its compilations counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sizes import BACKEND


class Compiled:
    """`function` under torch.compile, ints dynamic.

    Attributes:
        compilations: how often a graph was compiled; the first is one of them.
    """

    def __init__(self, function: Callable[..., Any], *, fullgraph: bool = False, backend: str = BACKEND) -> None:
        self.compilations = 0
        self.backend = backend
        self.call = torch.compile(function, dynamic=True, fullgraph=fullgraph, backend=self._compile)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        self.compilations += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.call(*arguments, **named)

    @property
    def limited(self) -> bool:
        """PyTorch stopped compiling, and runs other sizes eagerly."""
        return self.compilations >= torch._dynamo.config.recompile_limit
