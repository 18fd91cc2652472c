"""Builds `skd_kernels._C` from csrc/: CPU C++ where there is a compiler, CUDA C++ where there is a toolkit.

    SKD_CUDA=auto|on|off      default auto: CUDA is built when there is an nvcc of PyTorch's CUDA; on: it must be
    TORCH_CUDA_ARCH_LIST      default those of 8.0;9.0;10.0 that nvcc knows (no GPU is needed to build)
    MAX_JOBS                  default from the cores and the free memory

What is built, and why not the rest, is printed. A wheel with CUDA kernels has a build tag, such as 1cu130. Everything
but the build is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

CSRC = Path("csrc")
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
GIGABYTES_PER_JOB = 3  # nvcc on the stable ABI's headers
# Reassociation is what vectorised sums need; -ffast-math would also assume that there is no NaN.
CXX_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
# The oldest torch whose stable ABI is used: one build serves it and every later one.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def say(message: str) -> None:
    print(f"skd: {message}", file=sys.stderr, flush=True)


class Toolkit(NamedTuple):
    nvcc: str
    home: str

    def version(self) -> str:
        """Such as 13.0; empty where nvcc does not say."""
        release = re.search(r"release (\d+\.\d+)", printed(self.nvcc, "--version"))
        return release.group(1) if release else ""

    def default_architectures(self) -> str:
        """Those of the default that nvcc knows; all of them where it does not list any."""
        listed = set(re.findall(r"^sm_(\d+)$", printed(self.nvcc, "--list-gpu-code"), flags=re.MULTILINE))
        unknown = [name for name in DEFAULT_ARCHITECTURES if listed and name.replace(".", "") not in listed]
        if unknown:
            say(f"architectures {';'.join(unknown)} are left out: {self.nvcc} does not know them")
        return ";".join(name for name in DEFAULT_ARCHITECTURES if name not in unknown)


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr + done.stdout


def find_toolkit() -> tuple[Toolkit | None, str]:
    """(toolkit, '') or (None, why there is none). nvcc may be a link or a wrapper: it knows its own folder."""
    nvcc = shutil.which("nvcc")
    given = os.environ.get("CUDA_HOME")
    if given and (Path(given) / "bin" / "nvcc").exists():
        nvcc = str(Path(given) / "bin" / "nvcc")
    if nvcc is None:
        return None, "nvcc is not on PATH (install the CUDA toolkit, or set CUDA_HOME to its folder)"
    top = re.search(r"^#\$ TOP=(.*)$", printed(nvcc, "--dryrun", "-x", "cu", os.devnull), flags=re.MULTILINE)
    if top is None:
        return None, f"{nvcc} --dryrun does not say where its toolkit is; set CUDA_HOME to the toolkit's folder"
    toolkit = Toolkit(nvcc, str(Path(top.group(1).strip()).resolve()))
    reason = mismatch(toolkit)
    return (None, reason) if reason else (toolkit, "")


def mismatch(toolkit: Toolkit) -> str:
    """Why PyTorch's build tools would raise with this toolkit; empty where they take it."""
    import torch

    if torch.version.cuda is None:
        return "the PyTorch it is built against is without CUDA (install a CUDA build of PyTorch)"
    version, major = toolkit.version(), torch.version.cuda.split(".")[0]
    if version and version.split(".")[0] != major:
        return (
            f"{toolkit.nvcc} is of CUDA {version} and PyTorch of CUDA {torch.version.cuda} "
            f"(install a toolkit of CUDA {major}, or set CUDA_HOME to its folder)"
        )
    return ""


def wanted_toolkit() -> Toolkit | None:
    """The toolkit to build CUDA with, or None; printed or raised as SKD_CUDA asks."""
    mode = os.environ.get("SKD_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"SKD_CUDA is {mode!r}; it may be auto, on or off")
    if mode == "off":
        say("CUDA kernels are not built: SKD_CUDA=off")
        return None
    toolkit, reason = find_toolkit()
    if toolkit is None:
        if mode == "on":
            raise SystemExit(f"SKD_CUDA=on, but {reason}")
        say(f"CUDA kernels are not built: {reason}")
    return toolkit


def default_jobs() -> str:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = 4.0
    return str(max(1, min(os.cpu_count() or 1, int(free / GIGABYTES_PER_JOB))))


def extensions() -> tuple[list, dict, dict]:
    """What `setup` takes: extensions, commands and options."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        if os.environ.get("SKD_CUDA", "auto").lower() == "on":
            raise SystemExit("SKD_CUDA=on, but there is no C++ compiler (install g++, or set CXX)")
        say("WARNING: no C++ compiler, nothing is compiled; every operation will run its PyTorch reference")
        return [], {}, {}
    toolkit = wanted_toolkit()
    if toolkit is not None:  # both must be set before cpp_extension is imported
        os.environ["CUDA_HOME"] = toolkit.home
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.default_architectures()
    os.environ.setdefault("MAX_JOBS", default_jobs())

    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils import cpp_extension

    sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
    defines = [*STABLE_ABI, f'-DSKD_BUILT_WITH_TORCH="{torch.__version__}"']
    # The package's pybind11 comes before the copy that PyTorch brings: that of 2.11 refuses to be included with a
    # target of the stable ABI.
    includes = [pybind11.get_include(), *cpp_extension.include_paths(), str(CSRC)]
    link: list[str] = []
    options = {}
    if toolkit is not None:
        sources += sorted(str(path) for path in CSRC.glob("*.cu"))
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        defines += ["-DUSE_CUDA", f'-DSKD_CUDA_TOOLKIT="{toolkit.version()}"']
        defines += [f'-DSKD_CUDA_ARCHITECTURES="{architectures}"']
        includes.append(str(Path(toolkit.home) / "include"))
        # The runtime is linked in and torch_cuda is not needed: one file loads under CUDA and CPU builds of torch.
        options = {"bdist_wheel": {"build_number": f"1cu{toolkit.version().replace('.', '')}"}}
        link = [f"-L{Path(toolkit.home) / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        say(f"building CPU and CUDA kernels, toolkit {toolkit.home}, architectures {architectures}")
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
    return [extension], {"build_ext": cpp_extension.BuildExtension}, options


modules, commands, options = extensions()
setup(ext_modules=modules, cmdclass=commands, options=options)
