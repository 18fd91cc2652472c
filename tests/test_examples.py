"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skd

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(folder: Path, script: str, *arguments: str) -> str:
    """What the script printed, in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(skd.__file__).parents[1])}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(printed: str) -> list[float]:
    return [float(top1) for top1 in re.findall(r"(\S+) % top-1", printed)]


def test_every_script_is_listed_and_tested() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    tested = re.findall(r'run\(tmp_path, "(\w+\.py)"', Path(__file__).read_text())
    assert sorted(listed) == sorted(tested) == SCRIPTS


def test_convert_and_extract(tmp_path: Path) -> None:
    printed = run(tmp_path, "convert_and_extract.py")
    (error,) = re.findall(r"super-network: (\S+)$", printed, flags=re.MULTILINE)
    assert float(error) < 1e-4
    sizes = [int(macs.replace(",", "")) for macs in re.findall(r"(\S+) MACs", printed)]
    assert all(size <= share * sizes[0] for size, share in zip(sizes, (1.0, 0.75, 0.5, 0.25), strict=True))
    assert min(accuracies(printed)[:2]) > 40
    assert len(list(tmp_path.glob("digits-*.safetensors"))) == 4


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    printed = run(tmp_path, "train.py", "digits", "run")
    assert "4 epochs" in printed and accuracies(printed)[0] > 30
    assert (tmp_path / "run" / "supernet.safetensors").is_file() and (tmp_path / "run" / "history.jsonl").is_file()


@pytest.mark.slow
def test_own_dataloader(tmp_path: Path) -> None:
    found = accuracies(run(tmp_path, "own_dataloader.py"))
    assert len(found) > 2 and found[0] > 40


def test_serve(tmp_path: Path) -> None:
    printed = run(tmp_path, "serve.py")
    assert "400 requests from 8 threads, 0 wrong answers" in printed and "ms" in printed
    total, copies = re.search(
        r"sizes in (\S+) bytes; a copy of each would take (\S+)$", printed, re.MULTILINE
    ).groups()
    assert int(total.replace(",", "")) < int(copies.replace(",", "")) / 4


def test_kernels(tmp_path: Path) -> None:
    """They agree with PyTorch, and neither skd nor timm is imported."""
    printed = run(tmp_path, "kernels.py")
    assert all(float(error) < 1e-4 for error in re.findall(r": (\S+) from", printed))
    assert len(re.findall(r" from ", printed)) == 3 and "scores of 200 neurons" in printed
    assert not re.search(r"^(import|from) (skd|timm)\b", (EXAMPLES / "kernels.py").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_own_words_name_it(script: str) -> None:
    assert f"\npython examples/{script}" in (EXAMPLES / script).read_text()
