"""Everything that takes a compiler, made without a GPU for a machine that has one.

python -m benchmarks.precompile FOLDER                        with this Python, PyTorch and Triton, for an H100
python -m benchmarks.precompile FOLDER --python PATH          with another Python, as the other machine has it
benchmarks/run_on_gpu.sh OUTPUT --prebuilt FOLDER             uses it there

FOLDER gets the extension and a Triton cache with each kernel that the tests for a GPU and the benchmarks start
(prebuilt.py has the layout). Which ones these are is not listed anywhere: tests and benchmarks run with a CUDA device
that is not there (pretend.py). The kernels are compiled as a launch would, so that their cache keys are those of the
run. Python and Triton must have the same versions on both machines, and the sources must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
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

from benchmarks import prebuilt
from benchmarks.prebuilt import ROOT

TESTS = ["tests/kernels/test_gpu_triton_mlp.py", "tests/kernels/test_gpu_triton_attention.py"]
TRAINING = ["tests/test_gpu_training.py"]
BENCHMARKS = ["benchmarks/test_masked.py", "benchmarks/test_steps.py"]


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

    from benchmarks.pretend import pretended_cuda

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
        from benchmarks import sizes

        # One turn at one size says all: kernels are the same at every width.
        sizes.SIZES = replace(sizes.SIZES, rounds=1, averaged=1, fractions=(1.0,), step_fractions=(1.0,))
        tests(BENCHMARKS)()

    def quick() -> None:
        from benchmarks import quick

        quick.main([*(word for model in quick.HEADS for word in ("--model", model)), "--device", "cuda"])

    def small() -> None:
        from benchmarks import small

        for operation, sizes, dtype in small.CASES:
            small.main([operation, "--sizes", sizes, "--dtype", dtype, "--device", "cuda"])

    return {
        "tests of the kernels": tests(TESTS),
        "tests of training": tests(TRAINING),
        "benchmarks": benchmarks,
        "benchmarks.quick": quick,
        "benchmarks.small": small,
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


def compile_all(launches: list[Wanted], architecture: int, cache: Path, processes: int) -> list[str]:
    """Compile into a Triton cache, `processes` at a time; what could not be compiled, and why."""
    context = multiprocessing.get_context("fork")  # kernels are functions: they cannot be sent to a process
    failures = context.Queue()
    workers = [
        context.Process(target=_compile, args=(launches[start::processes], architecture, cache, failures))
        for start in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [failure for _ in workers for failure in failures.get()]
    for worker in workers:
        worker.join()
    return found


def _compile(launches: list[Wanted], architecture: int, cache: Path, failures: Any) -> None:
    from triton.runtime import driver

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    driver.set_active(NoDevice(architecture))
    failed = []
    for wanted in launches:
        try:
            wanted.kernel.run(grid=(1,), warmup=True, **wanted.arguments, **wanted.options)
        except Exception as error:
            failed.append(f"{wanted.kernel.__name__}: {str(error).strip()[-300:]}")
    failures.put(failed)


def pack(cache: Path, archive: Path) -> None:
    """What Triton reads of a kernel that it finds in its cache: the binary, and what is known of it."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(cache.glob("*/*")):
            if path.suffix in (".json", ".cubin"):
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


def precompile(
    folder: Path, architectures: list[int], processes: int, *, extension: bool = True
) -> prebuilt.Manifest:
    """Fill `folder`; what it takes is printed as it goes."""
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
        for architecture in architectures:
            launches: dict[str, Wanted] = {}
            for name, run in programs().items():
                found = wanted_by(architecture, run)
                new = found.keys() - launches.keys()
                launches |= found
                print(f"sm_{architecture}: {name}: {len(found)} launches, {len(new)} of them new", flush=True)
            start = time.perf_counter()
            failed = compile_all(list(launches.values()), architecture, cache, processes)
            print(
                f"sm_{architecture}: {len(prebuilt.kernels_in(cache))} kernels, {time.perf_counter() - start:.0f} s"
            )
            print("\n".join(failed), end="\n" if failed else "", flush=True)
        pack(cache, folder / prebuilt.ARCHIVE)
        count = len(prebuilt.kernels_in(cache))
    manifest = prebuilt.Manifest(
        python="{}.{}".format(*sys.version_info),
        triton=triton.__version__,
        key=triton_key(),
        torch=torch.__version__,
        architectures=architectures,
        kernels=count,
        sources=prebuilt.digest(),
    )
    manifest.write(folder)
    return manifest


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
    manifest = precompile(args.folder.absolute(), args.arch or [90], args.processes, extension=not args.no_extension)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{manifest.kernels} kernels; {args.folder} has {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
