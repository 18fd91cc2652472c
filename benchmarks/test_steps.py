"""One PIAD training step of DeiT: at shares of the MACs, and on average over a dropout list; see steps.py."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import skd
from benchmarks import steps, timing
from benchmarks.steps import Batch, device_ms, dropout_list, entry_at, spread
from benchmarks.timing import CLOCK, DEVICE, GPU, REHEARSAL, SIZES, Call, record, side_by_side, synchronize

pytestmark = pytest.mark.benchmark(timer=CLOCK.read)
# Of a whole gradient after 12 blocks; bfloat16 rounds every activation to 2^-9.
TOLERANCE = 0.1 if GPU else 1e-3


class Steps:
    """All contenders of one model, built once, with what building and warming up took.

    Attributes:
        failed: why a contender takes no part; the others do.
        supernet: a network without memory, for the MACs of the entries.
    """

    def __init__(self, model: str) -> None:
        torch.compiler.reset()
        self.model = model
        self.supernet = skd.SuperNet(steps.deit(model, "meta"))
        self.supernet.dropout_list = dropout_list(self.supernet)
        batch = steps.images_and_labels(SIZES.batch, DEVICE)
        exact = steps.exact_gradient(model, batch, 0)
        self.all: dict[str, steps.Step] = {}
        self.failed: dict[str, str] = {}
        self.memory: dict[str, float] = {}
        self.warm_up: dict[str, float] = {}
        for name in steps.names(DEVICE):
            with self._excused(name), timing.time_limit(SIZES.ready):
                self._add(name, model, batch, exact)
        if not self.all:
            raise RuntimeError(f"no contender takes a step: {self.failed}")

    @contextmanager
    def _excused(self, name: str) -> Iterator[None]:
        """Record an error that a compiler or the device raises for one contender; the others go on."""
        try:
            yield
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]

    def _add(self, name: str, model: str, batch: Batch, exact: torch.Tensor) -> None:
        before = torch.cuda.memory_allocated() if GPU else 0
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        step = steps.make(name, model, batch, DEVICE)
        compiling = timing.warm_up(lambda: steps.check(step, exact, 0, TOLERANCE))
        self.warm_up[name] = round(compiling + self._warm(step), 2)
        if GPU:
            self.memory[name] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
        self.all[name] = step

    def _warm(self, step: steps.Step) -> float:
        """Seconds that the first calls take beyond the same number of later ones: compilation, capture, tuning.

        New widths may cause new compilations, so each entry that will be timed is called.
        """
        entries = [0] * steps.WARM_UP + sorted({*self.entries().values(), *spread(self.supernet, SIZES.averaged)})
        start = time.perf_counter()
        for entry in entries:
            step(entry)
        synchronize()
        first, start = time.perf_counter() - start, time.perf_counter()
        step(0)
        synchronize()
        return max(first - len(entries) * (time.perf_counter() - start), 0.0)

    def entries(self) -> dict[float, int]:
        """The largest sub-network within each share of the MACs."""
        return {fraction: entry_at(self.supernet, fraction) for fraction in SIZES.step_fractions}

    def fixed(self, entry: int) -> dict[str, Call]:
        """The contenders that a CUDA graph of this one entry makes; empty where there is no GPU."""
        found: dict[str, Call] = {}
        for name, fixed in steps.FIXED.items() if GPU else ():
            if name in self.all:
                with self._excused(fixed), timing.time_limit(SIZES.ready):
                    found[fixed] = steps.replayed(self.all[name], entry)
        return found

    def calls(self, entry: int) -> dict[str, Call]:
        return {name: partial(step, entry) for name, step in self.all.items()}

    def host(self, entry: int) -> dict[str, float]:
        """Milliseconds that a step keeps the host, while the device is idle before it."""
        found = {}
        for name, call in self.calls(entry).items():
            seconds = []
            for _ in range(3):
                synchronize()
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            found[name] = round(1e3 * statistics.median(seconds), 3)
        synchronize()
        return found

    def flops(self, entry: int) -> float:
        """Forward, and twice that in the backward, of the sub-network's MACs in the `full` convention."""
        return 6.0 * float(self.supernet.dropout_list.macs[entry]) * SIZES.batch

    def info(self, seconds: dict[str, float], flops: float) -> dict[str, object]:
        ours, *others = seconds
        peak = timing.matmul_ceiling(DEVICE, torch.bfloat16 if GPU else torch.float32)
        compiled = {name: step.compiled for name, step in self.all.items() if step.compiled is not None}
        return {
            "step": self.model,
            "batch": SIZES.batch,
            "dtype": "bfloat16" if GPU else "float32",
            "threads": "gpu" if GPU else torch.get_num_threads(),
            "median_ms": {name: round(1e3 * value, 3) for name, value in seconds.items()},
            "ratio": {name: round(seconds[name] / seconds[ours], 3) for name in others},
            "tflops": {name: round(flops / value / 1e12, 4) for name, value in seconds.items()},
            "percent_of_matmul": {name: round(100 * flops / value / peak, 1) for name, value in seconds.items()},
            "matmul_tflops": round(peak / 1e12, 4),
            "peak_mb": self.memory,
            "warm_up_seconds": self.warm_up,
            "compilations": {name: found.compilations for name, found in compiled.items()},
            "failed": self.failed,
        }


@pytest.fixture(scope="module", params=SIZES.step_models)
def model(request: pytest.FixtureRequest) -> Iterator[Steps]:
    """The contenders of one model at a time."""
    found = Steps(request.param)
    yield found
    found.all.clear()
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    assert not found.failed, found.failed


def test_mean_step(benchmark: BenchmarkFixture, model: Steps) -> None:
    """The mean over entries spread over the dropout list, each visited in turn: widths change at every step."""
    entries = spread(model.supernet, SIZES.averaged)
    calls = {name: partial(lambda step: [step(entry) for entry in entries], step) for name, step in model.all.items()}
    seconds = {key: value / len(entries) for key, value in side_by_side(calls, min(3, SIZES.rounds)).items()}
    flops = statistics.fmean(model.flops(entry) for entry in entries)
    macs = model.supernet.dropout_list.macs
    benchmark.extra_info.update(model.info(seconds, flops))
    benchmark.extra_info.update(fraction="mean", macs_fraction=round(float(macs[entries].mean() / macs[0]), 4))
    record(benchmark, next(iter(seconds.values())))


@pytest.mark.parametrize("fraction", SIZES.step_fractions)
def test_step(benchmark: BenchmarkFixture, model: Steps, fraction: float) -> None:
    """One sub-network, of the largest MACs within a fraction; on a GPU also in graphs of this one entry."""
    entry = model.entries()[fraction]
    calls = model.calls(entry) | model.fixed(entry)
    seconds = side_by_side(calls, SIZES.rounds)
    macs = model.supernet.dropout_list.macs
    benchmark.extra_info.update(model.info(seconds, model.flops(entry)))
    benchmark.extra_info.update(fraction=fraction, macs_fraction=round(float(macs[entry] / macs[0]), 4))
    if GPU:
        benchmark.extra_info["host_ms"] = model.host(entry)
        benchmark.extra_info["gpu_ms"] = {contender: device_ms(call) for contender, call in calls.items()}
    record(benchmark, next(iter(seconds.values())))


@pytest.mark.skipif(GPU, reason="on a GPU nothing else runs between the sub-networks, and test_step has the memory")
def test_time_against_macs(benchmark: BenchmarkFixture, model: Steps) -> None:
    """Ours, the sub-networks taking turns: time over MACs, relative to the full network. And the peak memory.

    That is of a process that takes two steps at full width, each contender in its own; loading is included.
    """
    first, step = next(iter(model.all.items()))
    entries, macs = (
        {str(fraction): entry for fraction, entry in model.entries().items()},
        model.supernet.dropout_list.macs,
    )
    seconds = side_by_side({fraction: partial(step, entry) for fraction, entry in entries.items()}, SIZES.rounds)
    shares = {fraction: float(macs[entry] / macs[0]) for fraction, entry in entries.items()}
    full = seconds["1.0"]
    benchmark.extra_info.update(
        time_against_macs=model.model,
        contender=first,
        macs_fraction={key: round(share, 4) for key, share in shares.items()},
        time_over_macs={key: round(seconds[key] / full / shares[key], 3) for key in entries},
        median_ms={key: round(1e3 * value, 3) for key, value in seconds.items()},
    )
    if not REHEARSAL:  # six processes that would say nothing
        arguments = {name: (model.model, SIZES.batch, name, DEVICE) for name in steps.names(DEVICE)}
        peaks = {name: timing.peak_of_process(steps.two_steps, *given) for name, given in arguments.items()}
        benchmark.extra_info.update(step_memory=model.model, batch=SIZES.batch, peak_mb=peaks)
    record(benchmark, full)
