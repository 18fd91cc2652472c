"""The CPU kernels under the address and undefined-behaviour sanitizers, for every size of registers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = ("library.cpp", "moments_cpu.cpp", "taylor_cpu.cpp", "attention_cpu.cpp")
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
FLAGS = ["-g1", "-O1", "-std=c++20", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def compiler_says(question: str) -> str:
    return subprocess.run(["g++", question], capture_output=True, text=True, check=True).stdout.strip()


def build(folder: Path, sources: Path, register_bytes: int) -> Path:
    library = folder / f"kernels{register_bytes}.so"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    command = ["g++", *FLAGS, *SANITIZE, f"-DSKD_MOST_REGISTER_BYTES={register_bytes}", *includes]
    subprocess.run([*command, *(str(sources / name) for name in SOURCES), *links, "-o", str(library)], check=True)
    return library


def run(library: Path) -> subprocess.CompletedProcess:
    preload = f"{compiler_says('-print-file-name=libasan.so')}:{compiler_says('-print-file-name=libstdc++.so')}"
    options = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1",  # Python itself leaves memory behind
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, str(Path(__file__).parent / "sanitized_driver.py"), str(library)]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True, check=False)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or platform.system() != "Linux", reason="needs g++ on Linux"),
]


@pytest.mark.parametrize("register_bytes", [64, 32, 16])
def test_no_sanitizer_reports_anything(tmp_path: Path, register_bytes: int) -> None:
    done = run(build(tmp_path, ROOT / "csrc", register_bytes))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ok:" in done.stdout and "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("cpu_vector.h", "if (count >= both)", "if (count >= both - 1)"),  # reads one element beyond a row
        ("moments_cpu.cpp", "tokens(kBlock * width)", "tokens(kBlock * width - 1)"),  # writes beyond a buffer
        ("taylor_cpu.cpp", "std::min(kBlock, last - token)", "kBlock"),  # reads tokens that are not there
    ],
)
def test_an_error_of_bounds_is_reported(tmp_path: Path, name: str, right: str, wrong: str) -> None:
    """The test above can fail."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / name
    assert right in source.read_text()
    source.write_text(source.read_text().replace(right, wrong))
    done = run(build(tmp_path, tmp_path / "csrc", 64))
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr
