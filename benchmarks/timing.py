"""Ratios that survive a noisy machine: contenders take turns in random order, medians are compared."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.sizes import GPU

Call = Callable[[], object]

QUEUE_CYCLES = 4_000_000  # about 2 ms at 1.98 GHz: longer than the launches of most contenders take the host
MOST_ROUNDS = 60


def side_by_side(
    contenders: dict[str, Call], rounds: int, *, budget: float = 0.0, clock: Callable[[Call], float] | None = None
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
    """Seconds on the current CUDA device. The host queues the work while the device is kept busy: no gaps.

    Where launches take longer than that, or wait for the device, the rest of the host's time is in it too.
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


class _TimeOver(BaseException):
    """No Exception: compilers catch those, and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError from the block once it has taken so long. It is stopped in the main thread's Python code."""

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


def report(benchmark: Any, contenders: dict[str, Call], rounds: int = 5) -> None:
    """Time the first contender for the JSON, and keep its ratio to each other one beside it."""
    medians = side_by_side(contenders, rounds)
    ours, *others = contenders
    benchmark.extra_info["median_ms"] = {name: round(1e3 * seconds, 3) for name, seconds in medians.items()}
    benchmark.extra_info["ratio"] = {other: round(medians[other] / medians[ours], 3) for other in others}
    record(benchmark, contenders[ours], rounds)


def record(benchmark: Any, call: Call, rounds: int = 5) -> None:
    """Put the times of `call` itself into the JSON, where `benchmarks.compare` finds them."""

    def complete() -> None:
        call()
        synchronize()

    benchmark.pedantic(complete, rounds=rounds, warmup_rounds=1)
