"""masked_mlp in Triton, without a GPU: interpreted in a process of its own, and how it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from interpretation import run_interpreted

import skd_kernels as kernels

SHAPES = {"x": (2, 5, 16), "w1": (24, 16), "b1": (24,), "w2": (16, 24), "b2": None}


@pytest.mark.parametrize("file", ["interpreted_mlp.py", "interpreted_products.py"])
def test_interpreted(file: str) -> None:
    run_interpreted(file)


@pytest.mark.slow
def test_more_cases_interpreted() -> None:
    run_interpreted("interpreted_mlp.py", slow=True)


def test_a_width_on_the_device_takes_the_kernels() -> None:
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        chosen = kernels.explain("masked_mlp", **SHAPES, width=(), device="cuda", dtype=dtype)
        assert chosen.chosen == "triton"
        chosen = kernels.explain("masked_mlp", **SHAPES, width=5, device="cuda", dtype=dtype)
        assert chosen.chosen == "slices" and chosen.refused["triton"] == "slices is preferred"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
        ({"device": "xpu"}, "no kernel for xpu"),
        ({"x": (0, 5, 16)}, "is empty"),
        ({"w1": (0, 16), "b1": (0,), "w2": (16, 0)}, "is empty"),
        ({"w1": (2**28, 16), "b1": None, "w2": (16, 2**28)}, "2\\^31 elements"),
    ],
)
def test_what_the_kernels_refuse(change: dict[str, Any], reason: str) -> None:
    pytest.importorskip("triton")
    call: dict[str, Any] = {**SHAPES, "width": (), "device": "cuda"} | change
    assert kernels.explain("masked_mlp", **call).chosen == "reference"
    with kernels.use("triton"), pytest.raises(ValueError, match=reason):
        kernels.explain("masked_mlp", **call)


def test_the_cpu_is_never_chosen_for_interpretation() -> None:
    code = """
import torch, skd_kernels as kernels
shapes = dict(x=(2, 5, 16), w1=(24, 16), b1=(24,), w2=(16, 24), b2=None)
print(kernels.explain("masked_mlp", **shapes, width=3).chosen)
with kernels.use("triton"):
    print(kernels.explain("masked_mlp", **shapes, width=3).chosen)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["slices", "triton"], result.stderr


@pytest.mark.slow
def test_one_compilation_on_the_cpu_serves_every_width() -> None:
    """Through the reference, which is what a width in a compiled graph gets where there is no GPU."""
    torch.manual_seed(0)
    inputs = [torch.randn(size) for size in ((1, 3, 8), (20, 8), (20,), (8, 20), (8,))]
    torch._dynamo.reset()
    compiled = torch.compile(lambda width: kernels.masked_mlp(*inputs, width), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for width in range(20):
            found = compiled(torch.tensor(width, dtype=torch.int32))
            torch.testing.assert_close(found, kernels.masked_mlp(*inputs, width))
