"""The statistics at the layers of DeiT: ours against eager, blocked eager, torch.compile and the published way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.measure import measure
from benchmarks.operations import HEADS, OPERATIONS
from benchmarks.timing import record

# Images in a batch, threads. On a CPU a small batch, where the cost of a call shows, and that of `skd convert`.
SETTINGS = [(128, "gpu")] if DEVICE == "cuda" else [(16, 1), (16, 2), (128, 2)]


@pytest.fixture
def threads(request: Any) -> Iterator[Any]:
    """Threads of PyTorch during the test; "gpu" leaves them alone."""
    before = torch.get_num_threads()
    if request.param != "gpu":
        torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch, threads", SETTINGS, indirect=["threads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark: Any, device: str, name: str, model: str, dtype: str, batch: int, threads: Any) -> None:
    operation = OPERATIONS[name]
    budget = 0.5 if DEVICE == "cuda" else 2.0
    found = measure(operation, operation.shape(model, batch), getattr(torch, dtype), device, budget=budget)
    benchmark.extra_info.update(model=model, batch=batch, threads=threads, **found.extra_info())
    record(benchmark, found.calls["ours"], rounds=5)
