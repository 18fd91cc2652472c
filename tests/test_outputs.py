"""What commands declare of their files, and the rule that no output takes the place of another file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from skd.cli import parsed
from skd.commands import COMMANDS
from skd.support.outputs import Files, check_files, new_folder, temporary_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a few files in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("net.safetensors", "run/supernet.safetensors", "run/sub-50.json", "images/a.png", "images/a.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("link").symlink_to("net.safetensors")
    Path("folder").symlink_to("run")
    Path("run/curve.png").symlink_to("../kept.json")
    return tmp_path


RUN = ("supernet.safetensors", "curve.png", "sub-*.json", "checkpoints/*")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            Files({"--supernet": "net.safetensors"}, {"--out": "./net.safetensors"}),
            "--out and --supernet are the same",
        ),
        (Files({"--supernet": "net.safetensors"}, {"--json": "link"}), "--json and --supernet are the same"),
        (Files({}, {"--out": "new", "--json": "images/../new"}), "are the same file"),
        (
            Files({"--model": "run/supernet.safetensors"}, {}, {"--out": ("run", RUN)}),
            "--model is .* a file of --out",
        ),
        (Files({"--model": "folder/supernet.safetensors"}, {}, {"--out": ("run", RUN)}), "a file of --out"),
        (Files({"--model": "run/supernet.safetensors"}, {}, {"--out": ("folder", RUN)}), "a file of --out"),
        (Files({}, {"--json": "run/sub-75.json"}, {"--out": ("run", RUN)}), "--json is .* a file of --out"),
        (Files({}, {"--json": "run/checkpoints/x"}, {"--out": ("run/", RUN)}), "a file of --out"),
        (Files({}, {"--json": "kept.json"}, {"--out": ("run", RUN)}), "a file of --out"),
        (Files({"--data": "images"}, {"--json": "images/a.png"}), "--json is .* in the folder of --data"),
        (Files({"--data": "images"}, {"--json": "images/_info.json"}), "in the folder of --data"),
    ],
)
def test_what_would_be_lost_is_refused(place: Path, files: Files, told: str) -> None:
    with pytest.raises(ValueError, match=f"{told}.*would be lost"):
        check_files(files)


@pytest.mark.parametrize(
    "files",
    [
        Files({"--supernet": None}, {"--out": None, "--json": None}, {"--folder": (None, RUN)}),
        Files({"--supernet": "net.safetensors"}, {"--out": "link"}, in_place=[("--out", "--supernet")]),
        Files({"--model": "vit_tiny"}, {"--out": "vit_tiny"}),  # a name of timm's
        Files({"--data": "images"}, {"--json": "images/a.json", "--out": "images/b.safetensors"}),
        Files({"--data": "digits"}, {"--json": "digits/b.txt"}),
        Files({"--supernet": "net.safetensors"}, {"--json": "run/other.json"}, {"--out": ("run", RUN)}),
        Files({"--supernet": "run/supernet.safetensors"}, {}, {"--out": ("images", RUN)}),
    ],
)
def test_everything_else_is_allowed(place: Path, files: Files) -> None:
    check_files(files)


@pytest.mark.parametrize(
    "files",
    [
        Files({"--x": ""}),
        Files({}, {"--x": ""}),
        Files({}, {}, {"--x": ("", RUN)}),
        Files({"--x": "a\0b"}),
    ],
)
def test_a_name_that_names_nothing(files: Files) -> None:
    """A path of no letters would be the working folder, or taken for an option that is not given."""
    with pytest.raises(ValueError, match=r"--x is '.*', which names nothing"):
        check_files(files)


def test_what_was_allowed_once_is_allowed_again(place: Path) -> None:
    """In a folder of images the name of an output decides, not whether it is there already."""
    for name in ("b.png", "result", "a.txt", "new/b.json", "b.safetensors", "_info.json"):
        files, answers = Files({"--data": "images"}, {"--json": f"images/{name}"}), []
        for _ in range(2):
            try:
                check_files(files)
                answers.append("")
            except ValueError as error:
                answers.append(str(error))
            (place / "images" / name).parent.mkdir(exist_ok=True)
            (place / "images" / name).touch()
        assert answers[0] == answers[1] and ("it must end in .json" in answers[0]) == (
            not name.startswith(("b.s", "new"))
        )


# The least that each command can be given; and with what more it would lose a file.
LEAST = {
    "demo": "",
    "convert": "--data images --out new",
    "plan": "--supernet net.safetensors --data images --out new",
    "train": "--supernet net.safetensors --out run",
    "extract": "--supernet net.safetensors --entry 0 --out new",
    "evaluate": "--supernet net.safetensors --data images",
    "finetune": "--model net.safetensors --out run",
    "export": "--supernet net.safetensors --entry 0 --format pt2 --out new.pt2",
    "latency": "--supernet net.safetensors --out new",
    "benchmark": "--supernet net.safetensors",
    "info": "net.safetensors",
}
LOST = {
    "demo": ["--out run --json run/summary.json", "--out run --json run/sub-50.safetensors"],
    "convert": ["--checkpoint net.safetensors --out net.safetensors", "--class-map net.safetensors --out link"],
    "plan": ["--json net.safetensors", "--json new", "--class-map net.safetensors --out net.safetensors"],
    "train": [
        *("--supernet run/supernet.safetensors", "--supernet folder/supernet.safetensors --resume auto"),
        *(
            f"--json run/{name}"
            for name in ("run.json", "report/curve.png", "checkpoints/step-1", "tensorboard/x", "history.jsonl")
        ),
        "--config run/sub-50.json --json run/sub-50.json",
    ],
    "extract": ["--out net.safetensors", "--json new"],
    "evaluate": [
        *("--json net.safetensors", "--json images/a.png", "--json images/new.txt"),
        *(f"--data {name}/images --json images/new.txt" for name in ("wds", "hfids", "hfds")),
        "--data wds/images --json images/_info.json",
        "--data tfds/x --data-dir images --json images/new.txt",
    ],
    "finetune": ["--model run/model.safetensors", "--json run/model.safetensors", "--checkpoint run/report.md"],
    "export": [
        *(
            "--out net.safetensors",
            "--json new.pt2",
            "--json new.aoti.pt2",
            "--evaluated run/sub-50.json --json run/sub-50.json",
        ),
        *("--format timm --out run --json run/config.json", "--format timm --out run --json run/macs-0.5/x"),
    ],
    "latency": ["--out net.safetensors", "--json new"],
    "benchmark": ["--json net.safetensors", "--latency-table run/sub-50.json --json run/sub-50.json"],
    "info": ["--json net.safetensors"],
}


def declared(command: str, more: str = "") -> Files:
    arguments: argparse.Namespace = parsed([command, *LEAST[command].split(), *more.split()])
    files = COMMANDS[command].files(arguments)
    return Files(files.reads, {**files.writes, "--json": arguments.json}, files.folders, files.in_place)


def test_every_command_is_here() -> None:
    assert LEAST.keys() == LOST.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_declares_its_files(place: Path, command: str) -> None:
    for name in ("model.safetensors", "report.md"):
        (place / "run" / name).touch()
    check_files(declared(command))
    for more in LOST[command]:
        with pytest.raises(ValueError, match="would be lost"):
            check_files(declared(command, more))


def test_what_train_only_reads_or_does_not_touch_is_allowed(place: Path) -> None:
    (place / "run" / "converted.safetensors").touch()
    check_files(declared("train", "--supernet run/converted.safetensors --resume auto"))
    check_files(declared("train", "--supernet run/supernet.safetensors --dry-run"))
    with pytest.raises(ValueError, match="a file of --out"):
        check_files(declared("finetune", "--checkpoint run/converted.safetensors --json run/run.json"))


def test_a_temporary_folder_is_its_own(tmp_path: Path) -> None:
    """What another process has made stays, and a folder that is kept has the usual permissions."""
    (tmp_path / f".out.{os.getpid()}").mkdir()
    (tmp_path / "new").mkdir()
    with temporary_folder(tmp_path / "out") as first, temporary_folder(tmp_path / "out") as second:
        assert first != second and first.stat().st_mode == (tmp_path / "new").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {f".out.{os.getpid()}", "new"}


def test_a_mount_is_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    assert new_folder(tmp_path / "out") == tmp_path / "out"
    with pytest.raises(ValueError, match="where a disk is mounted"):
        new_folder(tmp_path)
