"""Where a committed figure comes from."""

from __future__ import annotations

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
        "versions": {name: info[name] for name in ("skd", "python", "torch", "timm")},
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }
