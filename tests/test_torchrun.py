"""``torchrun -m skd``: two processes convert and train what one does, though stopped, killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_close, checkpoint_files, leftovers, read_checkpoint
from safetensors.torch import load_file

import skd
from skd.cli import main

KWARGS = (
    '{"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1, "num_heads": 1}'
)
MODEL = ["--model", "vit_tiny_patch16_224", "--model-kwargs", KWARGS]
CONVERT = ["convert", *MODEL, "--data", "digits", "--calibration-images", "101", "--workers", "0"]
TRAIN = [
    *("train", "--data", "digits", "--epochs", "4", "--batch-size", "64", "--lr", "1e-3", "--mixup", "0"),
    # Counts of the planner "paper" are the same; losses differ in their last digits, and so may the order of steps.
    *("--planner", "paper"),
    *("--cutmix", "0", "--aa", "none", "--progressive-epochs", "2", "--calibration-images", "101", "--workers", "0"),
    *("--eval-every", "2", "--checkpoint-steps", "5", "--checkpoint-hist", "3"),
]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "skd"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """Its output, once it has ended; a process that hangs fails the test."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def rank_process(parent: int, rank: int) -> int:
    """The process of one rank, a child of torchrun's."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def signal_rank(run: list[str], out: Path, rank: int, number: int, *, after: int) -> str:
    """Go on with the run in `out`, and send a signal to one rank once there is a checkpoint of step `after`."""
    process = torchrun(*run, "--out", str(out), "--resume", "auto")
    deadline = time.monotonic() + 90
    while not any(int(path.stem.split("-")[1]) >= after for path in checkpoint_files(out)):
        assert process.poll() is None and time.monotonic() < deadline, finished(process)
        time.sleep(0.01)
    os.kill(rank_process(process.pid, rank), number)
    return finished(process, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(tmp_path: Path, interrupted: bool) -> None:
    """float32: weights to 1e-3 of their norm after 88 steps of AdamW, which divides by what may be rounding.

    Rank 0 keeps what both have converted, with which the run of one process begins.
    """
    plain, out, one = tmp_path / "plain.safetensors", tmp_path / "two", tmp_path / "one"
    skd.save(skd.create_model(MODEL[1], **json.loads(KWARGS)), plain)
    run = [*TRAIN, *MODEL, "--checkpoint", str(plain)]

    if interrupted:
        output = signal_rank(run, out, 1, signal.SIGTERM, after=10)
        assert output.count("stopped by SIGTERM") == 2 and "FAILED" not in output, output
        step = read_checkpoint(checkpoint_files(out)[-1])[1]["step"]
        output = signal_rank(run, out, 1, signal.SIGKILL, after=step + 10)
        assert "rank 0: error: another rank has died" in output, output
        assert not leftovers(out)
    output = finished(torchrun(*run, "--out", str(out), "--resume", "auto"))

    assert output.count("wrote ") == 1 and output.count("going on after") == interrupted, "only rank 0 prints"
    converted, alone = out / "converted.safetensors", tmp_path / "alone.safetensors"
    assert main([*CONVERT, "--checkpoint", str(plain), "--out", str(alone)]) == 0
    assert_converted_alike(converted, alone)
    assert main([*TRAIN, "--supernet", str(converted), "--out", str(one)]) == 0
    assert (one / "dropout_list.json").read_text() == (out / "dropout_list.json").read_text()
    assert_close(load_file(out / "supernet.safetensors"), load_file(one / "supernet.safetensors"), 1e-3)
    assert not leftovers(out) and (out / "report.md").exists()


def assert_converted_alike(two: Path, one: Path) -> None:
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        found, expected = (skd.load(path).eval()(images) for path in (two, one))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_convert_what_one_converts(tmp_path: Path) -> None:
    """The command by itself; test_ranks.py has what it calls."""
    plain, two, one = (tmp_path / f"{name}.safetensors" for name in ("plain", "two", "one"))
    skd.save(skd.create_model(MODEL[1], **json.loads(KWARGS)), plain)
    convert = [*CONVERT, "--checkpoint", str(plain)]
    output = finished(torchrun(*convert, "--out", str(two)))
    assert output.count("101 of 1,347 images read") == 1, output
    assert main([*convert, "--out", str(one)]) == 0
    assert_converted_alike(two, one)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["demo", "--out", "x"], "runs in one process"),
        (["evaluate", "--model", "x", "--data", "digits", "--device", "cuda:1"], "under torchrun"),
    ],
)
def test_what_torchrun_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **places}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *_: None)
    assert main(arguments) == 2
    assert "rank 1: error:" in (said := capsys.readouterr().err) and text in said


def test_a_world_size_without_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info"]) == 2
    assert "WORLD_SIZE is 2, but RANK is not set" in capsys.readouterr().err
