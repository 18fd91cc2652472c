"""README's commands and code run as they stand, and so do those of the pages in docs/; figures are those measured."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import perturb, random_batches, tiny_vit
from make_measured_lines import BEGIN, END, lines

import skd
from benchmarks.result import split
from skd import cli

# Models whose attention is cut by heads, or not at all: projections together with and without a bias, and apart.
HEADS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_patch16_dinov3": {},
    "eva02_base_patch14_224": {"scale_mlp": False, "patch_size": 16},
    "vit_base_patch16_rope_224": {"num_reg_tokens": 1},
    "beit_base_patch16_224": {},
}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
USE, FILES, ARCHITECTURES = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("USE", "FILES", "ARCHITECTURES"))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}


def snippet(page: str, name: str) -> str:
    """Code between the marker `name` and the next one, without the fence of Markdown."""
    text = re.search(rf"<!-- snippet: {name} -->\n(.*?)<!-- snippet: end -->", page, flags=re.DOTALL).group(1)
    return re.sub(r"^```.*\n", "", text, flags=re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """What is indented and starts with `skd`: the arguments of each."""
    lines = re.findall(r"^    skd (\w+ .*)$", page, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def named_model() -> Any:
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("deit3_small_patch16_224", **args).eval()


def of_heads(name: str) -> Any:
    """An Eva or a Beit of the size of the others."""
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **size, **HEADS[name], init_values=0.5).eval()
    perturb(model)
    return model


MODELS = {
    "constructor": lambda: tiny_vit(torch.float32),
    "timm name": named_model,
    **{name: partial(of_heads, name) for name in HEADS},
}


QUICK = "timm name"  # the others are run by hand
CASES = [
    pytest.param(make, id=name, marks=() if name == QUICK else pytest.mark.slow) for name, make in MODELS.items()
]


REBUILD = """
import os
import sys

import torch

for entry in range(3):
    os.chdir(str(entry))
    names = {}
    exec(sys.argv[1], names)
    images, expected = torch.load("expected.pt")
    model = names["model"].eval()
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.numel() for parameter in model.parameters())
    torch.save(model, "rebuilt.pt")
    os.chdir("..")
assert not any(name.split(".")[0] in ("skd", "skd_kernels") for name in sys.modules)
"""


@pytest.mark.parametrize("build", CASES)
def test_the_rebuild_snippet_needs_no_skd(build: Any, tmp_path: Path) -> None:
    batches = random_batches(dtype=torch.float32)
    supernet = skd.convert(build(), batches)
    full = supernet.widths()
    some = min(8, full[2] // 2 if full[2] > 1 and not supernet.infos[2].binary else full[2])
    cuts = [full, [full[0], 24, some, 24], [0, 24, some, 0]]
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, cuts)
    images = batches[0][0]
    for entry in range(3):
        (tmp_path / str(entry)).mkdir()
        skd.save(skd.extract(supernet, entry=entry), tmp_path / str(entry) / "small.safetensors")
        with torch.no_grad():
            torch.save((images, supernet(images, entry=entry)), tmp_path / str(entry) / "expected.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REBUILD, snippet(FILES, "rebuild")], cwd=tmp_path, check=True
    )
    for entry in range(3):
        rebuilt = torch.load(tmp_path / str(entry) / "rebuilt.pt", weights_only=False)
        assert skd.cost(rebuilt) == skd.cost(supernet, entry=entry)
        assert type(rebuilt.blocks[0].attn).__module__.startswith("timm.") or supernet.widths(entry)[0] == 0
        program = torch.export.export(rebuilt, (images,)).module()
        torch.testing.assert_close(program(images), rebuilt(images), rtol=1e-5, atol=1e-5)


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code block of docs/USE.md, on a tiny model in place of the downloaded one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: tiny_vit(torch.float32))
    code = snippet(USE, "tour").replace("params=6_000_000", "params=20_000")
    code = code.replace("epochs=300, batch_size=1024", "epochs=2, batch_size=4, lr=1e-3")
    batches = random_batches(dtype=torch.float32)
    names: dict[str, Any] = dict.fromkeys(("calibration", "train_loader", "val_loader"), batches)
    names["images"] = batches[0][0]
    exec(compile(code, "USE.md", "exec"), names)
    assert (tmp_path / "small.safetensors").is_file() and (tmp_path / "supernet.safetensors").is_file()
    assert names["logits"].shape == (4, 5)
    assert sum(p.numel() for p in names["tiny"].parameters()) <= 20_000
    assert len(names["history"].epochs) == 2 and (tmp_path / "run" / "supernet.safetensors").is_file()
    exec(compile(snippet(USE, "family"), "USE.md", "exec"), names)
    assert names["family"].at(macs=0.25) is names["fast"] and names["logits"].shape == (4, 5)


def test_costs_quoted_in_the_docs() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    assert f"{skd.cost(model).macs:,} MACs in `full`" in USE.replace("\n", " ")
    assert f"and {skd.cost(model, convention='linear').macs:,} in `linear`" in USE


def run(code: str, folder: Path) -> str:
    """What a program printed, in a process and a folder of its own."""
    # A folder first, so that what is tested is the skd of this process.
    environment = os.environ | {"PYTHONPATH": str(Path(skd.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_code_runs_as_it_stands(tmp_path: Path) -> None:
    """It learns, its sub-networks are within their budgets, and what it saves can be read."""
    printed = run(snippet(README, "python"), tmp_path)
    found = {
        name: (int(macs), int(params), float(top1))
        for name, macs, params, top1 in re.findall(
            r"^(\S+) Cost\(macs=(\d+), params=(\d+)\) (\S+) %$", printed, flags=re.MULTILINE
        )
    }
    full = found["super-network"]
    assert found["before"][:2] == full[:2]
    assert found["half"][0] <= full[0] / 2 and found["tiny"][1] <= 60_000
    assert min(found[name][2] for name in ("super-network", "half", "tiny")) > 40
    assert skd.cost(skd.load(tmp_path / "half.safetensors")).macs == found["half"][0]


SMALL = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def test_the_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the digits, with a small model of that name and one epoch."""
    monkeypatch.chdir(tmp_path)
    block = commands(snippet(README, "commands"))
    assert [line[0] for line in block] == ["convert", "train", "evaluate", "extract", "finetune"]
    quick = ["--epochs", "1", "--workers", "0", "--batch-size", "256", "--lr", "1e-3", "--aug-repeats", "1"]
    for command, *options in block:
        given = ["digits" if option == "imagenet/" else option for option in options]
        if command == "convert":
            given[given.index("--pretrained")] = f"--model-kwargs={json.dumps(SMALL)}"
        assert cli.main([command, *given, *(quick if command in ("train", "finetune") else [])]) in (0, None)
    assert skd.cost(skd.load("half.safetensors")).macs <= skd.cost(skd.load("run/supernet.safetensors")).macs / 2


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_docs_are_understood(page: str) -> None:
    """Every command and option exists; no file is looked for."""
    for command, *options in commands(PAGES[page].read_text()):
        if options[-1:] != ["\\"]:
            cli.parsed([command, *options])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """To a file, and where a heading is named to one that the page has."""
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page].read_text()):
        path = PAGES[page].parent / target if target else PAGES[page]
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{target}#{heading}; it may be one of {anchors}"


def test_measured_lines_are_fresh() -> None:
    _, written, _ = split(README, BEGIN, END)
    assert written == lines(), "run: PYTHONPATH=. python tests/make_measured_lines.py --write README.md"


def test_the_number_of_architectures_is_that_of_the_table() -> None:
    release, names, good = re.search(
        r"timm (\S+) builds (\d+) names as .*; (\d+) of them convert", ARCHITECTURES
    ).groups()
    assert f"{good} of the {names} names that timm {release} builds" in README


@pytest.mark.parametrize("name", ["idea", "step", "loop", "widths"])
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    code = f"import {name}; sys.stdout.write({name}.picture())"
    assert (
        run(f"import sys; sys.path.insert(0, {str(ROOT / 'docs' / 'pictures')!r}); {code}", ROOT)
        == (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
    )
