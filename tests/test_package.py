"""`import skd`: quick, and with all public names; an older timm is refused before anything else."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import skd
from skd.support.requirements import OLDEST_TIMM, _release

HEAVY = ("torch", "timm", "numpy", "rich", "yaml", "PIL", "matplotlib", "skd_kernels")


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, `path` first among the places of its modules."""
    # -P: not the folder it is started in.
    places = os.pathsep.join(str(place) for place in (path, Path(skd.__file__).parents[1]) if place)
    environment = os.environ | {"PYTHONPATH": places}
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)


def test_importing_it_imports_nothing_heavy() -> None:
    done = python(f"import sys, skd; dir(skd), skd.__all__; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_the_imports_for_type_checkers_are_those_of_the_interpreter() -> None:
    tree = ast.parse(Path(skd.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {name.name: node.module for node in imports for name in node.names} == skd._MODULES
    assert skd.__all__ == sorted(skd._MODULES)


@pytest.mark.parametrize(
    "first",
    [
        "import skd.convert, skd.extract, skd.cost",
        *(pytest.param(first, marks=pytest.mark.slow) for first in ("from skd import files, recipes", "")),
    ],
)
def test_public_names_are_what_they_are_called_whatever_is_imported_first(first: str) -> None:
    """A module of the same name does not take the place of a function, before or after its first use."""
    code = f"""
import pickle
{first}
import skd
from skd import convert, plan
import skd.convert as again, skd.benchmark, skd.evaluate, skd.importance
from skd import *
names = {skd.__all__}
assert again is convert is skd.convert and set(names) <= set(dir(skd)) and set(names) <= set(globals())
for name in names:
    value = getattr(skd, name)
    assert callable(value) and value.__name__ == name and pickle.loads(pickle.dumps(value)) is value, name
assert skd.training.Stopped and skd.data.digits
try:
    skd.nonsense
except AttributeError as error:
    assert str(error) == "module 'skd' has no attribute 'nonsense'"
    print("refused")
"""
    done = python(code)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize(
    ("version", "old"),
    [
        *(("1.0.31", False), ("1.0.31.dev0", True), ("1.0.31rc1", True), ("1.0.31.post1", False), ("1.0.9", True)),
        *(("1.1", False), ("1.0", True), ("2.0.0.dev0", False), ("0.9.16", True), ("1.0.31+cpu", False)),
    ],
)
def test_versions_are_compared_as_pip_compares_them(version: str, old: bool) -> None:
    assert (_release(version) < _release(OLDEST_TIMM)) is old


@pytest.mark.parametrize("code", ["import skd", "from skd import convert", "import skd.files", "import skd.cli"])
def test_an_older_timm_is_refused_without_importing_it(tmp_path: Path, code: str) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "timm" / "version.py").write_text("__version__ = '0.9.16'\n")
    last = python(code, tmp_path).stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: skd needs timm {OLDEST_TIMM} or newer, and timm 0.9.16 is installed")


def test_the_version_of_a_timm_that_was_imported_counts() -> None:
    code = "import types, sys; sys.modules['timm'] = timm = types.ModuleType('timm'); timm.__version__ = '1.0.30'"
    assert "timm 1.0.30 is installed" in python(f"{code}\nimport skd").stderr.splitlines()[-1]


def test_the_version_is_in_one_place() -> None:
    """The package's metadata read it from skd/__init__.py; nothing repeats it."""
    root = Path(__file__).parent.parent
    metadata = tomllib.loads((root / "pyproject.toml").read_text())
    assert metadata["project"]["dynamic"] == ["version"] and "version" not in metadata["project"]
    assert metadata["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "skd.__version__"}
    assert "\nversion:" not in (root / "CITATION.cff").read_text()
