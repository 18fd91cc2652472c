"""Where a committed figure comes from."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
from typing import Any

import torch

import skd_kernels


def provenance() -> dict[str, Any]:
    """Device, cores, versions, commit and date; no name of host or folder."""
    info = skd_kernels.build_info()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": os.cpu_count(),
        "versions": {name: info[name] for name in ("skd", "python", "torch", "triton", "timm")},
        "commit": printed("git", "rev-parse", "HEAD") or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The name of the CPU, where the package cpuinfo is, which comes with pytest-benchmark."""
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return "CPU"
    return str(get_cpu_info().get("brand_raw", "CPU"))


def printed(*command: str) -> str:
    """What a command prints, its first line; empty where it is not there."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.partition("\n")[0].strip()
    return ""


def machine() -> dict[str, Any]:
    """The same with every GPU that PyTorch sees, the driver, what is compiled, and why skd cannot be imported."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gigabytes": round(properties.total_memory / 1e9, 1),
            }
        )
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    info = skd_kernels.build_info()
    compiled = {name: info.get(name) for name in ("compiled", "reason", "built_with_torch", "cuda", "cuda_toolkit")}
    compiled["cuda_architectures"] = info.get("cuda_architectures")
    return {**provenance(), "devices": devices, "driver": driver, "build": compiled, "skd": refusal_of_skd()}


def refusal_of_skd() -> str:
    """Why skd cannot be imported, in one line; empty where it can."""
    try:
        import skd  # noqa: F401
    except ImportError as error:
        return str(error).partition("\n")[0]
    return ""
