"""The tests of `skd_kernels`, its compiled half and the benchmarks of its operations: neither skd nor timm is needed.

`pytest tests/kernels` runs them alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# PyTorch reads it once: without it cuBLAS refuses torch.use_deterministic_algorithms(True).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# For `benchmarks`. Last, so that the installed package is the one tested, and not the checkout beside it.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every buffer that an operation allocates with NaN, and forbid TF32."""

    def poison(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def launched() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """A list of the kernels that are started, with their arguments; a product has the name of its epilogue."""
    from skd_kernels.gpu.launch import watch

    found: list[tuple[str, dict[str, Any]]] = []
    with watch(lambda name, arguments: found.append((arguments.get("EPILOGUE", name), arguments))):
        yield found


@pytest.fixture(scope="session")
def largest_errors() -> Iterator[dict[str, list[float]]]:
    """If SKD_ERRORS names a file, write the largest errors of the kernels and of PyTorch there, for a table."""
    found: dict[str, list[float]] = {}
    yield found
    if "SKD_ERRORS" in os.environ:
        Path(os.environ["SKD_ERRORS"]).write_text(json.dumps(found))
