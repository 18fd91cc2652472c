"""Fixtures that many tests share. They import skd when they are used: tests/kernels runs without skd and timm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    import skd

TESTS = Path(__file__).parent
# PyTorch reads it once: without it cuBLAS refuses torch.use_deterministic_algorithms(True).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# For `benchmarks`. Last, so that the installed skd is the one tested, and not the checkout beside it.
sys.path.append(str(TESTS.parent))
# For `tolerances`, the numerics policy of all tests.
sys.path.append(str(TESTS / "kernels"))


@pytest.fixture(autouse=True)
def device_memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test that needs a GPU, free unused device memory, since several processes may share the GPU."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        import torch

        torch.cuda.empty_cache()


@pytest.fixture
def model() -> Any:
    from helpers import tiny_vit

    return tiny_vit()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    from helpers import random_batches

    return random_batches()


@pytest.fixture
def planned(model: Any, batches: Any) -> skd.SuperNet:
    """A converted super-network with a planned dropout list down to an eighth of the MACs."""
    import skd

    supernet = skd.convert(model, batches)
    supernet.dropout_list = skd.plan(supernet, batches, rounds=3)
    return supernet
