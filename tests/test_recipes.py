"""The published runs that come with skd: their settings, and how the commands take them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from test_commands import KWARGS, MODEL, TRAINING, command, make_images

import skd
from skd.cli import main
from skd.recipes import names, read_recipe

SIZES = {"tiny": 1_083_551_656, "small": 4_258_618_216, "base": 16_883_299_048}


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert names() == ["deit_base", "deit_finetune", "deit_small", "deit_tiny"]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert all(name in capsys.readouterr().out.replace("\n", " ") for name in ["deit_base"])


@pytest.mark.parametrize("size", SIZES)
def test_settings_are_the_published_ones(size: str) -> None:
    """METHOD 2; the defaults are the paper's too, but for what makes short runs, costs or sub-networks better."""
    config = skd.TrainConfig(**read_recipe(f"deit_{size}").settings)
    changed = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    assert changed <= {
        "epochs",
        "warmup_epochs",
        "progressive_epochs",
        "planner",
        "convention",
        "model_ema_warmup",
        "expected_top1",
    }
    assert config.epochs == (150 if size == "base" else 300)
    assert (config.batch_size, config.peak_lr, config.weight_decay, config.warmup) == (1024, 1e-3, 0.05, 5)
    assert (config.target, config.growing_epochs, config.convention) == (0.875, 50, "linear")
    assert config.chosen_planner == "paper"
    assert (config.model_ema, config.model_ema_warmup, config.decay) == (True, False, "published")


@pytest.mark.parametrize("size", SIZES)
def test_expected_tables_are_of_the_model(size: str) -> None:
    """Published MACs are shares of 12, 10, 8, 6 and 4 twelfths of the full network, in the linear convention."""
    about = read_recipe(f"deit_{size}").about
    assert (
        about["model"] == f"deit_{size}_patch16_224"
        and about["command"] == "train"
        and "2511.11683" in about["source"]
    )
    macs = [float(row["macs"].removesuffix("G")) * 1e9 for row in about["expected"]]
    for found, twelfths in zip(macs, (12, 10, 8, 6, 4), strict=True):
        assert found == pytest.approx(SIZES[size] * twelfths / 12, abs=6e6)
    assert skd.cost(skd.create_model(about["model"]), convention="linear").macs == SIZES[size]


def test_finetuning_is_the_published_one() -> None:
    recipe = read_recipe("deit_finetune")
    config = skd.finetune_config(**recipe.settings)
    assert config.changed(model_ema_warmup=True) == skd.finetune_config()
    assert recipe.about["command"] == "finetune" and len(recipe.about["expected"]) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train", "--config", "deit_bass", "--dry-run"],
            "deit_base, deit_finetune, deit_small, deit_tiny (did you mean",
        ),
        (["train", "--config", "deit_finetune", "--dry-run"], "a recipe for skd finetune, not for skd train"),
        (["finetune", "--config", "deit_tiny", "--model", "x"], "a recipe for skd train, not for skd finetune"),
        (["train", "--config", "{bad}", "--dry-run"], "its section recipe must hold names and values"),
    ],
)
def test_mistakes(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("recipe: deit\n")
    assert main([word.format(bad=tmp_path / "bad.yaml") for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_the_same_kind_is_taken_by_its_path(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text((Path(skd.__file__).parent / "recipes" / "deit_tiny.yaml").read_text() + "seed: 3\n")
    mine, shipped = read_recipe(copy), read_recipe("deit_tiny")
    assert mine.about == shipped.about and mine.settings == shipped.settings | {"seed": 3}


def dry_run(tmp_path: Path, size: str, *options: Any) -> dict[str, Any]:
    document = command("train", "--config", f"deit_{size}", "--dry-run", *options, tmp_path / "dry.json")
    assert document["steps_per_epoch"] == 1251 and document["images_assumed"]
    assert document["seconds_per_epoch"] == pytest.approx(1251 * document["seconds_per_step"])
    return document


def test_dry_run_at_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 images are planned for; at most 8 are made on a CPU."""
    document = dry_run(tmp_path, "tiny", "--device", "cpu")
    assert document["parameters"] == 5_717_416 and [step["images"] for step in document["measured"]] == [4, 8]
    assert [row["processes"] for row in document["processes"]] == [1, 8, 32]
    assert [row["images"] for row in document["processes"]] == [1024, 128, 32]
    peaks = [row["peak_bytes"] for row in document["processes"]]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] >= document["state_bytes"]
    assert document["expected"][0] == {"macs": "1.08G", "top1": 72.1}
    printed = capsys.readouterr().out
    assert "time per epoch" in printed and "arXiv 2511.11683" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parameters"), [("small", 22_050_664), ("base", 86_567_656)])
def test_dry_run_of_the_larger_ones(tmp_path: Path, size: str, parameters: int) -> None:
    document = dry_run(tmp_path, size, "--device", "cpu", "--grad-accum-steps", 32)
    assert document["parameters"] == parameters
    assert [row["images"] for row in document["processes"]] == [32, 4, 1]


def test_a_run_that_begins_with_the_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe's model needs no skd convert; what was converted is kept, and taken up by --resume."""
    make_images(tmp_path / "images")
    model = skd.create_model(MODEL[1], **KWARGS)
    skd.save(model, tmp_path / "plain.safetensors")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"recipe: {{model: {MODEL[1]}}}\n")
    run = ["train", "--config", recipe, "--model-kwargs", json.dumps(KWARGS), "--data", tmp_path / "images"]
    run += ["--checkpoint", tmp_path / "plain.safetensors", "--out", tmp_path / "run", *TRAINING]
    document = command(*run, tmp_path / "train.json")
    assert document["entries"] > 1 and (tmp_path / "run" / "supernet.safetensors").is_file()
    assert document["images"]["conversion"]["read"] == document["images"]["training"]["read"] == 24
    converted = tmp_path / "run" / "converted.safetensors"
    assert len(skd.load(converted).dropout_list) == 1
    before = converted.read_bytes()
    assert main([str(word) for word in run]) == 2 and "--resume auto" in capsys.readouterr().err
    assert command(*run, "--resume", "auto", tmp_path / "again.json")["curve"] == document["curve"]
    assert converted.read_bytes() == before
