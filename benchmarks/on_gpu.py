"""One run on a machine with a GPU: is everything right there, and how fast is it? Started by run_on_gpu.sh.

    environment   versions, devices, and what is missing
    build         the extension, unless a prebuilt one is given
    correctness   the tests that need a GPU
    steps         training steps of DeiT: the mean over a dropout list first, then shares of the MACs
    profile       the kernels of one step
    operations    the masked layers and their kernels, next to the vendor's libraries
    statistics    token moments and Taylor scores
    sanitizers    small runs of every kernel under compute-sanitizer

Every part has a time limit, and so has the whole run. A command that is cut off at its limit keeps the results that
it has, and the next part follows. OUTPUT gets run.json (the environment, the outcome of every command, and which
kernels were compiled), the results as gpu-*.json, tables.md and the logs. The exit status is 1 if a command failed or
was cut. A rehearsal (`--rehearse`) replaces the GPU by a CPU, Triton's interpreter and tiny sizes, so that its
measurements mean nothing. This process does not import PyTorch before the commands have ended, so that it holds no
memory of the GPU.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import precompile

ROOT = Path(__file__).parents[1]
SECONDS = 525  # for all commands together; with the work before and after them the run takes nine minutes
GRACE = 8.0  # seconds from the interrupt, after which pytest writes what it has, to the end
FEWEST = 5.0  # seconds that a command is worth starting for
PARTS = ("correctness", "steps", "profile", "operations", "statistics", "sanitizers")
TESTS_OF_KERNELS = " ".join(
    f"tests/kernels/test_gpu_{name}.py" for name in ("statistics", "triton_mlp", "triton_attention", "triton_norm")
)
TESTS_OF_SKD = "tests/test_gpu.py tests/test_gpu_training.py"
# What compute-sanitizer can watch in a minute, as arguments of benchmarks.op: operation, shape, kind of shape. Odd
# shapes leave a last, incomplete tile to every kernel. In aligned ones C = 256 and F = 256, so that in half precision
# the products compile to the very kernels of DeiT-Base, which on an H100 have tiles of 128 x 64 to 128 x 256.
CHECKED = [
    ("token_moments", "300,3,64", "heads"),
    ("token_moments", "70,2,40", "odd"),
    ("taylor_scores", "300,200", "odd"),
    ("masked_mlp", "2,37,72,200,200", "odd"),
    ("masked_mlp", "16,36,256,256,256", "aligned"),
    ("masked_mlp", "16,36,256,256,256", "gated"),
    ("masked_attention", "2,37,3,24,24", "odd"),
    ("masked_attention", "16,36,4,64,64", "aligned"),
]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Libraries probe the driver with calls that fail. Memcheck would report these, and they are not faults of a kernel.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}

# Commands with a time limit each, and one for all of them ---------------------------------------------


@dataclass(frozen=True)
class Command:
    """One process."""

    name: str  # of its log
    words: Sequence[str]  # the program and its arguments
    limit: float  # seconds
    needs: tuple[str, ...] = ()  # names in `Run.missing`; it is left out if one of them is missing


@dataclass
class Outcome:
    """The outcome of a command: it passed, failed, was cut off at its time limit, or was left out; and the reason."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Running:
    """A running command, in a process group of its own. At its limit it is interrupted, and killed if it goes on."""

    command: Command
    process: subprocess.Popen[bytes]
    start: float  # by `time.monotonic`
    end: float  # when it must end or is killed
    cut: bool = False  # it has been interrupted

    def over(self) -> bool:
        """Whether the command has ended. At its time limit this interrupts it, and kills it some seconds later."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() >= self.end:
            self.signal(signal.SIGKILL if self.cut else signal.SIGINT)
            self.cut, self.end = True, time.monotonic() + GRACE
        return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the command."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass
class Run:
    """The run: its commands share an output folder, an environment and a deadline."""

    output: Path  # the folder of logs and results. Its run.json has the notes and the outcomes at any time
    end: float  # when all must be over, by `time.monotonic`
    environment: dict[str, str]  # variables of all commands
    missing: dict[str, str]  # what is not here, with the reason
    outcomes: list[Outcome] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    def part(self, name: str, commands: Sequence[Command], at_once: int = 1) -> None:
        """Run commands, `at_once` at a time, and record the outcome of each. None of them outlives this call."""
        print(f"== {name}", flush=True)
        waiting, running = list(commands), list[Running]()
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running += self._started(waiting.pop(0))
                over = [command for command in running if command.over()]
                running = [command for command in running if command not in over]
                for command in over:
                    self._ended(command)
                time.sleep(0.05)
        finally:
            for command in running:
                command.signal(signal.SIGKILL)

    def note(self, name: str, value: object) -> None:
        """Record `value` in run.json."""
        self.notes[name] = value
        document = {**self.notes, "commands": [asdict(outcome) for outcome in self.outcomes]}
        (self.output / "run.json").write_text(json.dumps(document, indent=1) + "\n")

    def _started(self, command: Command) -> list[Running]:
        """Start a command; None if it is left out."""
        reasons = [self.missing[name] for name in command.needs if name in self.missing]
        now = time.monotonic()
        if self.end - now < FEWEST:
            reasons.append("no time was left")
        if reasons:
            self._keep(Outcome(command.name, "left out", reason="; ".join(reasons)))
            return []
        with (self.output / f"{command.name}.log").open("w") as log:
            process = subprocess.Popen(
                command.words, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return [Running(command, process, now, min(now + command.limit, self.end))]

    def _ended(self, running: Running) -> None:
        """Record the command's outcome with the last line that it printed, and end all processes that it started."""
        running.signal(signal.SIGKILL)
        name, seconds = running.command.name, round(time.monotonic() - running.start, 1)
        status = "cut" if running.cut else "passed" if running.process.returncode == 0 else "failed"
        lines = (self.output / f"{name}.log").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        self._keep(Outcome(name, status, seconds, last.strip()[:200]))

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.note("seconds_left", round(self.end - time.monotonic()))
        print(f"{outcome.name:<36}{outcome.status:<9}{outcome.seconds:>6.1f} s  {outcome.reason}", flush=True)


# The parts ------------------------------------------------------------------------------------------


def module(name: str, words: str = "") -> list[str]:
    """``python -m name``."""
    return [sys.executable, "-m", name, *words.split()]


def tests(words: str, results: Path | None = None) -> list[str]:
    """pytest, and the file for the results of benchmarks."""
    command = module("pytest", f"-q -p no:cacheprovider {words}")
    return command if results is None else [*command, "--benchmark-json", str(results)]


def build() -> list[Command]:
    return [Command("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 120)]


def correctness(rehearse: bool) -> list[Command]:
    """A rehearsal only finds the tests for a GPU, and runs a few interpreted ones."""
    if rehearse:
        found = tests(f"-m gpu {TESTS_OF_KERNELS} {TESTS_OF_SKD}")
        interpreted = tests("tests/kernels/interpreted_mlp.py -k of_every_kind")
        return [Command("tests", found, 60), Command("interpreted", interpreted, 60)]
    # Some tests need a third of the device's memory. They are one xdist group, so that one worker runs them in turn.
    workers = "-n {} --dist loadgroup" if importlib.util.find_spec("xdist") else ""
    kernels = tests(f"-m gpu {workers.format(10)} {TESTS_OF_KERNELS}")
    training = tests(f"-m gpu {workers.format(4)} {TESTS_OF_SKD}")
    return [Command("kernels", kernels, 100, ("pytest",)), Command("training", training, 100, ("pytest", "skd"))]


def steps(output: Path, models: Sequence[str]) -> list[Command]:
    """One process for each model, so that a crash of one leaves the others."""
    words = {m: tests(f"benchmarks/test_steps.py -k {m}", output / f"gpu-steps-{m}.json") for m in models}
    return [Command(f"steps-{model}", command, 60, ("skd", "pytest_benchmark")) for model, command in words.items()]


def profile(output: Path, model: str) -> list[Command]:
    words = [*module("benchmarks.steps", f"--model {model} --json"), str(output / "gpu-profile.json")]
    return [Command(f"profile-{model}", words, 45, ("skd",))]


def operations(output: Path, rehearse: bool) -> list[Command]:
    sizes = (
        "--device cpu --model tiny --batch 1 --tokens 20" if rehearse else "--model base --model small --model tiny"
    )
    quick = [*module("benchmarks.quick", f"{sizes} --json"), str(output / "gpu-quick.json")]
    masked = tests("benchmarks/test_operations.py::test_masked", output / "gpu-masked.json")
    return [Command("quick", quick, 40), Command("masked", masked, 75, ("pytest_benchmark",))]


def statistics(output: Path) -> list[Command]:
    words = tests("benchmarks/test_operations.py::test_operation", output / "gpu-statistics.json")
    return [Command("statistics", words, 60, ("pytest_benchmark",))]


def checked(dtypes: Sequence[str]) -> dict[str, str]:
    """Arguments of benchmarks.op by the name of the run; in float32 an aligned shape has the tiles of an odd one."""
    return {
        f"{operation}-{kind}-{dtype}": f"{operation} --shape {shape} --dtype {dtype} --check --megabytes 1"
        + (" --implementation triton" if operation.startswith("masked") else "")
        + (" --gated" if kind == "gated" else "")
        for operation, shape, kind in CHECKED
        for dtype in dtypes
        if (kind, dtype) != ("aligned", "float32")
    }


def sanitizers(rehearse: bool) -> list[Command]:
    """Under memcheck and racecheck; a rehearsal runs one of the programs without."""
    programs = {name: module("benchmarks.op", words) for name, words in checked(("float32", "bfloat16")).items()}
    if rehearse:
        return [Command("masked_mlp-odd", programs["masked_mlp-odd-float32"], 60)]
    commands = {
        f"{tool}-{name}": [SANITIZER, "--tool", tool, "--error-exitcode", "1", *options, *words]
        for tool, options in TOOLS.items()
        for name, words in programs.items()
    }
    return [Command(name, words, 70, ("compute-sanitizer",)) for name, words in commands.items()]


def parts(output: Path, rehearse: bool) -> Iterator[tuple[str, list[Command], int]]:
    """The parts in order: name, commands, and how many of them at a time."""
    models = ["tiny"] if rehearse else ["base", "small", "tiny"]
    yield "correctness", correctness(rehearse), 1 if rehearse else 2
    yield "steps", steps(output, models), 1
    yield "profile", profile(output, models[0]), 1
    yield "operations", operations(output, rehearse), 1
    yield "statistics", statistics(output), 1
    yield "sanitizers", sanitizers(rehearse), 16


# The run --------------------------------------------------------------------------------------------


def asked(code: str, environment: Mapping[str, str]) -> tuple[object, str]:
    """The JSON that Python code prints, or None and its error. It runs in its own process, which frees all memory."""
    command = [sys.executable, "-c", f"import json; {code}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, done.stderr.strip()[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), ""


def architecture(environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Of the GPU, 10 * major + minor; None and the reason if there is none."""
    code = "import torch; print(json.dumps(torch.cuda.is_available() and torch.cuda.get_device_capability()))"
    found, error = asked(code, environment)
    if isinstance(found, list):
        return 10 * found[0] + found[1], ""
    return None, error or "PyTorch sees no GPU"


def describe(run: Run) -> None:
    """Note versions, devices and what is missing."""
    answer, error = asked("from benchmarks.timing import machine; print(json.dumps(machine()))", run.environment)
    found = answer if isinstance(answer, dict) else {"error": error}
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


def variables(scratch: Path, rehearse: bool) -> dict[str, str]:
    """The environment variables of all commands, without those that pytest sets for its own workers."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "SKD_CUDA": "on"}
    # Every run compiles, or finds prebuilt, what it needs.
    found |= {"TRITON_CACHE_DIR": str(scratch / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    found["TEARDOWN_CUPTI"] = "0"  # or the second of two short profiles may see no kernel
    if rehearse:
        found |= {"SKD_REHEARSAL": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def use_prebuilt(run: Run, folder: Path | None, scratch: Path, architecture: int | None) -> bool:
    """Use a prebuilt folder, and return whether it has an extension. A warning says why the folder is not used."""
    if folder is None:
        return False
    try:
        used = precompile.use(folder.absolute(), scratch, architecture)
    except ValueError as error:
        print(f"warning: {error}; everything is compiled here", flush=True)
        return False
    run.environment |= used.variables
    return used.extension


def merge_steps(output: Path) -> None:
    """Merge the results of the models into one file; a command that was cut before it had a result is left out."""
    runs = []
    for path in sorted(output.glob("gpu-steps-*.json")):
        with contextlib.suppress(ValueError):
            runs.append(json.loads(path.read_text()))
        path.unlink()
    if runs:
        merged = {**runs[0], "benchmarks": [entry for run in runs for entry in run["benchmarks"]]}
        (output / "gpu-steps.json").write_text(json.dumps(merged, indent=1) + "\n")


def write_tables(output: Path) -> str:
    """Write tables.md from the results that exist."""
    from benchmarks import table  # imports PyTorch

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
    before = precompile.compiled_in(cache)
    if gpu is not None and not extension:
        run.environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*divmod(gpu, 10))
        run.part("build", build())
    describe(run)
    for name, commands, at_once in parts(output, args.rehearse):
        if args.part is None or name in args.part:
            run.part(name, commands, at_once)
    compiled = precompile.compiled_since(cache, before)
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
