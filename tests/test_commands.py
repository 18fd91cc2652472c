"""The commands on a user's own folder of images: convert, plan, train, extract, evaluate, finetune, info."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import skd
from skd.cli import main
from skd.commands._arguments import size

MODEL = ["--model", "vit_tiny_patch16_224", "--model-kwargs"]
KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
TRAINING = ["--epochs", "2", "--batch-size", "8", "--lr", "1e-3", "--eval-every", "1", "--aug-repeats", "1"]
TRAINING += ["--workers", "0", "--calibration-images", "24"]


def make_images(root: Path, classes: int = 3) -> None:
    """Class folders of single-colour noise: 8 training and 4 validation images each."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 120, (20, 24, 3))
                pixels[..., label % 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


def command(*argv: Any) -> dict[str, Any]:
    """Run one command that must succeed; what it wrote as JSON."""
    file = Path(str(argv[-1]))
    assert main([str(word) for word in (*argv[:-1], "--json", file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a converted, a planned and a trained super-network, and a cut."""
    folder = tmp_path_factory.mktemp("work")
    make_images(folder / "images")
    data = ["--data", folder / "images"]
    loading = ["--workers", 0, "--calibration-images", 24]
    converted, planned = folder / "converted.safetensors", folder / "planned.safetensors"
    command("convert", *MODEL, json.dumps(KWARGS), *data, "--out", converted, *loading, folder / "convert.json")
    command("plan", "--supernet", converted, *data, "--out", planned, "--rounds", 2, *loading, folder / "plan.json")
    command("train", "--supernet", converted, *data, "--out", folder / "run", *TRAINING, folder / "train.json")
    trained, half = folder / "run" / "supernet.safetensors", folder / "half.safetensors"
    command("extract", "--supernet", trained, "--macs", "0.6", "--out", half, folder / "extract.json")
    return folder


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["skd"])


def read(work: Path, name: str) -> dict[str, Any]:
    return json.loads((work / f"{name}.json").read_text())


def test_converted_file_has_the_models_function(work: Path) -> None:
    supernet = skd.load(work / "converted.safetensors")
    assert len(supernet.dropout_list) == 1
    assert read(work, "convert")["params"] == skd.cost(supernet).params


def test_plan_gives_sizes_down_to_an_eighth(work: Path) -> None:
    planned = skd.load(work / "planned.safetensors").dropout_list
    assert read(work, "plan")["entries"] == len(planned) > 5
    assert planned.macs[-1] < 0.35 * planned.macs[0]


def test_train_writes_the_contract(work: Path) -> None:
    run, document = work / "run", read(work, "train")
    names = {"supernet.safetensors", "dropout_list.json", "history.jsonl", "run.json", "report.md", "report"}
    assert names <= {path.name for path in run.iterdir()}
    assert list((run / "checkpoints").iterdir())
    supernet = skd.load(run / "supernet.safetensors")
    assert skd.DropoutList.from_json((run / "dropout_list.json").read_text()) == supernet.dropout_list
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert document["curve"] == rows[document["best_epoch"]]["curve"]
    assert document["config"]["epochs"] == 2 and document["config"]["lr"] == 1e-3


def test_train_goes_on_where_it_stopped(work: Path) -> None:
    """A finished run, resumed, has nothing left to do; without --resume it is not overwritten."""
    again = ["train", "--supernet", work / "converted.safetensors", "--data", work / "images", "--out", work / "run"]
    before = (work / "run" / "supernet.safetensors").read_bytes()
    assert main([str(word) for word in (*again, *TRAINING)]) == 2
    document = command(*again, *TRAINING, "--resume", "auto", work / "again.json")
    assert document["curve"] == read(work, "train")["curve"]
    assert (work / "run" / "supernet.safetensors").read_bytes() == before


def test_evaluate_agrees_with_training_and_extraction(work: Path) -> None:
    """The curve by the command is the one that training saw, and a cut scores as its entry does."""
    trained = ["--supernet", work / "run" / "supernet.safetensors"]
    data = ["--data", work / "images", "--workers", 0]
    curve = command("evaluate", *trained, *data, work / "curve.json")
    assert curve["curve"] == read(work, "train")["curve"] and curve["area"] == read(work, "train")["area"]
    entry = read(work, "extract")["entry"]
    one = command("evaluate", *trained, "--entry", entry, *data, work / "one.json")
    plain = command("evaluate", "--model", work / "half.safetensors", *data, work / "plain.json")
    assert one["top1"] == plain["top1"] and one["macs"] == read(work, "extract")["macs"]
    assert one["macs_fraction"] <= 0.6


def test_finetune_improves_nothing_but_writes_a_plain_model(work: Path) -> None:
    out = work / "finetuned"
    half = work / "half.safetensors"
    command("finetune", "--model", half, "--data", work / "images", "--out", out, *TRAINING, work / "finetune.json")
    model = skd.load(out / "model.safetensors")
    assert skd.cost(model) == skd.cost(skd.load(half))
    assert not (out / "dropout_list.json").exists()


def test_info_of_files(work: Path) -> None:
    supernet = command("info", work / "run" / "supernet.safetensors", work / "info.json")
    assert supernet["kind"] == "supernet" and supernet["input_size"] == [3, 16, 16]
    assert supernet["entries"] == len(skd.load(work / "run" / "supernet.safetensors").dropout_list)
    assert command("info", work / "half.safetensors", work / "info.json")["kind"] == "model"


def test_convert_from_a_checkpoint_of_skds_own(work: Path) -> None:
    document = command(
        *("convert", "--checkpoint", work / "half.safetensors", "--data", work / "images", "--workers", 0),
        *("--calibration-images", 24, "--out", work / "again.safetensors", work / "again.json"),
    )
    assert document["macs"] == read(work, "extract")["macs"]


def test_convert_from_a_state_dict(work: Path) -> None:
    """timm's way: a state dict for a named model. Its logits are those of the file."""
    model = skd.create_model(MODEL[1], **KWARGS)
    torch.save(model.state_dict(), work / "weights.pth")
    command(
        *("convert", *MODEL, json.dumps(KWARGS), "--checkpoint", work / "weights.pth", "--data", work / "images"),
        *("--workers", 0, "--calibration-images", 24, "--out", work / "named.safetensors", work / "named.json"),
    )
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            skd.load(work / "named.safetensors")(images), model.eval()(images), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("1", 1.0),
        ("1.0", 1.0),
        ("4.2G", 4_200_000_000),
        ("350m", 350_000_000),
        ("22000000", 22_000_000),
    ],
)
def test_sizes(text: str, value: float) -> None:
    assert size(text) == value and type(size(text)) is type(value)


@pytest.mark.parametrize("text", ["half", "G", "", "1.5T", "1.5", "nan", "inf", "1e400", "infG"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "finetune"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        printed = capsys.readouterr().out
        for setting in fields(skd.TrainConfig):
            assert f"--{setting.name.replace('_', '-')}" in printed


def test_settings_from_a_file_and_from_options(work: Path) -> None:
    """An option wins over the file, the file over the default."""
    (work / "settings.yaml").write_text("epochs: 7\nlr: 1e-4\nmixup: 0\nscale: [0.5, 1]\naa: none\n")
    document = command(
        *("train", "--dry-run", "--supernet", work / "converted.safetensors", "--config", work / "settings.yaml"),
        *("--batch-size", 4, "--epochs", 9, "--data", work / "images", work / "dry.json"),
    )
    assert document["images"] == 24 and document["steps_per_epoch"] == 6
    assert document["schedule"][-1]["epoch"] == 9 and document["schedule"][0]["lr"] == pytest.approx(1e-4)
    assert document["peak_bytes"] > document["state_bytes"] > 0
    assert [step["images"] for step in document["measured"]] == [2, 4]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert", "--data", "digits", "--out", "{out}"], "neither --model nor --checkpoint"),
        (["convert", "--model", "vit_tinny", "--data", "digits", "--out", "{out}"], "near names"),
        (["convert", "--checkpoint", "{work}/none", "--data", "digits", "--out", "{out}"], "no such file"),
        (["convert", "--checkpoint", "{work}/half.safetensors", "--data", "{work}/none", "--out", "{out}"], "none"),
        (["plan", "--supernet", "{work}/half.safetensors", "--data", "{data}", "--out", "{out}"], "a plain model"),
        (["train", "--supernet", "{work}/converted.safetensors", "--data", "{data}"], "--out is not given"),
        (["train", "--data", "{data}", "--out", "{out}"], "--supernet is not given"),
        (["train", "--dry-run"], "exactly one of --supernet and --model"),
        (["train", "--supernet", "{work}/converted.safetensors", "--data", "{data}/train", "--out", "{out}"], "val"),
        (
            ["train", "--supernet", "{work}/converted.safetensors", "--data", "{four}", "--out", "{out}"],
            "4 classes",
        ),
        (
            [
                "train",
                "--supernet",
                "{work}/converted.safetensors",
                "--data",
                "{data}",
                "--out",
                "{out}",
                "--lr",
                "-1",
            ],
            "lr is -1.0",
        ),
        (
            ["train", "--supernet", "{work}/converted.safetensors", "--data", "{data}", "--out", "{out}"],
            "batch_size is 1024",
        ),
        (
            ["extract", "--supernet", "{work}/run/supernet.safetensors", "--macs", "0.01", "--out", "{out}"],
            "smallest",
        ),
        (["evaluate", "--model", "{work}/run/supernet.safetensors", "--data", "{data}"], "give it as --supernet"),
        (["evaluate", "--model", "{work}/half.safetensors", "--entry", "1", "--data", "{data}"], "--entry is given"),
        (
            ["evaluate", "--supernet", "{work}/planned.safetensors", "--entry", "999", "--data", "{data}"],
            "entry is 999",
        ),
        (
            ["finetune", "--model", "{work}/converted.safetensors", "--data", "{data}", "--out", "{out}"],
            "super-network",
        ),
        (["evaluate", "--model", "{work}/half.safetensors", "--data", "{data}", "--device", "tpu9"], "--device is"),
        *(
            (["plan", "--supernet", "{trained}", "--data", "{data}", "--out", "{out}", "--device", name], message)
            for name, message in (
                ("meta", "--device is 'meta'"),
                ("mps", "'mps', which cannot be used here"),
                ("cpu:7", "there is one cpu"),
            )
        ),
        (["info", "{work}/none.safetensors"], "no such file"),
        (["plan", "--supernet", "{work}/converted.safetensors", "--data", "{data}", "--out", "{pipe}"], "a pipe"),
        (["extract", "--supernet", "{trained}", "--macs", "0.6", "--out", "{trained}"], "same file"),
        (["evaluate", "--supernet", "{trained}", "--data", "{data}", "--json", "{trained}"], "same file"),
        (["plan", "--supernet", "{trained}", "--data", "{data}", "--out", "{out}", "--json", "{out}"], "same file"),
        (["info", "{trained}", "--json", "{trained}"], "same file"),
        (
            [
                "train",
                "--supernet",
                "{trained}",
                "--data",
                "{data}",
                "--out",
                "{work}/run",
                "--json",
                "{work}/run/run.json",
            ],
            "of --out",
        ),
        (["plan", "--supernet", "{trained}", "--data", "{data}", "--out", "{link}"], "cannot be written"),
        (
            ["plan", "--supernet", "{trained}", "--data", "{data}", "--out", "{out}", "--calibration-images", "0"],
            "--calibration-images is 0",
        ),
        (
            [
                "convert",
                *MODEL,
                "{{}}",
                "--checkpoint",
                "{work}/half.safetensors",
                "--data",
                "{data}",
                "--out",
                "{out}",
            ],
            "size mismatch",
        ),
    ],
)
def test_mistakes(
    work: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what is wrong, exit status 2, and nothing written."""
    make_images(tmp_path / "four", classes=4)
    places = {"work": work, "data": work / "images", "out": tmp_path / "out", "four": tmp_path / "four"}
    places |= {"trained": work / "run" / "supernet.safetensors", "pipe": tmp_path / "pipe"}
    os.mkfifo(tmp_path / "pipe")
    places["link"] = tmp_path / "link"
    places["link"].symlink_to(tmp_path / "no folder" / "target")
    before = places["trained"].read_bytes()
    assert main([word.format(**places) for word in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "out").is_file() and (tmp_path / "pipe").is_fifo()
    assert places["trained"].read_bytes() == before


def test_predicted_labels_need_no_classes_of_the_model(work: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "four", classes=4)
    argv = ["convert", *MODEL, json.dumps(KWARGS), "--data", tmp_path / "four", "--labels", "predicted"]
    command(*argv, "--out", tmp_path / "out.safetensors", "--workers", 0, tmp_path / "out.json")
    assert header(tmp_path / "out.safetensors")["label_names"] is None


def test_files_have_the_names_of_the_classes(work: Path) -> None:
    for name in ("converted", "planned", "run/supernet", "half"):
        assert header(work / f"{name}.safetensors")["label_names"] == ["class0", "class1", "class2"]


def test_a_link_stays_one(work: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    argv = ["extract", "--supernet", work / "planned.safetensors", "--macs", "0.6", "--out", tmp_path / "link"]
    command(*argv, tmp_path / "a.json")
    assert (tmp_path / "link").is_symlink() and skd.load(tmp_path / "target")


def test_broken_images_are_skipped_and_counted_or_fail(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "images")
    broken = tmp_path / "images" / "val" / "class1" / "0.png"
    broken.write_bytes(b"no image")
    evaluate = ["evaluate", "--model", work / "half.safetensors", "--data", tmp_path / "images", "--workers", 0]
    document = command(*evaluate, tmp_path / "skip.json")
    assert "warning: 1 image of" in capsys.readouterr().err
    assert [Path(name).name for name in document["skipped_images"]] == ["0.png"]
    assert main([str(word) for word in (*evaluate, "--bad-images", "fail")]) == 2


def test_splits_with_different_classes_are_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many classes, but not the same: labels would be shifted by one, and every accuracy wrong."""
    make_images(tmp_path / "images")
    (tmp_path / "images" / "val" / "class0").rename(tmp_path / "images" / "val" / "class9")
    argv = ["train", "--supernet", work / "converted.safetensors", "--data", tmp_path / "images", *TRAINING]
    assert main([str(word) for word in (*argv, "--out", tmp_path / "out")]) == 2
    assert "different classes" in capsys.readouterr().err
