"""Compiles the extension and all Triton kernels without a GPU, and installs them on a machine that has one.

python -m benchmarks.precompile FOLDER                        with this Python, PyTorch and Triton, for an H100
benchmarks/run_on_gpu.sh OUTPUT --prebuilt FOLDER             uses it there

    FOLDER/manifest.json       for which versions it is, and what it holds
    FOLDER/skd_kernels/_C.*    the compiled extension
    FOLDER/triton.tar.gz       a Triton cache: each kernel that the tests for a GPU and the benchmarks start, and what
                               Triton compiles with gcc to start it

There is no list of these kernels: the tests and benchmarks run on a pretended CUDA device (pretend.py), which records
what they would launch. The kernels are compiled as a launch compiles them, so that their cache keys are the same.
Python and Triton must have the same versions on both machines, and the sources must be the same. Triton's cache keys
also contain a hash of its installation; `use` sets that part to the first machine's by a sitecustomize.py, which
every Python process reads.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaUtils

    from benchmarks.pretend import Wanted

ROOT = Path(__file__).parents[1]
PYTHON = "{}.{}".format(*sys.version_info)
MANIFEST, ARCHIVE = "manifest.json", "triton.tar.gz"

# The folder and its use -----------------------------------------------------------------------------

SITE = '''"""Makes the part of Triton's cache keys that names its installation that of a cache made elsewhere."""

import importlib.util
import pathlib
import runpy
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "triton.runtime.cache":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.triton_key = lambda: {key!r}

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
# Python reads one file of this name: the one that it would have read is read here.
for folder in map(pathlib.Path, sys.path):
    other = folder / "sitecustomize.py"
    if other.is_file() and not other.samefile(__file__):
        runpy.run_path(str(other))
        break
'''


@dataclass(frozen=True)
class Manifest:
    """What a folder holds, and for which machine."""

    python: str  # major and minor version, such as "3.12"
    triton: str  # its version
    key: str  # the part of Triton's cache keys that names the installation that compiled the kernels
    torch: str  # the version that the kernels and the extension were made with
    architectures: list[int]  # of the kernels, 10 * major + minor of the compute capability
    compiled: int  # how many kernels are in the cache, and libraries that start them
    sources: str  # `digest` of what was compiled

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises ValueError if the folder is not one of `benchmarks.precompile`."""
        try:
            return Manifest(**json.loads((folder / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} is not what `python -m benchmarks.precompile` leaves: {error}") from None

    def refusal(self, architecture: int | None = None) -> str | None:
        """The reason why this Python cannot use the folder on a GPU of that architecture, or None."""
        if self.python != PYTHON:
            return f"it is for Python {self.python}, and this is {PYTHON}"
        triton = installed("triton")
        if triton != self.triton:
            return f"it is for triton {self.triton}, and {triton} is installed"
        if architecture is not None and architecture not in self.architectures:
            return f"it is for the architectures {self.architectures}, and this GPU is of {architecture}"
        return None if digest() == self.sources else "it was made of other sources than these"


def digest() -> str:
    """Of all that is compiled: the extension's sources and the Triton kernels."""
    found = hashlib.sha256()
    patterns = ("setup.py", "csrc/*.cpp", "csrc/*.cu", "csrc/*.h", "skd_kernels/gpu/*.py")
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class InUse:
    """What `use` has put in place."""

    variables: dict[str, str]  # of the environment, that make Python processes use the cache
    extension: bool  # whether there was an extension too


def use(folder: Path, scratch: Path, architecture: int | None = None) -> InUse:
    """Unpack the cache into `scratch` and put the extension in place.

    Raises:
        ValueError: the folder is not for this Python, this GPU and these sources, or it is damaged.
    """
    manifest = Manifest.read(folder)
    if reason := manifest.refusal(architecture):
        raise ValueError(f"{folder} cannot be used: {reason}")
    cache, site = scratch / "triton", scratch / "site"
    try:
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(cache, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        shutil.rmtree(cache, ignore_errors=True)
        raise ValueError(f"{folder / ARCHIVE} cannot be unpacked: {error}") from None
    relocate(cache)
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(key=manifest.key))
    extensions = list((folder / "skd_kernels").glob("_C.*"))
    for extension in extensions:
        target = ROOT / "skd_kernels" / extension.name
        shutil.copy(extension, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)  # a process that has the old one loaded keeps it
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return InUse({"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}, bool(extensions))


def relocate(cache: Path) -> None:
    """Triton writes the whole paths of a kernel's files into its cache: they become those of `cache`."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in paths}}))


def compiled_in(cache: Path) -> dict[str, str]:
    """The name of each kernel in a Triton cache, and of what starts them, by its folder and when it was made."""
    found = [*cache.glob("*/*.cubin"), *cache.glob("*/*.so")]
    return {f"{path.parent.name} {path.stat().st_mtime_ns}": path.name.partition(".")[0] for path in found}


def compiled_since(cache: Path, before: dict[str, str]) -> Counter[str]:
    """How many of each name were compiled into a cache since; the kernels of torch.compile together."""
    added = (name for key, name in compiled_in(cache).items() if key not in before)
    return Counter("torch.compile" if name.startswith("triton_") else name for name in added)


# Finding and compiling ------------------------------------------------------------------------------


class NoDevice:
    """Triton's driver of a device that is only compiled for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    @functools.cached_property
    def utils(self) -> CudaUtils:
        """Triton's functions in C, compiled when they are first asked for."""
        from triton.backends.nvidia.driver import CudaUtils

        return CudaUtils()


def stand_in_for_the_driver(folder: Path) -> None:
    """Make a library of the name of NVIDIA's, which is empty: what Triton compiles in C is linked to it."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-o", str(library), "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    sys.setdlopenflags(os.RTLD_LAZY)  # its functions are looked for when they are called
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def compile_all(launches: list[Wanted], architecture: int, cache: Path, processes: int) -> list[str]:
    """Compile into a Triton cache, `processes` at a time; what could not be compiled, and why."""
    context = multiprocessing.get_context("fork")  # kernels are functions: they cannot be sent to a process
    found, workers = [], []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (launches[start::processes], architecture, cache, Path(folder, str(start)), sender)
            workers.append((context.Process(target=_compile, args=arguments), receiver))
            workers[-1][0].start()
            sender.close()
        for worker, receiver in workers:
            try:
                found += receiver.recv()
            except EOFError:
                found.append("a process that compiled has died; its other kernels are not known")
            worker.join()
    return found


def _compile(launches: list[Wanted], architecture: int, cache: Path, folder: Path, sender: Connection) -> None:
    """In a process of its own: kernels, and what starts each of them."""
    from triton.runtime import driver

    # Only what a launch needs: where a file is missing that Triton has noted, it compiles again.
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    folder.mkdir()
    stand_in_for_the_driver(folder)
    driver.set_active(NoDevice(architecture))
    from triton.backends.nvidia.driver import CudaLauncher

    failed = []
    for wanted in launches:
        try:
            kernel = wanted.kernel.run(grid=(1,), warmup=True, **wanted.arguments, **wanted.options)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            CudaLauncher(kernel.src, kernel.metadata)
        except Exception as error:
            failed.append(f"{wanted.kernel.__name__}: {str(error).strip()[-300:]}")
    sender.send(failed)


def pack(cache: Path, archive: Path) -> None:
    """The whole cache as one file."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(cache.glob("*/*")):
            tar.add(path, str(path.relative_to(cache)))


def build_extension(folder: Path, architectures: list[int]) -> None:
    """By setup.py, with CUDA; RuntimeError with its last words if it fails."""
    names = ";".join("{}.{}".format(*divmod(architecture, 10)) for architecture in architectures)
    environment = {**os.environ, "SKD_CUDA": "on", "TORCH_CUDA_ARCH_LIST": names}
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", temporary]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"setup.py build_ext failed:\n{done.stderr[-3000:]}")


def fill_cache(cache: Path, architectures: list[int], processes: int) -> list[str]:
    """Compile everything for each architecture; what went wrong."""
    from benchmarks.pretend import find_launches

    failed = []
    for architecture in architectures:
        launches, without = find_launches(architecture)
        start = time.perf_counter()
        failed += without + compile_all(launches, architecture, cache, processes)
        seconds = time.perf_counter() - start
        print(f"sm_{architecture}: {len(compiled_in(cache))} compiled, {seconds:.0f} s", flush=True)
    return failed


def precompile(folder: Path, architectures: list[int], processes: int) -> list[str]:
    """Fill `folder`; what went wrong. What it takes is printed as it goes."""
    import torch
    import triton
    from triton.runtime.cache import triton_key

    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    build_extension(folder, architectures)
    print(f"extension for {architectures}: {time.perf_counter() - start:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary)
        failed = fill_cache(cache, architectures, processes)
        pack(cache, folder / ARCHIVE)
        count = len(compiled_in(cache))
    manifest = Manifest(
        python=PYTHON,
        triton=triton.__version__,
        key=triton_key(),
        torch=torch.__version__,
        architectures=architectures,
        compiled=count,
        sources=digest(),
    )
    manifest.write(folder)
    return failed


def architecture_of(text: str) -> int:
    """Such as 90 of "9.0"."""
    major, _, minor = text.partition(".")
    return 10 * int(major) + int(minor or 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=architecture_of, action="append", help="8.0, 9.0 or 10.0; default 9.0")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    args = parser.parse_args(arguments)
    folder = args.folder.absolute()
    failed = precompile(folder, args.arch or [90], args.processes)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{Manifest.read(folder).compiled} kernels and launchers; {args.folder} has {size / 1e6:.1f} MB")
    print("\n".join(failed), end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
