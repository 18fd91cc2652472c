"""How everything is measured: the sizes of a run, the clocks, the limits of the device, and where it was measured.

Contenders take turns in random order and their medians are compared, because such ratios survive a noisy machine.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

import skd_kernels

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).parent.parent
Call = Callable[[], object]
JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

QUEUE_CYCLES = 4_000_000  # about 2 ms at 1.98 GHz: longer than the launches of most contenders take the host
MOST_ROUNDS = 60
CEILING_TIMES = 20

# The sizes of a run ---------------------------------------------------------------------------------

REHEARSAL = os.environ.get("SKD_REHEARSAL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSAL else "cpu"
GPU = DEVICE == "cuda"
BACKEND = "eager" if REHEARSAL else "inductor"  # of torch.compile


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run of the benchmarks."""

    models: tuple[str, ...] = ("tiny", "small", "base")  # the DeiTs whose layers are timed
    step_models: tuple[str, ...] = ("tiny", "small", "base")  # the DeiTs whose training steps are timed
    batch: int = 128  # images of a masked layer and of a training step
    statistics: tuple[tuple[int, int | str], ...] = ((128, "gpu"),)  # (images, threads); "gpu" leaves them alone
    pixels: int = 224  # height and width of the images of a step
    depth: int = 12  # blocks of the network of a step
    fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.125)  # shares of the full width of a masked layer
    step_fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.125)  # of the MACs of a step
    rounds: int = 7  # turns that each contender of a layer or a step has at least
    averaged: int = 4  # entries that stand for a whole dropout list
    ready: float = 600.0  # seconds that a contender of a step may take until it is ready
    budget: float = 2.0  # seconds that the contenders of a statistic take turns for


# A rented GPU is dear: a model's steps take less than a minute.
ON_GPU = Sizes(
    fractions=(1.0, 0.5, 0.25), step_fractions=(1.0, 0.5, 0.25), rounds=5, averaged=7, ready=30.0, budget=0.5
)
# The statistics of a small batch, where the cost of a call shows, and of the one that `skd convert` takes.
ON_CPU = Sizes(step_models=("tiny",), batch=16, statistics=((16, 1), (16, 2), (128, 2)))
IN_REHEARSAL = Sizes(
    models=("tiny",),
    step_models=("tiny",),
    batch=2,
    statistics=((1, 1),),
    pixels=32,
    depth=2,
    fractions=(0.5,),
    step_fractions=(1.0, 0.5),
    rounds=1,
    averaged=2,
    budget=0.0,
)
SIZES = IN_REHEARSAL if REHEARSAL else ON_GPU if GPU else ON_CPU


# Clocks ---------------------------------------------------------------------------------------------


def side_by_side(
    contenders: Mapping[str, Call], rounds: int, *, budget: float = 0.0, clock: Callable[[Call], float] | None = None
) -> dict[str, float]:
    """Median seconds of each contender over rounds of one call each, in turn, after one warm-up.

    Every round has another order: what a call leaves in the caches, such as lines to be written back, costs the next.

    Args:
        contenders: what to call, by name.
        rounds: at least so many.
        budget: go on until this many seconds are spent (or `MOST_ROUNDS`), if that is later.
        clock: times one call; `wall` by default.
    """
    clock = clock or wall
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    start, turn = time.perf_counter(), 0
    while turn < rounds or (turn < MOST_ROUNDS and time.perf_counter() - start < budget):
        random.shuffle(order)  # another one in each run: an order that is always the same favours the same
        for name, call in order:
            seconds[name].append(clock(call))
        turn += 1
    return {name: statistics.median(values) for name, values in seconds.items()}


def warm_up(call: Call) -> float:
    """Seconds that the first call takes beyond a second one: compilation, tuning."""
    return max(wall(call) - wall(call), 0.0)


def wall(call: Call) -> float:
    """Seconds until the result is there, launches included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def on_device(call: Call) -> float:
    """Seconds on the current CUDA device. The host queues the work while the device is kept busy, so it has no gaps.

    If launches take longer than the device is kept busy, or wait for it, the remaining host time is included.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(call: Call, warm_up: int = 1) -> torch.cuda.CUDAGraph:
    """The work of `call` on the current CUDA device as a graph, after `warm_up` calls that are not captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block: PyTorch does not leave the stream of a capture that fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def clock_of(device: str) -> Callable[[Call], float]:
    """The clock of a device: on a GPU that of the device itself, so that launches are hidden."""
    return on_device if torch.device(device).type == "cuda" else wall


class _TimeOver(BaseException):
    """The time limit's exception. It is not an Exception, because compilers catch those and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError from the block after `seconds`. It interrupts Python code of the main thread."""

    def stop(*_: object) -> None:
        raise _TimeOver

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: the first may be caught all the same
    try:
        yield
    except _TimeOver:
        raise TimeoutError(f"it was not ready after {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


class ReplayedClock:
    """The clock of pytest-benchmark in these suites: it repeats the times that `side_by_side` has taken.

    So the statistics in the JSON are of contenders that took turns, and the comparisons of pytest-benchmark use them.
    """

    now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayedClock()


def record(benchmark: BenchmarkFixture, seconds: float) -> None:
    """Put a time into the JSON; the test must be marked with ``pytest.mark.benchmark(timer=CLOCK.read)``."""
    benchmark.pedantic(CLOCK.advance, args=(seconds,))


def report(benchmark: BenchmarkFixture, contenders: Mapping[str, Call], rounds: int = 5) -> None:
    """Put the time of the first contender into the JSON, and its ratio to each of the others beside it."""
    medians = side_by_side(contenders, rounds)
    ours, *others = contenders
    benchmark.extra_info["median_ms"] = {name: round(1e3 * seconds, 3) for name, seconds in medians.items()}
    benchmark.extra_info["ratio"] = {other: round(medians[other] / medians[ours], 3) for other in others}
    record(benchmark, medians[ours])


# Ceilings and memory --------------------------------------------------------------------------------


@functools.cache
def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a product of two large square matrices."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(device, lambda: a @ b)


@functools.cache
def copy_ceiling(device: str) -> float:
    """Bytes read and written per second by a copy between buffers that no cache holds."""
    source = torch.ones((1 << 30) if device == "cuda" else (128 << 20), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _seconds(device: str, call: Call) -> float:
    """The shortest of several runs, because what other programs take away does not lower the device's limits."""
    clock = clock_of(device)
    call()
    return min(clock(call) for _ in range(CEILING_TIMES))


def peak_of_call(call: Callable[[], object], device: str) -> float:
    """MB that PyTorch's allocator holds for a call at most, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return round(max(held, default=0) / 1e6, 1)


def peak_of_process(work: Callable[..., object], *arguments: object) -> float:
    """MB that ``work(*arguments)`` holds at most in a process of its own; on a GPU what PyTorch allocates there.

    The last of the arguments names the device. The function is found by its name, and the arguments are pickled.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_this_process, work, arguments).result()


def _peak_of_this_process(work: Callable[..., object], arguments: tuple[object, ...]) -> float:
    work(*arguments)
    on_gpu = torch.device(str(arguments[-1])).type == "cuda"
    return round((torch.cuda.max_memory_allocated() if on_gpu else peak_resident()) / 1e6, 1)


def peak_resident() -> int:
    """Bytes. The kernel's count comes first, as getrusage reports the peak of the parent if that was larger."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    unit = 1 if sys.platform == "darwin" else 1024
    return 1024 * int(match[1]) if match else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Where a figure comes from --------------------------------------------------------------------------


def provenance() -> dict[str, JSON]:
    """Device, cores, versions, commit and date; neither the name of a host nor of a folder."""
    info = skd_kernels.build_info()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": os.cpu_count(),
        "versions": {name: info[name] for name in ("skd", "python", "torch", "triton", "timm")},
        "commit": printed("git", "rev-parse", "HEAD") or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def provenance_without_device() -> dict[str, JSON]:
    """Of a result that was computed: versions, commit and date."""
    return {key: value for key, value in provenance().items() if key not in ("device", "cores")}


def write_json(path: Path | None, document: Mapping[str, object]) -> None:
    """Write a result, if the command was given a file for it."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")


def processor() -> str:
    """The name of the CPU, if the package cpuinfo is installed, which comes with pytest-benchmark."""
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return "CPU"
    return str(get_cpu_info().get("brand_raw", "CPU"))


def printed(*command: str) -> str:
    """The first line that a command prints; empty if there is no such command."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.partition("\n")[0].strip()
    return ""


def as_json(value: object) -> JSON:
    """`value` with dictionaries of any kind and sequences as JSON has them; what JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def machine() -> dict[str, JSON]:
    """The provenance, every GPU that PyTorch sees, the driver, what is compiled, and why skd cannot be imported."""
    devices: list[JSON] = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        described = {"name": found.name, "capability": f"{found.major}.{found.minor}"}
        memory = round(found.total_memory / 1e9, 1)
        devices.append({**described, "multiprocessors": found.multi_processor_count, "memory_gigabytes": memory})
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    info = skd_kernels.build_info()
    keys = ("compiled", "reason", "built_with_torch", "cuda", "cuda_toolkit", "cuda_architectures")
    compiled = as_json({name: info.get(name) for name in keys})
    return {**provenance(), "devices": devices, "driver": driver, "build": compiled, "skd": refusal_of_skd()}


def refusal_of_skd() -> str:
    """Why skd cannot be imported, in one line; empty if it can."""
    try:
        import skd  # noqa: F401
    except ImportError as error:
        return str(error).partition("\n")[0]
    return ""
