"""One run on a machine with a GPU: is everything right there, and how fast is it? Started by run_on_gpu.sh.

    environment   versions, devices, and what is missing
    build         the extension, where no prebuilt one is given
    correctness   the tests that need a GPU
    steps         training steps of DeiT: the mean over a dropout list first, then shares of the MACs
    profile       the kernels of one step
    operations    the masked layers and their kernels, next to the vendor's libraries
    statistics    token moments and Taylor scores
    sanitizers    small runs of every kernel under compute-sanitizer

Every part has a limit of its own, and the whole run has one: what is cut keeps the results that it has, and the parts
after it have their turn. OUTPUT gets run.json (the environment, what became of every command, and which kernels
were compiled), the results as gpu-*.json, tables.md and the logs; the exit status is 1 if a command failed or was
cut. In a rehearsal (`--rehearse`) a CPU, Triton's interpreter and tiny sizes stand in for the GPU: what it measures
means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import ROOT, prebuilt
from benchmarks.gpu_run.limited import Command, Run

SECONDS = 525  # of all commands together: with what comes before and after them, nine minutes
PARTS = ("correctness", "steps", "profile", "operations", "statistics", "sanitizers")
TESTED = ("statistics", "triton_mlp", "triton_attention", "triton_norm")
TESTS_OF_KERNELS = [f"tests/kernels/test_gpu_{name}.py" for name in TESTED]
TESTS_OF_SKD = ["tests/test_gpu.py", "tests/test_gpu_training.py"]
SHAPES = (("token_moments", "300,3,64"), ("token_moments", "70,2,40"), ("taylor_scores", "300,200"))
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Libraries probe the driver with calls that fail. Memcheck would report these, and they are not faults of a kernel.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}


def module(name: str, words: str = "") -> list[str]:
    """``python -m name``."""
    return [sys.executable, "-m", name, *words.split()]


def tests(words: str, results: Path | None = None) -> list[str]:
    """pytest, and where the results of benchmarks go."""
    return [
        *module("pytest", f"-q -p no:cacheprovider {words}"),
        *(["--benchmark-json", str(results)] if results else []),
    ]


# The parts ------------------------------------------------------------------------------------------


def asked(code: str, environment: dict[str, str]) -> tuple[Any, str]:
    """What Python code prints, as JSON, or None and its error. In a process of its own, so that no memory is kept."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None, done.stderr.strip()[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), ""


def architecture(environment: dict[str, str]) -> tuple[int | None, str]:
    """Of the GPU, 10 * major + minor; None and why where there is none."""
    code = "import torch; print(json.dumps(torch.cuda.is_available() and torch.cuda.get_device_capability()))"
    found, error = asked(code, environment)
    return (10 * found[0] + found[1], "") if found else (None, error or "PyTorch sees no GPU")


def describe(run: Run) -> None:
    """Note versions, devices and what is missing."""
    found, error = asked("from benchmarks.timing import machine; print(json.dumps(machine()))", run.environment)
    found = {"error": error} if found is None else found
    if refusal := found.get("skd", error):
        run.missing["skd"] = refusal
    run.note("environment", {**found, "missing": run.missing})
    print(json.dumps(run.notes["environment"], indent=1), flush=True)


def missing() -> dict[str, str]:
    """What a part may need and what is not here, with the reason."""
    packages = ("pytest", "pytest_benchmark", "hypothesis")
    found = {name: f"{name} is not installed" for name in packages if importlib.util.find_spec(name) is None}
    if not Path(SANITIZER).exists():
        found["compute-sanitizer"] = "compute-sanitizer is not installed"
    return found


def build() -> list[Command]:
    return [Command("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 120)]


def correctness(rehearse: bool) -> list[Command]:
    """A rehearsal only finds the tests for a GPU, and runs a few interpreted ones."""
    if rehearse:
        found = tests(f"-m gpu {' '.join(TESTS_OF_KERNELS + TESTS_OF_SKD)}")
        interpreted = tests("tests/kernels/interpreted_mlp.py -k of_every_kind")
        return [Command("tests", found, 60), Command("interpreted", interpreted, 60)]
    # Some tests want a third of the device's memory: they are a group, which one worker runs in turn.
    workers = "-n {} --dist loadgroup" if importlib.util.find_spec("xdist") else ""
    kernels = tests(f"-m gpu {workers.format(10)} {' '.join(TESTS_OF_KERNELS)}")
    training = tests(f"-m gpu {workers.format(4)} {' '.join(TESTS_OF_SKD)}")
    return [Command("kernels", kernels, 100, ("pytest",)), Command("training", training, 100, ("pytest", "skd"))]


def steps(output: Path, models: Sequence[str]) -> list[Command]:
    """Each model in a process of its own: where one ends before its time, the others do not."""
    needs = ("skd", "pytest_benchmark")
    return [
        Command(
            f"steps-{model}", tests(f"benchmarks/test_steps.py -k {model}", step_results(output, model)), 60, needs
        )
        for model in models
    ]


def step_results(output: Path, model: str) -> Path:
    return output / f"gpu-steps-{model}.json"


def profile(output: Path, model: str) -> list[Command]:
    words = [*module("benchmarks.profile", f"--model {model} --json"), str(output / "gpu-profile.json")]
    return [Command(f"profile-{model}", words, 45, ("skd",))]


def operations(output: Path, rehearse: bool) -> list[Command]:
    sizes = "--model base --model small --model tiny"
    if rehearse:
        sizes = "--device cpu --model tiny --batch 1 --tokens 20"
    quick = [*module("benchmarks.quick", f"{sizes} --json"), str(output / "gpu-quick.json")]
    masked = tests("benchmarks/test_operations.py::test_masked", output / "gpu-masked.json")
    return [Command("quick", quick, 40), Command("masked", masked, 75, ("pytest_benchmark",))]


def statistics(output: Path) -> list[Command]:
    words = tests("benchmarks/test_operations.py::test_operation", output / "gpu-statistics.json")
    return [Command("statistics", words, 60, ("pytest_benchmark",))]


def sanitizers(rehearse: bool) -> list[Command]:
    """Under memcheck and racecheck; a rehearsal runs one of the programs without."""
    from benchmarks.gpu_run.small import CASES

    once = "--contenders ours --rounds 1 --seconds 0 --megabytes 1"
    programs = {
        f"{operation}-{shape.replace(',', 'x')}-{dtype}": module(
            "benchmarks.op", f"{operation} --shape {shape} --dtype {dtype} {once}"
        )
        for operation, shape in SHAPES
        for dtype in ("float32", "bfloat16")
    }
    programs |= {
        f"{operation}-{sizes}-{dtype}": module(
            "benchmarks.gpu_run.small", f"{operation} --sizes {sizes} --dtype {dtype}"
        )
        for operation, sizes, dtype in CASES
        if dtype != "float16"
    }
    if rehearse:
        return [Command("masked_mlp-odd", programs["masked_mlp-odd-float32"], 60)]
    return [
        Command(
            f"{tool}-{name}",
            [SANITIZER, "--tool", tool, "--error-exitcode", "1", *options, *words],
            70,
            ("compute-sanitizer",),
        )
        for tool, options in TOOLS.items()
        for name, words in programs.items()
    ]


# The run --------------------------------------------------------------------------------------------


def variables(scratch: Path, rehearse: bool) -> dict[str, str]:
    """The environment of all commands; not what pytest leaves for its own workers, which measure nothing."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "SKD_CUDA": "on"}
    # Every run compiles, or finds prebuilt, what it needs.
    found |= {"TRITON_CACHE_DIR": str(scratch / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    found["TEARDOWN_CUPTI"] = "0"  # or the second of two short profiles may see no kernel
    if rehearse:
        found |= {"SKD_REHEARSAL": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def parts(output: Path, rehearse: bool) -> Iterator[tuple[str, list[Command], int]]:
    """The parts in order: name, commands, and how many of them at a time."""
    models = ["tiny"] if rehearse else ["base", "small", "tiny"]
    yield "correctness", correctness(rehearse), 1 if rehearse else 2
    yield "steps", steps(output, models), 1
    yield "profile", profile(output, models[0]), 1
    yield "operations", operations(output, rehearse), 1
    yield "statistics", statistics(output), 1
    yield "sanitizers", sanitizers(rehearse), 16


def use_prebuilt(run: Run, folder: Path | None, scratch: Path, architecture: int | None) -> bool:
    """Put a prebuilt folder to use; whether there is an extension in it. A warning says why it is not used."""
    if folder is None:
        return False
    try:
        used = prebuilt.use(folder.absolute(), scratch, architecture)
    except ValueError as error:
        print(f"warning: {error}; everything is compiled here", flush=True)
        return False
    run.environment |= used.variables
    return used.extension


def merge_steps(output: Path) -> None:
    """One file of results in place of one a model; what was cut before it had a result is left out."""
    runs = []
    for path in sorted(output.glob("gpu-steps-*.json")):
        with contextlib.suppress(ValueError):
            runs.append(json.loads(path.read_text()))
        path.unlink()
    if runs:
        merged = {**runs[0], "benchmarks": [entry for run in runs for entry in run["benchmarks"]]}
        (output / "gpu-steps.json").write_text(json.dumps(merged, indent=1) + "\n")


def write_tables(output: Path) -> str:
    """tables.md, of the results that there are."""
    from benchmarks import table

    sections = []
    for path in sorted(output.glob("gpu-*.json")):
        try:
            sections.append(table.section([path]))
        except Exception as error:  # half a result must not cost the others
            sections.append(f"{path.name}: {error!r}")
    text = "\n\n".join(sections) + "\n"
    (output / "tables.md").write_text(text)
    return text


def pack_logs(output: Path) -> None:
    logs = sorted(output.glob("*.log"))
    with tarfile.open(output / "logs.tar.gz", "w:gz") as archive:
        for path in logs:
            archive.add(path, path.name)
    for path in logs:
        path.unlink()


def everything(args: argparse.Namespace, output: Path, scratch: Path) -> int:
    start = time.monotonic()
    for old in [*output.glob("gpu-*.json"), *output.glob("*.log")]:
        old.unlink()
    run = Run(output, start + args.seconds, variables(scratch, args.rehearse), missing())
    gpu, reason = (None, "") if args.rehearse else architecture(run.environment)
    if gpu is None and not args.rehearse:
        print(f"error: {reason} (--rehearse runs on a CPU)", file=sys.stderr)
        return 2
    extension, cache = use_prebuilt(run, args.prebuilt, scratch, gpu), scratch / "triton"
    before = prebuilt.compiled_in(cache)
    if gpu is not None and not extension:
        run.environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*divmod(gpu, 10))
        run.part("build", build())
    describe(run)
    for name, commands, at_once in parts(output, args.rehearse):
        if args.part is None or name in args.part:
            run.part(name, commands, at_once)
    compiled = prebuilt.compiled_since(cache, before)
    run.note("kernels", {"prebuilt": len(before), "compiled": dict(compiled)})
    merge_steps(output)
    print(write_tables(output))
    pack_logs(output)
    bad = [done.name for done in run.outcomes if done.status in ("failed", "cut")]
    print(f"{len(before)} kernels and launchers were prebuilt, {compiled.total()} compiled here: {dict(compiled)}")
    print(
        f"{len(run.outcomes)} commands, {time.monotonic() - start:.0f} s; failed or cut: {', '.join(bad) or 'none'}"
    )
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="what python -m benchmarks.precompile left")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all commands; default {SECONDS}")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, interpreted, with tiny sizes")
    args = parser.parse_args(arguments)
    output = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no command outlives this process
    with tempfile.TemporaryDirectory() as scratch:
        return everything(args, output, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
