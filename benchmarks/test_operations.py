"""The operations at the layers of DeiT, ours against every other way in registry.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.op import DTYPES, OURS, OURS_SCORES, Case, measure, name_of
from benchmarks.registry import COMPILED, MASKED, OPERATIONS, STATISTICS
from benchmarks.timing import CLOCK, DEVICE, SIZES, record, side_by_side

pytestmark = pytest.mark.benchmark(timer=CLOCK.read)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of the masked layers
Cases = dict[tuple[str, str], Case]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int | str]:
    """Threads of PyTorch during the test; "gpu" leaves them alone."""
    before = torch.get_num_threads()
    if request.param != "gpu":
        torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch, threads", SIZES.statistics, indirect=["threads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SIZES.models)
@pytest.mark.parametrize("name", STATISTICS)
def test_operation(
    benchmark: BenchmarkFixture, device: str, name: str, model: str, dtype: str, batch: int, threads: int | str
) -> None:
    """A statistic: time, bandwidth and errors of every contender."""
    operation = OPERATIONS[name]
    case = Case(operation, operation.shape(model, batch), DTYPES[dtype], device, total_bytes=256 << 20)
    found = measure(case, budget=SIZES.budget)
    benchmark.extra_info.update(model=model, batch=batch, threads=threads, **found.extra_info())
    record(benchmark, found.seconds[OURS])


@pytest.fixture(scope="module")
def cases() -> Cases:
    """One per operation and model, so that what torch.compile has compiled serves the next width."""
    return {}


def case_of(cases: Cases, name: str, model: str) -> Case:
    if (name, model) not in cases:
        torch.compiler.reset()
        operation = OPERATIONS[name]
        cases[name, model] = Case(operation, operation.shape(model, SIZES.batch), DTYPE, DEVICE)
    return cases[name, model]


@pytest.mark.parametrize("fraction", SIZES.fractions)
@pytest.mark.parametrize("model", SIZES.models)
@pytest.mark.parametrize("name", MASKED)
def test_masked(benchmark: BenchmarkFixture, cases: Cases, name: str, model: str, fraction: float) -> None:
    """Forward, and forward with backward, of one layer; the cost of the scores; memory; compilations so far."""
    width = OPERATIONS[name].shape(model, SIZES.batch, fraction)[-1]
    case = case_of(cases, name, model).at(width)
    contenders = case.contenders()
    alone = {name: way for name, way in contenders.items() if name not in (OURS_SCORES, COMPILED)}
    passes = {"forward": case.calls(alone, backward=False), "both": case.calls(contenders)}
    info = benchmark.extra_info
    info.update(masked=name, model=model, batch=SIZES.batch, dtype=name_of(DTYPE), fraction=fraction, width=width)
    info["warm_up_seconds"] = {name: round(timing.warm_up(call), 2) for name, call in passes["both"].items()}
    info["error"] = {name: float(f"{error:.2g}") for name, error in case.check(contenders).items()}
    seconds = {
        which: side_by_side(calls, SIZES.rounds, clock=timing.clock_of(DEVICE)) for which, calls in passes.items()
    }
    for which, found in seconds.items():
        info[which] = rates(case, found, backward=which == "both")
    both = seconds["both"]
    info["scores_cost"] = round(both[OURS_SCORES] / both[OURS] - 1, 4)
    info["peak_mb"] = {name: timing.peak_of_call(call, DEVICE) for name, call in passes["both"].items()}
    info["compilations"] = case.compiled.compilations
    info["median_ms"] = {OURS: round(1e3 * both[OURS], 4)}
    record(benchmark, both[OURS])


def rates(case: Case, seconds: dict[str, float], backward: bool) -> dict[str, object]:
    """Times, their ratios, and the share of the product of two large matrices."""
    work, peak = case.work(backward), timing.matmul_ceiling(DEVICE, DTYPE)
    return {
        "median_ms": {name: round(1e3 * value, 4) for name, value in seconds.items()},
        "ratio": {name: round(value / seconds[OURS], 3) for name, value in seconds.items() if name != OURS},
        "tflops": {name: round(work.flops / value / 1e12, 4) for name, value in seconds.items()},
        "percent_of_matmul": {name: round(100 * work.flops / value / peak, 1) for name, value in seconds.items()},
        "bytes": work.bytes,
        "flops": work.flops,
    }
