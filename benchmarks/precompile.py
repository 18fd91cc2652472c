"""Everything that takes a compiler, made without a GPU for a machine that has one.

python -m benchmarks.precompile FOLDER                        with this Python, PyTorch and Triton, for an H100
python -m benchmarks.precompile FOLDER --python PATH          with another Python, as the other machine has it
benchmarks/run_on_gpu.sh OUTPUT --prebuilt FOLDER             uses it there

FOLDER gets the extension and a Triton cache with each kernel that the tests for a GPU and the benchmarks start
(gpu_run/prebuilt.py has the layout). Which ones these are is not listed anywhere: tests and benchmarks run with a
CUDA device that is not there (gpu_run/pretend.py). The kernels are compiled as a launch would, so that their cache
keys are those of the run. Python and Triton must have the same versions on both machines, and the sources must be the
same.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import ROOT, prebuilt

TESTS = [f"tests/kernels/test_gpu_triton_{name}.py" for name in ("mlp", "attention", "norm")]
TRAINING = ["tests/test_gpu_training.py"]
BENCHMARKS = ["benchmarks/test_operations.py::test_masked", "benchmarks/test_steps.py"]


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor in a launch: its type, and the remainder of its place in memory by 16."""

    dtype: Any
    remainder: int

    def data_ptr(self) -> int:
        return self.remainder


@dataclass(frozen=True)
class Wanted:
    """A launch, with `Pointer`s in place of tensors."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def key(self) -> str:
        """Equal for launches with the same arguments."""
        return f"{self.kernel.__name__} {sorted(self.arguments.items(), key=str)} {self.options}"


def wanted_by(architecture: int, run: Callable[[], object]) -> dict[str, Wanted]:
    """The launches of `run` on a pretended CUDA device; what it prints is dropped."""
    import torch

    from benchmarks.gpu_run.pretend import pretended_cuda

    found: dict[str, Wanted] = {}

    def note(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        described = {
            name: Pointer(value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        launch = Wanted(kernel, described, options)
        found.setdefault(launch.key(), launch)

    with pretended_cuda(architecture, note), contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            run()
        except Exception as error:
            print(f"{error!r}; before:\n{printed.getvalue()[-2000:]}", file=sys.stderr)
    return found


def programs() -> dict[str, Callable[[], object]]:
    """The tests and benchmarks that start Triton kernels on a GPU, imported when they are called."""
    import pytest

    def tests(paths: list[str]) -> Callable[[], object]:
        options = ["-q", "-p", "no:cacheprovider", "--tb=no", "-m", "gpu or not gpu"]
        return lambda: pytest.main([*options, *(str(ROOT / path) for path in paths)])

    def benchmarks() -> None:
        from benchmarks import timing

        # One turn at one size says all: kernels are the same at every width.
        timing.SIZES = replace(timing.SIZES, rounds=1, averaged=1, fractions=(1.0,), step_fractions=(1.0,))
        tests(BENCHMARKS)()

    def quick() -> None:
        from benchmarks import quick
        from benchmarks.registry import HEADS

        quick.main([*(word for model in HEADS for word in ("--model", model)), "--device", "cuda"])

    def small() -> None:
        from benchmarks.gpu_run import small

        for operation, sizes, dtype in small.CASES:
            small.main([operation, "--sizes", sizes, "--dtype", dtype, "--device", "cuda"])

    return {
        "tests of the kernels": tests(TESTS),
        "tests of training": tests(TRAINING),
        "benchmarks": benchmarks,
        "benchmarks.quick": quick,
        "benchmarks.gpu_run.small": small,
    }


class NoDevice:
    """Triton's driver of a device that is only compiled for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    @functools.cached_property
    def utils(self) -> Any:
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


def _compile(launches: list[Wanted], architecture: int, cache: Path, folder: Path, sender: Any) -> None:
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


def find_launches(architecture: int) -> tuple[list[Wanted], list[str]]:
    """The launches of all programs, and which of these start none; both are printed as they are found."""
    launches: dict[str, Wanted] = {}
    without = []
    for name, run in programs().items():
        found = wanted_by(architecture, run)
        new = found.keys() - launches.keys()
        launches |= found
        without += [] if found else [f"{name} started no kernel"]
        print(f"sm_{architecture}: {name}: {len(found)} launches, {len(new)} of them new", flush=True)
    return list(launches.values()), without


def fill_cache(cache: Path, architectures: list[int], processes: int) -> list[str]:
    """Compile everything for each architecture; what went wrong."""
    failed = []
    for architecture in architectures:
        launches, without = find_launches(architecture)
        start = time.perf_counter()
        failed += without + compile_all(launches, architecture, cache, processes)
        seconds = time.perf_counter() - start
        print(f"sm_{architecture}: {len(prebuilt.compiled_in(cache))} compiled, {seconds:.0f} s", flush=True)
    return failed


def precompile(folder: Path, architectures: list[int], processes: int, *, extension: bool = True) -> list[str]:
    """Fill `folder`; what went wrong. What it takes is printed as it goes."""
    import torch
    import triton
    from triton.runtime.cache import triton_key

    folder.mkdir(parents=True, exist_ok=True)
    if extension:
        start = time.perf_counter()
        build_extension(folder, architectures)
        print(f"extension for {architectures}: {time.perf_counter() - start:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary)
        failed = fill_cache(cache, architectures, processes)
        pack(cache, folder / prebuilt.ARCHIVE)
        count = len(prebuilt.compiled_in(cache))
    manifest = prebuilt.Manifest(
        python="{}.{}".format(*sys.version_info),
        triton=triton.__version__,
        key=triton_key(),
        torch=torch.__version__,
        architectures=architectures,
        compiled=count,
        sources=prebuilt.digest(),
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
    parser.add_argument("--python", help="the interpreter to build with and for; default: this one")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--no-extension", action="store_true", help="the Triton cache only")
    args = parser.parse_args(arguments)
    if args.python and Path(shutil.which(args.python) or args.python).absolute() != Path(sys.executable).absolute():
        words = sys.argv[1:] if arguments is None else arguments
        return subprocess.run([args.python, "-m", "benchmarks.precompile", *words], cwd=ROOT, check=False).returncode
    folder = args.folder.absolute()
    failed = precompile(folder, args.arch or [90], args.processes, extension=not args.no_extension)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{prebuilt.Manifest.read(folder).compiled} kernels and launchers; {args.folder} has {size / 1e6:.1f} MB")
    print("\n".join(failed), end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
