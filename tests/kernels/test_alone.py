"""`skd_kernels`, its tests and the benchmarks of its operations run where neither skd nor timm can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ("op", "quick", "registry", "registers", "table", "conftest", "test_operations", "on_gpu", "pretend")
FORBID = """
import importlib.abc, sys

class Forbidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("skd", "timm"):
            raise ModuleNotFoundError(f"{name} must not be needed here", name=name)

sys.meta_path.insert(0, Forbidden())
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process where importing skd or timm fails."""
    (tmp_path / "forbid.py").write_text(FORBID)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_they_can_be_imported(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    modules = ["skd_kernels.gpu", *(f"benchmarks.{name}" for name in BENCHMARKS)]
    done = run(tmp_path, "-c", f"import forbid, {', '.join(modules)}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_all_of_these_tests_are_found(tmp_path: Path) -> None:
    done = run(
        tmp_path, "-m", "pytest", "-p", "forbid", "-p", "no:cacheprovider", "--collect-only", "-q", "tests/kernels"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_gpu_triton_mlp.py" in done.stdout and "test_registry.py" in done.stdout


def test_the_ban_works(tmp_path: Path) -> None:
    assert "timm must not be needed here" in run(tmp_path, "-c", "import forbid, timm").stderr
