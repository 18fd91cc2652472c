"""Ratios that survive a noisy machine: contenders take turns, medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def side_by_side(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over `rounds` rounds of one call each, in turn, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
