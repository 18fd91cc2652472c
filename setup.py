"""Builds `skd_kernels._C` from csrc/: CPU C++ where there is a compiler, CUDA C++ where there is a toolkit.

    SKD_CUDA=auto|on|off      default auto: CUDA is built when nvcc is found; on: it is an error when it is not
    TORCH_CUDA_ARCH_LIST      default 8.0;9.0;10.0 (no GPU is needed to build)
    MAX_JOBS                  default from the cores and the free memory

What is built, and why not the rest, is printed. Everything but the build is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0"
GIGABYTES_PER_JOB = 3  # nvcc on the stable ABI's headers
# Reassociation is what vectorised sums need; -ffast-math would also assume that there is no NaN.
CXX_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
# The oldest torch whose stable ABI is used: one build serves it and every later one.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def say(message: str) -> None:
    print(f"skd: {message}", file=sys.stderr, flush=True)


def cuda_home() -> tuple[str | None, str]:
    """(toolkit folder, '') or (None, why there is none). nvcc may be a link or a wrapper: it knows its own folder."""
    nvcc = shutil.which("nvcc")
    given = os.environ.get("CUDA_HOME")
    if given and (Path(given) / "bin" / "nvcc").exists():
        nvcc = str(Path(given) / "bin" / "nvcc")
    if nvcc is None:
        return None, "nvcc is not on PATH (install the CUDA toolkit, or set CUDA_HOME to its folder)"
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr + dry.stdout, flags=re.MULTILINE)
    if top is None:
        return None, f"{nvcc} --dryrun does not say where its toolkit is; set CUDA_HOME to the toolkit's folder"
    return str(Path(top.group(1).strip()).resolve()), ""


def wanted_cuda() -> str | None:
    """The toolkit to build CUDA with, or None; printed or raised as SKD_CUDA asks."""
    mode = os.environ.get("SKD_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"SKD_CUDA is {mode!r}; it may be auto, on or off")
    if mode == "off":
        say("CUDA kernels are not built: SKD_CUDA=off")
        return None
    home, reason = cuda_home()
    if home is None:
        if mode == "on":
            raise SystemExit(f"SKD_CUDA=on, but {reason}")
        say(f"CUDA kernels are not built: {reason}")
    return home


def default_jobs() -> str:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = 4.0
    return str(max(1, min(os.cpu_count() or 1, int(free / GIGABYTES_PER_JOB))))


def extensions() -> tuple[list, dict]:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        if os.environ.get("SKD_CUDA", "auto").lower() == "on":
            raise SystemExit("SKD_CUDA=on, but there is no C++ compiler (install g++, or set CXX)")
        say("WARNING: no C++ compiler, nothing is compiled; every operation will run its PyTorch reference")
        return [], {}
    home = wanted_cuda()
    if home is not None:  # both must be set before cpp_extension is imported
        os.environ["CUDA_HOME"] = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    os.environ.setdefault("MAX_JOBS", default_jobs())

    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils import cpp_extension

    sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
    defines = [*STABLE_ABI, f'-DSKD_BUILT_WITH_TORCH="{torch.__version__}"']
    includes = [*cpp_extension.include_paths(), pybind11.get_include(), str(CSRC)]
    link: list[str] = []
    if home is not None:
        sources += sorted(str(path) for path in CSRC.glob("*.cu"))
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        defines += ["-DUSE_CUDA", f'-DSKD_CUDA_ARCHITECTURES="{architectures}"']
        includes.append(str(Path(home) / "include"))
        # The runtime is linked in and torch_cuda is not needed: one file loads under CUDA and CPU builds of torch.
        link = [f"-L{Path(home) / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        say(f"building CPU and CUDA kernels, toolkit {home}, architectures {architectures}")
    else:
        say("building CPU kernels")
    extension = Extension(
        "skd_kernels._C",
        sources,
        include_dirs=includes,
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "c10"],
        extra_compile_args={"cxx": [*CXX_FLAGS, *defines], "nvcc": [*NVCC_FLAGS, *defines]},
        extra_link_args=link,
        depends=sorted(str(path) for path in CSRC.glob("*.h")),
        language="c++",
    )
    return [extension], {"build_ext": cpp_extension.BuildExtension}


modules, commands = extensions()
setup(ext_modules=modules, cmdclass=commands)
