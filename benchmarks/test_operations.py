"""The statistics at the layers of DeiT: ours against eager, blocked eager, torch.compile and the published way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import measure
from benchmarks.operations import OPERATIONS
from benchmarks.sizes import SIZES
from benchmarks.timing import record


@pytest.fixture
def threads(request: Any) -> Iterator[Any]:
    """Threads of PyTorch during the test; "gpu" leaves them alone."""
    before = torch.get_num_threads()
    if request.param != "gpu":
        torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch, threads", SIZES.statistics, indirect=["threads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SIZES.models)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark: Any, device: str, name: str, model: str, dtype: str, batch: int, threads: Any) -> None:
    operation = OPERATIONS[name]
    found = measure(operation, operation.shape(model, batch), getattr(torch, dtype), device, budget=SIZES.budget)
    benchmark.extra_info.update(model=model, batch=batch, threads=threads, **found.extra_info())
    record(benchmark, found.calls["ours"], rounds=5)
