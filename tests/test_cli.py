"""The command line: help, info, and mistakes answered by one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digit_net

import skd
import skd.cli
import skd.demo.running
import skd_kernels
from skd import commands
from skd.cli import main
from skd.support.outputs import replacing
from skd.training import Diverged

COMMANDS = (
    "demo",
    "convert",
    "plan",
    "train",
    "extract",
    "evaluate",
    "finetune",
    "export",
    "latency",
    "benchmark",
    "info",
)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake must be found before any work."""

    def fail(*_: Any) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr(skd.demo.running, "train_stand_in", fail)


def instead_of_info(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    monkeypatch.setitem(commands.COMMANDS, "info", replace(commands.COMMANDS["info"], run=run))


def exit_status(*argv: str) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return stop.value.code


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--help") == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert command in overview
        assert exit_status(command, "--help") == 0
        assert "--json" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--version") == 0
    assert skd.__version__ in capsys.readouterr().out


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "info.json").read_text())
    assert document == skd_kernels.build_info()
    assert document["torch"] in printed
    for operation in document["implementations"]:
        assert operation in printed
    assert [path.name for path in tmp_path.iterdir()] == ["info.json"]


def test_sigterm_ends_a_command_as_an_exception_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command was writing is removed, and the handler that was there before is back."""

    def killed(*_: Any) -> None:
        with replacing(tmp_path / "half.json") as temporary:
            temporary.write_text("{")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    instead_of_info(monkeypatch, killed)
    assert exit_status("info") == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("width is 9;\n  it may be 0..8"), 2, "error: width is 9; it may be 0..8"),
        (ImportError("no module"), 1, "error: no module"),
        (TypeError("a fault"), 1, "error: TypeError: a fault (SKD_TRACEBACK=1 in the environment shows where)"),
        (MemoryError(), 1, "error: MemoryError (SKD_TRACEBACK=1 in the environment shows where)"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (Diverged("the loss is NaN"), 1, "error: the loss is NaN"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB\nmore"), 1, "error: tried to allocate 2 GiB"),
    ],
)
def test_no_error_is_a_traceback(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    instead_of_info(monkeypatch, fail)
    assert main(["info"]) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_fault_shows_its_traceback_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("a fault")

    instead_of_info(monkeypatch, fail)
    monkeypatch.setenv("SKD_TRACEBACK", "1")
    with pytest.raises(TypeError, match="a fault"):
        main(["info"])


@pytest.mark.parametrize("command", COMMANDS)
def test_advice_on_memory_names_options_that_the_command_has(command: str) -> None:
    own = argparse.ArgumentParser()
    commands.COMMANDS[command].arguments(own)
    known = set(re.findall(r"--[a-z0-9-]+", own.format_help()))
    advice = own.get_default("saves_memory")
    assert (advice is not None) == bool({"--data", "--batch-size"} & known)
    assert {word.strip(",") for word in (advice or "").split() if word.startswith("--")} <= known


@pytest.mark.parametrize("text", ["two", "0", "-1", ""])
def test_a_world_size_that_is_no_number(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith(f"error: WORLD_SIZE is {text!r}")


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(out: str, **options: Any) -> dict[str, Any]:
        return {"out": out, **options}

    monkeypatch.setattr(skd.demo.running, "run_demo", run_demo)
    file = tmp_path / "demo.json"
    assert main(["demo", "--out", "there", "--seed", "7", "--epochs", "3", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {"out": "there", "seed": 7, "epochs": 3}


def test_module_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    command = [sys.executable, "-m", "skd", "demo", "--out", "taken"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out is 'taken', a file") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--out", "{tmp}/file"], "a file; it must be a folder"),
        (["demo", "--out", "{tmp}/file/below"], "cannot be written to"),
        (["demo", "--out", "{tmp}/occupied"], "curve.png in it is a folder"),
        (["demo", "--out", "{tmp}/new", "--epochs", "0"], "epochs is 0"),
        (["demo", "--out", "{tmp}/new", "--seed", "-1"], "seed is -1"),
        (["demo", "--out", "{tmp}/new", "--json", "{tmp}/nowhere/x.json"], "--json is"),
        (["demo", "--out", "{tmp}/new", "--json", "{tmp}"], "a folder; it must be a file"),
        (["info", "--json", "{tmp}/file/x.json"], "--json is"),
    ],
)
def test_mistakes(
    argv: list[str], message: str, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "occupied" / "curve.png").mkdir(parents=True)
    assert main([part.format(tmp=tmp_path) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "new").exists()


BIG = "9" * 20  # more than 64 bits


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["dmeo"],
        ["demo", "--seed", "one"],
        ["info", "--out", "x"],
        ["plan", "--supernet", "x", "--data", "digits", "--out", "y", "--rounds", BIG],
        ["train", "--epochs", BIG],
        ["finetune", "--model", "x", "--validation-batch-size", "-" + BIG],
    ],
)
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(*argv) == 2
    assert "usage: skd" in capsys.readouterr().err


def test_a_link_does_not_hide_that_two_files_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "curve.png").symlink_to(tmp_path / "kept.json")
    for name in ("kept.json", "run/curve.png"):
        argv = ["demo", "--out", str(tmp_path / "run"), "--json", str(tmp_path / name)]
        assert main(argv) == 2
        assert f"--json is {str(tmp_path / name)!r}, a file of --out" in capsys.readouterr().err


def test_a_file_in_the_package_is_all_that_a_command_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one in CONTRIBUTING.md: help, files and --json know it, and nothing else was touched."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- snippet: command -->\n *```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "modules.py").write_text(textwrap.dedent(found[1]))
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    try:
        commands_now = commands.find_commands()
        assert list(commands_now) == [*COMMANDS, "modules"]
        monkeypatch.setitem(commands.COMMANDS, "modules", commands_now["modules"])
        assert exit_status("--help") == 0 and exit_status("modules", "--help") == 0
        assert "the modules of a super-network" in capsys.readouterr().out
        network = digit_net()
        skd.save(network, tmp_path / "net.safetensors")
        given = ["modules", "--supernet", str(tmp_path / "net.safetensors")]
        assert main([*given, "--json", str(tmp_path / "found.json")]) == 0
        widths = json.loads((tmp_path / "found.json").read_text())["widths"]
        assert list(widths.values()) == network.dropout_list.widths[0].tolist()
        assert main([*given, "--json", str(tmp_path / "net.safetensors")]) == 2
        assert "the same file" in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        assert main(given) == 2 and "skd modules runs in one process" in capsys.readouterr().err
    finally:
        sys.modules.pop("skd.commands.modules", None)
        vars(commands).pop("modules", None)
