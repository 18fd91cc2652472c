"""What the JSON of a benchmark run says of the machine: versions and device, no host name."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import skd_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["build"] = skd_kernels.build_info()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """The ratios, as a short table."""
    session = getattr(config, "_benchmarksession", None)
    for benchmark in getattr(session, "benchmarks", []):
        info = ", ".join(f"{name}: {value}" for name, value in benchmark.extra_info.items())
        terminalreporter.write_line(f"{benchmark.name}: {info}")
