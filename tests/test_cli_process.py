"""The process ``skd``: what it imports for help, and how it ends when it is interrupted or nobody reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import skd
from skd.commands import COMMANDS

HEAVY = ("torch", "timm", "numpy", "rich", "yaml", "PIL", "matplotlib", "skd_kernels")
# Runs the command as ``python -m skd`` does, and says at the end which of the heavy modules are there.
WATCHED = f"""
import atexit, runpy, sys
atexit.register(lambda: print("heavy:", [name for name in {HEAVY} if name in sys.modules]))
runpy.run_module("skd", run_name="__main__", alter_sys=True)
"""
INTERRUPT = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"


def process(*argv: str, path: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """A Python process that imports this checkout's skd, and before it whatever is in `path`."""
    places = os.pathsep.join(str(place) for place in (path, Path(skd.__file__).parents[1]) if place)
    environment = os.environ | {"PYTHONPATH": places, "PYTHONUNBUFFERED": ""}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-P", *argv], env=environment, **pipes, **options)


HELP = [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)]
MISTAKES = [[], ["dmeo"], ["--versoin"], ["train", "--epochs", "many"], ["extract"]]


@pytest.mark.parametrize("argv", [["--version"], *HELP, *MISTAKES], ids=" ".join)
def test_version_and_help_import_nothing_heavy(argv: list[str]) -> None:
    """So they take a fraction of a second: `import torch` alone takes ten times as long."""
    child = process("-c", WATCHED, *argv)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == (2 if argv in MISTAKES else 0)
    assert out.splitlines()[-1] == "heavy: []"


def stub(folder: Path, name: str, text: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    return folder


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path, swallowed: bool) -> None:
    """Also where the module that is being imported catches every exception."""
    text = f"try:\n    {INTERRUPT}\nexcept BaseException:\n    {'pass' if swallowed else 'raise'}\n"
    child = process("-m", "skd", "info", path=stub(tmp_path, "torch", text))
    out, err = child.communicate(timeout=60)
    assert (out, err, child.returncode) == ("", "error: interrupted\n", 130)


# What is imported when Ctrl-C is first listened to, but was not when the interpreter had started.
LISTENING = """
import signal, sys
def listen(number, handler):
    sys.stdout.write(" ".join(sorted(sys.modules.keys() - before)))
    raise SystemExit(0)
signal.signal = listen
before = {*sys.modules}
from skd.support.process import program
program()
"""


def test_ctrl_c_is_listened_to_before_anything_else_is_imported() -> None:
    """Until then it is a traceback of Python's, which only the start of the interpreter should have time for."""
    child = process("-c", LISTENING)
    out, err = child.communicate(timeout=60)
    own = {"skd", "skd.support", "skd.support.requirements", "skd.support.process"}
    small = {"__future__", "importlib", "importlib._bootstrap", "importlib._bootstrap_external", "warnings", "types"}
    assert own <= set(out.split()) <= own | small and err == ""


def test_ctrl_c_at_any_moment() -> None:
    """One line, or nothing was to be interrupted; a traceback only of the start of the interpreter."""
    lines = 0
    for step in range(24):
        child = process("-m", "skd", "info")
        try:
            child.wait(step**2 / 1000)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
        if err == "error: interrupted\n":
            lines += 1
            assert (out, child.returncode) == ("", 130)
        elif child.returncode:
            named = [
                line
                for line in err.splitlines()
                if line.startswith("  File ") and "skd/" in line and "requirements" not in line
            ]
            first = ("skd/__init__.py", "skd/support/__init__.py", "skd/support/process.py")
            assert all(any(file in line for file in first) for line in named), err
    assert lines > 5


# ``skd info`` that is interrupted while it writes a file, and perhaps again while it puts things away.
WORKING = """
import os, runpy, signal, time
from dataclasses import replace
from skd.commands import COMMANDS
from skd.support.outputs import replacing

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)

def run(arguments):
    try:
        with replacing("result.json") as temporary:
            temporary.write_text("half of it")
            interrupt()
    finally:
        AGAIN

COMMANDS["info"] = replace(COMMANDS["info"], run=run)
runpy.run_module("skd", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("again", ["pass", pytest.param("interrupt()", marks=pytest.mark.slow)])
def test_ctrl_c_at_work_removes_what_was_being_written(tmp_path: Path, again: str) -> None:
    """The second one does not wait for what the first has begun."""
    child = process("-c", WORKING.replace("AGAIN", again), "info", cwd=tmp_path)
    out, err = child.communicate(timeout=120)
    assert (out, err, child.returncode) == ("", "error: interrupted\n", 130)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_after_the_work_is_one_line() -> None:
    """While the interpreter takes down what was imported."""
    child = process(
        "-c", f"import atexit\ndef late():\n    {INTERRUPT}\natexit.register(late)\n{WATCHED}", "--version"
    )
    out, err = child.communicate(timeout=60)
    assert out.startswith("skd ") and (err, child.returncode) == ("error: interrupted\n", 130)


def test_sigint_that_is_ignored_stays_so() -> None:
    """That of a script's background job: the Ctrl-C of another job is not meant for it."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nimport atexit, os\n{WATCHED}"
    code += "\nraise AssertionError"  # the command ends the process
    late = "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    child = process("-c", code.replace("import atexit, os", f"import atexit, os; {late}"), "--version")
    _, err = child.communicate(timeout=60)
    assert (err, child.returncode) == ("", 0)


def test_nobody_reads_what_is_printed() -> None:
    """As after ``skd --help | head -1``."""
    child = process("-m", "skd", "--help")
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(60) == 0
