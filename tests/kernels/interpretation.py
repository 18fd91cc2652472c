"""Running tests of the Triton kernels without a GPU, by Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from torch.torch_version import TorchVersion


def run_interpreted(file: str, *, slow: bool = False) -> None:
    """Check that all tests of a file pass and none is skipped, in a process with TRITON_INTERPRET from the start.

    Args:
        slow: run the tests that are marked slow, and not the others.
    """
    triton = pytest.importorskip("triton")
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy < 2.4, not {numpy.__version__}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(("-m", "slow") if slow else ()),
        file,
    ]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
