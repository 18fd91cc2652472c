"""The options of the commands that concern data, and what they say of the images they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_commands
from PIL import Image
from test_commands import KWARGS, MODEL, command, make_images, read

import skd
from skd.cli import main

work = test_commands.work  # the fixture


def test_every_command_says_what_it_read(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images read, skipped and why, left out and why: on the screen and as JSON."""
    make_images(tmp_path / "images")
    val = tmp_path / "images" / "val" / "class0"
    (val / "0.png").write_bytes(b"no picture")
    (val / "notes.txt").touch()
    data = ["--data", tmp_path / "images", "--workers", 0]
    document = command("evaluate", "--model", work / "half.safetensors", *data, tmp_path / "evaluate.json")
    validation = document["images"]["validation"]
    assert (validation["images"], validation["read"], validation["not_upright"]) == (12, 11, 0)
    assert list(validation["skipped"]) == document["skipped_images"] == [str(val / "0.png")]
    assert validation["skipped"][str(val / "0.png")].startswith("UnidentifiedImageError")
    assert validation["left_out"] == {"no image by its name (.txt)": {"count": 1, "such_as": ["class0/notes.txt"]}}
    printed = capsys.readouterr().out
    assert "validation: 11 of 12 images read; skipped: 1, " in printed and "left out: 1 no image by its" in printed
    for name, calibrated in (("convert", 24), ("plan", 24)):
        assert read(work, name)["images"]["calibration"]["read"] == calibrated
    assert {name: entry["read"] for name, entry in read(work, "train")["images"].items()} == {
        "training": 24,
        "validation": 12,
        "calibration": 24,
    }
    dry = ["train", "--dry-run", "--supernet", work / "converted.safetensors", "--batch-size", 4, *data[:2]]
    assert command(*dry, "--train-split", "val", tmp_path / "dry.json")["left_out"] == validation["left_out"]


def test_images_without_labels(work: Path, tmp_path: Path) -> None:
    """In one folder, for convert and plan: as with labels that are not looked at."""
    make_images(tmp_path / "images")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "images" / "train").rglob("*.png"):
        file.rename(flat / f"{file.parent.name}-{file.name}")
    options = ["--labels", "predicted", "--data", flat, "--workers", 0, "--out"]
    out = tmp_path / "out.safetensors"
    convert = command("convert", *MODEL, json.dumps(KWARGS), *options, out, tmp_path / "convert.json")
    plan = command("plan", "--supernet", out, *options, out, "--rounds", 2, tmp_path / "plan.json")
    assert convert["images"]["calibration"]["read"] == plan["images"]["calibration"]["read"] == 24
    assert len(skd.load(out).dropout_list) == plan["entries"] > 5
    for argv in (["convert", *MODEL, json.dumps(KWARGS)], ["plan", "--supernet", out]):
        assert main([str(word) for word in (*argv, "--data", flat, "--out", tmp_path / "not")]) == 2
    assert not (tmp_path / "not").exists()


def test_predicted_labels_do_not_depend_on_the_given_ones(work: Path, tmp_path: Path) -> None:
    """skd plan --labels predicted takes images of classes that the model does not have."""
    make_images(tmp_path / "four", classes=4)
    argv = ["plan", "--supernet", work / "converted.safetensors", "--data", tmp_path / "four", "--workers", 0]
    argv += ["--rounds", 2, "--out", tmp_path / "out.safetensors"]
    assert main([str(word) for word in argv]) == 2
    assert command(*argv, "--labels", "predicted", tmp_path / "out.json")["entries"] > 5


def test_columns_of_hugging_face(work: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    make_images(tmp_path / "images")
    rows = sorted((tmp_path / "images" / "val").rglob("*.png"))
    table = datasets.Dataset.from_dict({"picture": [str(file) for file in rows], "kind": [i // 4 for i in range(12)]})
    table = table.cast_column("picture", datasets.Image())
    table = table.cast_column("kind", datasets.ClassLabel(names=[f"class{label}" for label in range(3)]))
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "validation.parquet")
    base = ["evaluate", "--model", work / "half.safetensors", "--workers", 0]
    argv = [*base, "--data", f"hfds/{tmp_path / 'table'}", "--data-dir", tmp_path / "cache"]
    keys = ["--input-key", "picture", "--target-key", "kind"]
    found = command(*argv, *keys, tmp_path / "table.json")
    assert found["top1"] == command(*base, "--data", tmp_path / "images", tmp_path / "folder.json")["top1"]
    assert found["images"]["validation"]["read"] == 12
    assert main([str(word) for word in argv]) == main([str(word) for word in (*argv, *keys[:2])]) == 2
    assert main([str(word) for word in (*base, "--data", tmp_path / "images", *keys)]) == 2
    argv = ["plan", "--supernet", work / "converted.safetensors", *argv[-4:], "--train-split", "validation"]
    argv += ["--input-key", "picture", "--labels", "predicted", "--rounds", 2, "--out", tmp_path / "out.safetensors"]
    assert command(*argv, tmp_path / "plan.json")["images"]["calibration"]["read"] == 12


def test_orientation_by_the_command(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path / "images")
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in (tmp_path / "images" / "val" / "class1").glob("*.png"):
        Image.open(file).save(file, exif=exif)
    argv = ["evaluate", "--model", work / "half.safetensors", "--data", tmp_path / "images", "--workers", 0]
    assert command(*argv, tmp_path / "stored.json")["images"]["validation"]["not_upright"] == 4
    streams = capsys.readouterr()
    assert "warning: 4 images of" in streams.err and "not turned as EXIF says: 4" in streams.out
    assert command(*argv, "--exif-orientation", tmp_path / "turned.json")["images"]["validation"]["not_upright"] == 0
    assert "warning" not in capsys.readouterr().err
