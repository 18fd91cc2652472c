"""Where things are: every package says what its files are, and only one of them knows timm's classes and fields."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

import skd

HOUSE = Path(skd.__file__).parent
PACKAGES = [
    "skd",
    "skd.commands",
    "skd.data",
    "skd.demo",
    "skd.export",
    "skd.planners",
    "skd.recipes",
    "skd.support",
    "skd.training",
    "skd.vit",
    "skd.vit.families",
    "skd_kernels",
    "skd_kernels.gpu",
]


def contents(folder: Path) -> set[str]:
    """The files and packages in the folder of a package, without their endings."""
    files = {path.stem for path in folder.iterdir() if path.suffix in (".py", ".yaml")} - {"__init__"}
    return files | {path.parent.name for path in folder.glob("*/__init__.py")}


def mapped(docstring: str) -> set[str]:
    """The files that a docstring says something of: what stands before the gap of a line, or ends in .py."""
    gaps = [re.match(r"\s*(\S+(?: \S+)*?) {2,}\S", line) for line in docstring.splitlines()]
    words = [word for gap in gaps if gap for word in re.split(r",? ", gap[1])]
    lefts = {re.sub(r"\.py$|/$", "", word) for word in words}
    return lefts | set(re.findall(r"(\w+)\.py\b", docstring))


def test_every_package_is_here() -> None:
    found = {path.parent for root in ("skd", "skd_kernels") for path in (HOUSE.parent / root).rglob("__init__.py")}
    assert {".".join(path.relative_to(HOUSE.parent).parts) for path in found} == {*PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_docstring_of_a_package_is_a_map_of_its_files(package: str) -> None:
    """Whoever opens a package finds in its first lines which file is for what, and none is left out."""
    module = import_module(package)
    assert contents(Path(str(module.__file__)).parent) <= mapped(str(module.__doc__))


def test_a_file_that_a_map_leaves_out_is_noticed(tmp_path: Path) -> None:
    for name in ("__init__.py", "one.py", "two.py", "three.yaml", "four.txt"):
        (tmp_path / name).touch()
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "__init__.py").touch()
    assert contents(tmp_path) == {"one", "two", "three", "five"}
    assert mapped("The four of them.\n\n    one, two.py    what they do\n    five/    more") >= {"one", "two", "five"}
    assert not {"The", "four", "what", "do"} & mapped("The four of them.\n\n    one    what they do")


# How timm lays out the weights of a block, which kinds of modules there are, and where timm has its classes. Some
# families turn coordinates in pairs, some have q, k and v in one tensor: code that says so works for those alone.
# skd/demo/running.py is the exception: it builds the one model that the demonstration is about, as a user would.
OF_TIMM = [
    r"attn\.qkv",
    r"\.kind ==",
    r"\b2 \* i\b",
    r"// 2\]",
    r"\.patch_embed",
    r"\.num_prefix_tokens",
    r"timm\.layers",
    r"timm\.models",
]
EXCEPTIONS = {"demo/running.py": {r"timm\.models"}}


@pytest.mark.parametrize("pattern", OF_TIMM)
def test_only_skd_vit_knows_timms_transformers(pattern: str) -> None:
    """So that a new family of transformers is one new file there."""
    files = [path.relative_to(HOUSE) for path in HOUSE.rglob("*.py")]
    others = [file for file in files if file.parts[0] != "vit" and pattern not in EXCEPTIONS.get(str(file), ())]
    assert len(others) > 50
    assert [str(file) for file in others if re.search(pattern, (HOUSE / file).read_text(encoding="utf-8"))] == []
