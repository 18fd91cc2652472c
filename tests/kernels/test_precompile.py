"""Kernels compiled without a GPU: which ones, by which keys, and how another machine finds them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mlp_checks import check

import skd_kernels as kernels
from benchmarks import limited, on_gpu, prebuilt, precompile
from benchmarks.limited import Command, Run
from skd_kernels.gpu import mlp
from skd_kernels.gpu.launch import Launch, _describe, record

ROOT = Path(__file__).parents[2]
CHEAP = ("sums_kernel", "column_sums_kernel")  # less than a second each
OF_THE_MACHINE = {"cuda_utils"}  # one library, whose key in newer versions of Triton names the folder of the driver


def call(device: str = "cuda") -> None:
    """Forward and backward of a small layer, as a program would call it."""
    shapes = ((2, 5, 32), (48, 32), (48,), (32, 48), (32,))
    leaves = [torch.zeros(shape, dtype=torch.float16, device=device).requires_grad_() for shape in shapes]
    width = torch.tensor(20, dtype=torch.int32, device=device)
    kernels.masked_mlp(*leaves, width, scores=torch.zeros(48, device=device)).sum().backward()


def keys(launches: list[precompile.Wanted]) -> set[str]:
    """What Triton specialises the launches on, as `launch.record` writes it."""
    found = set()
    for wanted in launches:
        arguments = {
            name: torch.empty(1, dtype=value.dtype, device="meta") if isinstance(value, precompile.Pointer) else value
            for name, value in wanted.arguments.items()
        }
        options = wanted.options
        settings = (options["num_warps"], options["num_stages"], options.get("maxnreg"))
        found.add(_describe(wanted.kernel, arguments, settings, "").key())
    return found


def recorded() -> list[Launch]:
    """The same by the host code on meta tensors."""
    x, w1, b1, w2, b2 = (
        torch.empty(shape, dtype=torch.float16, device="meta")
        for shape in ((2, 5, 32), (48, 32), (48,), (32, 48), (32,))
    )
    width = torch.empty((), dtype=torch.int32, device="meta")
    with record(90) as recorder:
        _, h, z = mlp.mlp_forward._init_fn(x, w1, b1, w2, b2, width, None, "gelu", False, True)
        mlp.mlp_backward._init_fn(x, x, w1, w2, h, z, width, "gelu", False, [True] * 6)
    return recorder.launches


def test_a_program_on_a_pretended_device_starts_what_it_would_start() -> None:
    before = torch.empty, torch.Tensor.to, torch.cuda.is_available
    found = precompile.wanted_by(90, call)
    assert keys(list(found.values())) == {launch.key() for launch in recorded()}
    assert (torch.empty, torch.Tensor.to, torch.cuda.is_available) == before
    assert torch.zeros(1).device.type == "cpu" and not torch.zeros(1, device="meta").is_cuda


def test_a_test_for_a_gpu_goes_to_its_end_on_a_pretended_device() -> None:
    """Its questions about contents are answered as if all were right; no error is printed."""
    ended = []

    def run() -> None:
        check(torch.bfloat16, (2, 75, 144), 256, 45, device="cuda", act="silu", gated=True)
        ended.append(True)

    found = precompile.wanted_by(90, run)
    assert ended and {launch.kernel.__name__ for launch in found.values()} > {"hidden_kernel", "gradient_kernel"}


def test_memory_that_begins_anywhere_is_noted() -> None:
    """Triton compiles other code for a pointer that is not a multiple of 16 bytes."""

    def run() -> None:
        from skd_kernels.gpu.weight_gradient import column_sums

        rows = torch.zeros(9, 33, dtype=torch.float16, device="cuda")[:, 1:]
        column_sums(rows, torch.tensor(3, device="cuda"), torch.zeros(32, dtype=torch.float16, device="cuda"))

    pointers = [v for launch in precompile.wanted_by(90, run).values() for v in launch.arguments.values()]
    assert any(isinstance(value, precompile.Pointer) and value.remainder == 2 for value in pointers)


# The cache ------------------------------------------------------------------------------------------

COMPILE = """
import sys
from pathlib import Path

import triton.runtime.cache

if sys.argv[2]:
    triton.runtime.cache.triton_key = lambda: sys.argv[2]
from benchmarks import precompile
from test_precompile import CHEAP, call

wanted = [w for w in precompile.wanted_by(90, call).values() if w.kernel.__name__ in CHEAP]
failed = precompile.compile_all(wanted, 90, Path(sys.argv[1]), 2)
print(len(wanted), failed, triton.runtime.cache.triton_key(), sep="|")
"""


def compile_cheap(cache: Path, key: str = "", **environment: str) -> list[str]:
    """How many kernels another process compiles into a cache, what failed, and its key of the installation."""
    paths = [*filter(None, [environment.get("PYTHONPATH")]), str(ROOT), str(Path(__file__).parent)]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(cache), key],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `precompile` would leave for the cheap kernels, made by another installation of Triton."""
    import triton

    place = tmp_path_factory.mktemp("prebuilt")
    cache = place / "cache"
    count, failed, key = compile_cheap(cache, "another installation")
    assert failed == "[]" and int(count) >= 2
    precompile.pack(cache, place / prebuilt.ARCHIVE)
    compiled = prebuilt.compiled_in(cache)
    assert set(CHEAP) < set(compiled.values())  # what starts them is there too
    (place / "cache").rename(place / "gone")  # its paths lead nowhere any more
    python = "{}.{}".format(*sys.version_info)
    prebuilt.Manifest(
        python, triton.__version__, key, torch.__version__, [90], len(compiled), prebuilt.digest()
    ).write(place)
    return place


def test_another_machine_compiles_nothing(folder: Path, tmp_path: Path) -> None:
    used = prebuilt.use(folder, tmp_path, 90)
    assert not used.extension  # none was made
    environment, cache = used.variables, tmp_path / "triton"
    before = prebuilt.compiled_in(cache)
    assert len(before) == prebuilt.Manifest.read(folder).compiled
    assert compile_cheap(cache, **environment)[2] == "another installation"
    assert set(prebuilt.compiled_since(cache, before)) <= OF_THE_MACHINE


def test_without_its_key_everything_is_compiled_and_counted(folder: Path, tmp_path: Path) -> None:
    prebuilt.use(folder, tmp_path)
    before = prebuilt.compiled_in(tmp_path / "triton")
    compile_cheap(tmp_path / "triton")
    added = prebuilt.compiled_since(tmp_path / "triton", before)
    # What starts them does not depend on who compiles the kernels.
    assert set(added) - OF_THE_MACHINE == set(CHEAP)
    added = Counter({name: added[name] for name in CHEAP})
    assert added.total() == len([name for name in before.values() if name in CHEAP])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"triton": "3.0.0"}, "it is for triton 3.0.0, and"),
        ({"python": "3.1"}, "it is for Python 3.1, and this is"),
        ({"sources": "0"}, "it was made of other sources than these"),
    ],
)
def test_other_versions_and_sources_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    document = json.loads((folder / prebuilt.MANIFEST).read_text())
    (tmp_path / prebuilt.MANIFEST).write_text(json.dumps(document | change))
    with pytest.raises(ValueError, match=reason):
        prebuilt.use(tmp_path, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(ValueError, match=r"is not what `python -m benchmarks.precompile` leaves"):
        prebuilt.use(tmp_path / "nothing", tmp_path)


def test_another_gpu_and_a_damaged_archive_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it is for the architectures \[90\], and this GPU is of 80"):
        prebuilt.use(folder, tmp_path / "scratch", 80)
    shutil.copy(folder / prebuilt.MANIFEST, tmp_path)
    for damaged in ((folder / prebuilt.ARCHIVE).read_bytes()[:500], b"", None):
        (tmp_path / prebuilt.ARCHIVE).unlink(missing_ok=True)
        if damaged is not None:
            (tmp_path / prebuilt.ARCHIVE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"triton.tar.gz cannot be unpacked"):
            prebuilt.use(tmp_path, tmp_path / "scratch")
    assert not list(tmp_path.glob("scratch/*"))


def test_a_sitecustomize_that_was_there_is_still_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "sitecustomize.py").write_text("print('read')")
    environment = prebuilt.use(folder, tmp_path).variables
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(tmp_path / "there")])
    code = "import triton.runtime.cache as cache; print(cache.triton_key())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["read", "another installation"]


def test_a_compiler_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precompile, "_compile", lambda *_: os._exit(1))
    assert precompile.compile_all([], 90, tmp_path, 2) == 2 * [
        "a process that compiled has died; its other kernels are not known"
    ]


def test_kernels_of_torch_compile_are_counted_together(tmp_path: Path) -> None:
    for name in ("a/triton_poi_fused_add_0", "b/triton_red_fused_1", "c/flash_forward"):
        path = tmp_path / f"{name}.cubin"
        path.parent.mkdir()
        path.touch()
    assert prebuilt.compiled_since(tmp_path, {}) == Counter({"torch.compile": 2, "flash_forward": 1})
    assert prebuilt.compiled_since(tmp_path, {"c": "flash_forward"}) == Counter({"torch.compile": 2})


# The script on a machine with a GPU -----------------------------------------------------------------


def run_in(folder: Path, seconds: float, **missing: str) -> Run:
    return Run(folder, time.monotonic() + seconds, dict(os.environ), missing)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_that_is_cut_keeps_what_it_wrote(tmp_path: Path) -> None:
    """It is interrupted, as by Ctrl-C; one that does not listen is ended; the next one has its turn."""
    patient = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    run = run_in(tmp_path, 60)
    run.part("part", [Command("slow", python(patient), 4), Command("next", python("print('done')"), 30)])
    slow, following = run.outcomes
    assert (slow.status, slow.reason) == ("cut", "kept") and slow.seconds < 20
    assert (following.status, following.reason) == ("passed", "done")
    assert (tmp_path / "slow.log").read_text().split() == ["begun", "kept"]
    assert [done["name"] for done in json.loads((tmp_path / "run.json").read_text())["commands"]] == ["slow", "next"]


def test_commands_that_do_not_listen_are_killed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graces do not add up."""
    monkeypatch.setattr(limited, "GRACE", 1.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    run = run_in(tmp_path, 60)
    run.part("part", [Command(f"deaf-{index}", python(deaf), 1.0) for index in range(6)], at_once=6)
    assert [done.status for done in run.outcomes] == 6 * ["cut"]
    assert max(done.seconds for done in run.outcomes) < 6


def test_no_command_outlives_the_script(tmp_path: Path) -> None:
    """SIGTERM, as a time limit of somebody else's sends it."""
    code = f"""
import os, signal, sys, time
from pathlib import Path
from benchmarks.limited import Command, Run
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
run = Run(Path({str(tmp_path)!r}), time.monotonic() + 600, dict(os.environ), {{}})
run.part("part", [Command("sleeper", [sys.executable, "-c", sleeper], 600)])
"""
    script = subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.DEVNULL)
    log, end = tmp_path / "sleeper.log", time.monotonic() + 60
    while time.monotonic() < end and not (log.exists() and log.read_text().strip()):
        time.sleep(0.05)
    script.terminate()
    assert script.wait(30) == 143
    number = int(log.read_text())
    while time.monotonic() < end and Path(f"/proc/{number}/cmdline").exists():  # until it has been waited for
        if not Path(f"/proc/{number}/cmdline").read_bytes():
            break
        time.sleep(0.05)
    assert time.monotonic() < end


def test_what_is_missing_or_late_is_left_out_with_the_reason(tmp_path: Path) -> None:
    run = run_in(tmp_path, 60, timm="timm is not installed")
    failing = Command("failing", python("raise SystemExit('no device')"), 30)
    run.part("part", [Command("steps", python(""), 30, ("timm",)), failing], at_once=2)
    run.end = 0.0
    run.part("part", [Command("late", python(""), 30)])
    found = {done.name: (done.status, done.reason) for done in run.outcomes}
    assert found["steps"] == ("left out", "timm is not installed")
    assert found["failing"] == ("failed", "no device")
    assert found["late"] == ("left out", "no time was left")


def test_steps_of_several_models_are_one_result(tmp_path: Path) -> None:
    for model in ("base", "tiny"):
        document = {"machine_info": {}, "benchmarks": [{"name": f"test_step[{model}]"}]}
        (tmp_path / f"gpu-steps-{model}.json").write_text(json.dumps(document))
    (tmp_path / "gpu-steps-small.json").touch()  # it was cut before it had a result
    on_gpu.merge_steps(tmp_path)
    (merged,) = tmp_path.iterdir()
    assert [entry["name"] for entry in json.loads(merged.read_text())["benchmarks"]] == [
        "test_step[base]",
        "test_step[tiny]",
    ]


def test_limits_of_the_parts_leave_time_for_all_but_the_last(tmp_path: Path) -> None:
    """Even if every command of a part takes all of its time, the parts before the sanitizers have theirs."""
    needed = 0.0
    for name, commands, at_once in on_gpu.parts(tmp_path, False):
        if name != "sanitizers":
            turns = -(-len(commands) // at_once)
            needed += turns * max(c.limit for c in commands) if at_once > 1 else sum(c.limit for c in commands)
    assert needed <= on_gpu.SECONDS
    assert on_gpu.SECONDS <= 540 - 15


def test_the_whole_script_rehearses_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    """Every part, with prebuilt kernels, and results of each; at most eight files, none of them empty."""
    pytest.importorskip("timm")
    command = ["bash", str(ROOT / "benchmarks" / "run_on_gpu.sh"), "out", "--rehearse"]
    done = subprocess.run(
        [*command, "--prebuilt", os.path.relpath(folder, tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert done.returncode == 0, (document["commands"], done.stderr[-2000:])
    assert {entry["status"] for entry in document["commands"]} == {"passed"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    results = {f"gpu-{name}.json" for name in ("steps", "profile", "quick", "masked", "statistics")}
    assert names == {"run.json", "tables.md", "logs.tar.gz"} | results
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert all(f"`{name}`: " in tables for name in results)
    assert document["kernels"] == {"prebuilt": prebuilt.Manifest.read(folder).compiled, "compiled": {}}
    steps = json.loads((tmp_path / "out" / "gpu-steps.json").read_text())["benchmarks"]
    assert [entry["extra_info"].get("fraction") for entry in steps] == ["mean", 1.0, 0.5, None]
