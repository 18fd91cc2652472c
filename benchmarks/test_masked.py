"""masked_mlp and masked_attention at the layers of DeiT: ours, library calls on slices, torch.compile, published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import ceilings, memory
from benchmarks.masked import MASKED, Case
from benchmarks.operations import COMPILED
from benchmarks.sizes import DEVICE, SIZES
from benchmarks.timing import on_device, record, side_by_side, wall, warm_up

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Sums of thousands of products: rounding of bfloat16, 2^-9 each, averages out to a few times that.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, str], Case]:
    """One per operation and model, so that what torch.compile has compiled serves the next width."""
    return {}


def case_of(cases: Any, name: str, model: str) -> Case:
    if (name, model) not in cases:
        torch.compiler.reset()
        cases[name, model] = Case(name, model, SIZES.batch, DEVICE, DTYPE)
    return cases[name, model]


@pytest.mark.parametrize("fraction", SIZES.fractions)
@pytest.mark.parametrize("model", SIZES.models)
@pytest.mark.parametrize("name", MASKED)
def test_masked(benchmark: Any, cases: Any, name: str, model: str, fraction: float) -> None:
    """Forward, and forward with backward, of one layer; the cost of the scores; memory; compilations so far."""
    case = case_of(cases, name, model)
    width = case.width(fraction)
    layers = case.layers(width)

    def forward(layer: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(layer)

    passes = {
        "forward": {name: forward(layer) for name, layer in layers.items() if name not in ("ours, scores", COMPILED)},
        "both": {name: (lambda layer=layer: case.gradients(layer)) for name, layer in layers.items()},
    }
    compiling = {name: round(warm_up(call), 2) for name, call in passes["both"].items()}
    errors = case.check(width, TOLERANCE[DTYPE])
    clock = on_device if DEVICE == "cuda" else wall
    peak = ceilings.matmul(DEVICE, DTYPE)
    seconds = {which: side_by_side(calls, SIZES.rounds, clock=clock) for which, calls in passes.items()}
    benchmark.extra_info.update(
        masked=name,
        model=model,
        batch=SIZES.batch,
        dtype=str(DTYPE).removeprefix("torch."),
        fraction=fraction,
        width=width,
    )
    for which, found in seconds.items():
        work = case.work(width, backward=which == "both")
        benchmark.extra_info[which] = {
            "median_ms": {name: round(1e3 * value, 4) for name, value in found.items()},
            "ratio": {name: round(value / found["ours"], 3) for name, value in found.items() if name != "ours"},
            "tflops": {name: round(work.flops / value / 1e12, 4) for name, value in found.items()},
            "percent_of_matmul": {name: round(100 * work.flops / value / peak, 1) for name, value in found.items()},
            "bytes": work.bytes,
            "flops": work.flops,
        }
    both = seconds["both"]
    benchmark.extra_info["scores_cost"] = round(both["ours, scores"] / both["ours"] - 1, 4)
    benchmark.extra_info["peak_mb"] = {
        name: memory.peak_of_call(call, DEVICE) for name, call in passes["both"].items()
    }
    benchmark.extra_info["warm_up_seconds"] = compiling
    benchmark.extra_info["compilations"] = case.compiled.compilations
    benchmark.extra_info["error"] = {name: float(f"{error:.2g}") for name, error in errors.items()}
    benchmark.extra_info["median_ms"] = {"ours": benchmark.extra_info["both"]["median_ms"]["ours"]}
    assert COMPILED in both
    record(benchmark, passes["both"]["ours"], rounds=3)
