"""Fixtures that many tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_batches, tiny_vit

import skd

# PyTorch reads it once: without it cuBLAS refuses torch.use_deterministic_algorithms(True).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# For `benchmarks`. Last, so that the installed skd is the one tested, and not the checkout beside it.
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture
def model() -> Any:
    return tiny_vit()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return random_batches()


@pytest.fixture
def planned(model: Any, batches: Any) -> skd.SuperNet:
    """A converted super-network with a planned dropout list down to an eighth of the MACs."""
    supernet = skd.convert(model, batches)
    supernet.dropout_list = skd.plan(supernet, batches, rounds=3)
    return supernet
