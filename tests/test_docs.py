"""The tutorial's commands run; the reference of the site has all there is; the site is built without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_readme import commands, snippet

import skd
from skd import cli
from skd.commands import COMMANDS
from skd.data import opening
from skd.data.digits import pixels

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "TUTORIAL.md").read_text()


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in its order, with one epoch on a third of the images; then its code."""
    monkeypatch.chdir(tmp_path)
    few = tuple((images[: len(images) // 3], labels[: len(labels) // 3]) for images, labels in pixels())
    monkeypatch.setattr(opening, "pixels", lambda: few)
    Path("quick.yaml").write_text(snippet(TUTORIAL, "settings"))
    for command, *options in commands(TUTORIAL):
        quick = ["--epochs", "1", "--batch-size", "256"] if "--epochs" in options else []
        assert cli.main([command, *options, *quick]) == 0, shlex.join([command, *options])
    full = skd.cost(skd.load("run/supernet.safetensors"))
    assert skd.cost(skd.load("half.safetensors")).macs <= full.macs / 2
    assert skd.cost(skd.load("small.safetensors")).params <= 30_000
    from skd.export import read_manifest

    assert len(read_manifest("sizes")) == 2
    names: dict[str, Any] = {}
    for name in ("use", "family"):
        exec(compile(snippet(TUTORIAL, name), "TUTORIAL.md", "exec"), names)
    assert names["program"].module()(names["images"]).shape == (4, 10)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The generated pages of the site."""
    place = ROOT / "docs" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", place)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.pages()
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_reference(
    pages: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (section,) = re.findall(rf"^## skd {name}\n(.*?)(?=^## |\Z)", pages["reference/command-line.md"], re.M | re.S)
    with pytest.raises(SystemExit):
        cli.parsed([name, "--help"])
    flags = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.M)) - {"--help"}
    assert flags and flags == set(re.findall(r"^\| `(--[\w-]+)", section, re.M))
    assert all(line.count("`") % 2 == 0 for line in section.splitlines())


def test_every_public_name_is_in_the_reference(pages: dict[str, str]) -> None:
    for page, package in {"python": "skd", "data": "skd.data", "kernels": "skd_kernels"}.items():
        shown = set(re.findall(r"^      heading: (\S+)$", pages[f"reference/{page}.md"], re.M))
        public = {name for name in importlib.import_module(package).__all__ if name not in ("MEAN", "STD")}
        assert shown >= {f"{package}.{name}" for name in public - {"PREPROCESSING", "Batches"}}, package


def test_every_page_is_in_the_menu() -> None:
    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())
    menu = str(yaml.safe_load(text)["nav"])
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"'{page.name}'" not in menu] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Its links and headings too. The extra `docs` is needed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "TUTORIAL/index.html", "reference/python/index.html", "contributing/index.html"):
        text = (tmp_path / page).read_text()
        assert "<h1" in text and "::: " not in text, page
