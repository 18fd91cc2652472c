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
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    info = skd_kernels.build_info()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else get_cpu_info()["brand_raw"],
        "cores": os.cpu_count(),
        "versions": {name: info[name] for name in ("skd", "python", "torch", "triton", "timm")},
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def machine() -> dict[str, Any]:
    """The same with every GPU that PyTorch sees, the driver, and what of `skd_kernels` is compiled."""
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
    info = skd_kernels.build_info()
    compiled = {name: info.get(name) for name in ("compiled", "reason", "built_with_torch", "cuda", "cuda_toolkit")}
    compiled["cuda_architectures"] = info.get("cuda_architectures")
    return {**provenance(), "devices": devices, "driver": driver(), "build": compiled}


def driver() -> str | None:
    """The version of NVIDIA's driver, where nvidia-smi tells it."""
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or None
    return None
