"""The script for a machine with a GPU: its limits, what becomes of its commands, and all of it on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import on_gpu, precompile
from benchmarks.on_gpu import Command, Run

ROOT = Path(__file__).parents[2]


def run_in(folder: Path, seconds: float, **missing: str) -> Run:
    return Run(folder, time.monotonic() + seconds, dict(os.environ), missing)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_that_is_cut_keeps_what_it_wrote(tmp_path: Path) -> None:
    """It is interrupted, as by Ctrl-C; one that does not listen is ended; the next one has its turn."""
    patient = ["bash", "-c", "trap 'echo kept; exit 1' INT; echo begun; sleep 60 & wait"]
    run = run_in(tmp_path, 60)
    run.part("part", [Command("slow", patient, 3), Command("next", python("print('done')"), 30)])
    slow, following = run.outcomes
    assert (slow.status, slow.reason) == ("cut", "kept") and slow.seconds < 20
    assert (following.status, following.reason) == ("passed", "done")
    assert (tmp_path / "slow.log").read_text().split() == ["begun", "kept"]
    assert [done["name"] for done in json.loads((tmp_path / "run.json").read_text())["commands"]] == ["slow", "next"]


def test_commands_that_do_not_listen_are_killed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graces do not add up."""
    monkeypatch.setattr(on_gpu, "GRACE", 1.0)
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
from benchmarks.on_gpu import Command, Run
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


def prebuilt_folder(place: Path) -> Path:
    """As `benchmarks.precompile` leaves it for this machine, with one kernel."""
    import triton

    (place / "cache" / "a").mkdir(parents=True)
    (place / "cache" / "a" / "flash_forward.cubin").touch()
    precompile.pack(place / "cache", place / precompile.ARCHIVE)
    python = "{}.{}".format(*sys.version_info)
    sources = precompile.digest()
    precompile.Manifest(python, triton.__version__, "", torch.__version__, [90], 1, sources).write(place)
    return place


@pytest.mark.slow
def test_the_whole_script_rehearses_on_a_cpu(tmp_path: Path) -> None:
    """Every part, with a prebuilt folder, and results of each."""
    pytest.importorskip("timm")
    folder = prebuilt_folder(tmp_path / "prebuilt")
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
    assert document["kernels"] == {"prebuilt": 1, "compiled": {}}
    steps = json.loads((tmp_path / "out" / "gpu-steps.json").read_text())["benchmarks"]
    assert [entry["extra_info"].get("fraction") for entry in steps] == ["mean", 1.0, 0.5, None]
