"""What the JSON of a benchmark run says of the machine: versions and device, no name of host, folder or branch."""

from __future__ import annotations

import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import skd_kernels
from benchmarks.timing import DEVICE, processor

PRIVATE = ("node", "release", "machine_id")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    for key in PRIVATE:
        machine_info.pop(key, None)
    machine_info["cpu"] = {"brand_raw": processor(), "capability": torch.backends.cpu.get_cpu_capability()}
    machine_info["build"] = skd_kernels.build_info()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[object], output_json: dict[str, dict[str, object]]
) -> None:
    for key in ("project", "branch"):
        output_json["commit_info"].pop(key, None)


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print, as a short table, how much longer the other contenders take."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks: list[BenchmarkFixture] = getattr(session, "benchmarks", [])
    for benchmark in benchmarks:
        info = benchmark.extra_info
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in info.get("ratio", {}).items())
        speed = f"; {info['percent_of_copy']} % of copy" if "percent_of_copy" in info else ""
        terminalreporter.write_line(f"{benchmark.name}: {ratios}{speed}")
