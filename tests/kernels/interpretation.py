"""Running tests of the Triton kernels without a GPU, by Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
        "-p",
        "interpretation",
        *(("-m", "slow") if slow else ()),
        file,
    ]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def pytest_configure() -> None:
    """In that process, patch Triton's language for a function that a kernel calls only where it is not patched yet.

    The interpreter patches all of it again at every such call, which takes a third of the time.
    """
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._patch_lang

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = self.fn.__globals__.values()
        if any(language.core.is_builtin(lang.load) for lang in (language, language.core) if lang in seen):
            original(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
