"""The models that the commands take, and their classes: files, names, checkpoints, new heads, other orders."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_commands import KWARGS, MODEL, TRAINING, command, header, make_images
from timm.models import save_for_hf

import skd
from skd.cli import main, parsed
from skd.commands._work import with_new_head
from skd.extract import choose_entry

LOADING = ["--workers", 0, "--calibration-images", 24]
TRAIN = ["--epochs", "1", *TRAINING[2:]]
NAMED = [*MODEL, json.dumps(KWARGS)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three and of two classes, a super-network, its plan, and a model that knows the three."""
    folder = tmp_path_factory.mktemp("models")
    make_images(folder / "images")
    make_images(folder / "two", classes=2)
    data = ["--data", folder / "images"]
    command("finetune", *NAMED, *data, "--out", folder / "run", *TRAIN, "--epochs", "12", folder / "finetune.json")
    shutil.copy(folder / "run" / "model.safetensors", folder / "model.safetensors")
    model = skd.load(folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "own.pth")
    converted, planned = folder / "converted.safetensors", folder / "planned.safetensors"
    own = ["--checkpoint", folder / "model.safetensors"]
    command("convert", *own, *data, "--out", converted, *LOADING, folder / "convert.json")
    plan = ["--supernet", converted, *data, "--out", planned, "--rounds", 1, "--target", 0.6]
    command("plan", *plan, "--planner", "paper", *LOADING, folder / "plan.json")
    return folder


def run(*argv: Any) -> int:
    return main([str(word) for word in argv])


def top1(file: Path, data: Path, *options: Any) -> float:
    argv = ["evaluate", *options, "--data", data, "--workers", 0]
    return command(*argv, *([] if "--model" in options else ["--model", file]), file.with_suffix(".json"))["top1"]


def in_other_order(file: Path, out: Path) -> Path:
    """The model with its classes in the order 2, 0, 1, and their names with them."""
    model, order = skd.load(file), [2, 0, 1]
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[order].clone())
        model.head.bias.copy_(model.head.bias[order].clone())
    names = model.pretrained_cfg["label_names"]
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": [names[label] for label in order]}
    skd.save(model, out)
    return out


def test_classes_are_matched_by_name(work: Path, tmp_path: Path) -> None:
    """Of evaluate, convert, plan, train and finetune: each sees the labels of the model, and keeps its names."""
    images, own = work / "images", work / "model.safetensors"
    other, known = in_other_order(own, tmp_path / "other.safetensors"), ["class2", "class0", "class1"]
    right = top1(own, images)
    assert right > 50 and top1(other, images) == right
    converted = tmp_path / "converted.safetensors"
    command("convert", "--checkpoint", other, "--data", images, "--out", converted, *LOADING, tmp_path / "a.json")
    same, expected = skd.load(converted), skd.load(work / "converted.safetensors")
    for found, of_given in zip(same.model.blocks.parameters(), expected.model.blocks.parameters(), strict=True):
        torch.testing.assert_close(found, of_given, atol=1e-3, rtol=1e-3)
    planned = tmp_path / "planned.safetensors"
    plan = ["--supernet", converted, "--data", images, "--out", planned, "--rounds", 1, "--target", 0.6, *LOADING]
    command("plan", *plan, "--planner", "paper", tmp_path / "b.json")
    assert skd.load(planned).dropout_list == skd.load(work / "planned.safetensors").dropout_list
    trained, tuned = tmp_path / "trained", tmp_path / "tuned"
    still = [*TRAIN, "--lr", "1e-12", "--warmup-lr", "1e-12", "--min-lr", "1e-12"]
    document = command(
        "train", "--supernet", converted, "--data", images, "--out", trained, *still, tmp_path / "c.json"
    )
    assert document["original_top1"] == right
    document = command("finetune", "--model", other, "--data", images, "--out", tuned, *still, tmp_path / "d.json")
    assert document["original_top1"] == right
    for file in (converted, planned, trained / "supernet.safetensors", tuned / "model.safetensors"):
        assert header(file)["label_names"] == known


def renamed(images: Path, out: Path) -> Path:
    shutil.copytree(images, out)
    for split in ("train", "val"):
        (out / split / "class1").rename(out / split / "klasse1")
    return out


def test_other_classes_are_warned_of(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By every command, with the first that differs; a trained file has the names that it was trained on."""
    images, own, converted = (
        renamed(work / "images", tmp_path / "x"),
        work / "model.safetensors",
        work / "converted.safetensors",
    )
    out = tmp_path / "out.safetensors"
    for argv in (
        ["evaluate", "--model", own, "--data", images, "--workers", 0],
        ["evaluate", "--supernet", converted, "--entry", 0, "--data", images, "--workers", 0],
        ["convert", "--checkpoint", own, "--data", images, "--out", out, *LOADING],
        ["plan", "--supernet", converted, "--data", images, "--out", out, "--rounds", 1, *LOADING],
        ["train", "--supernet", converted, "--data", images, "--out", tmp_path / "a", *TRAIN],
        ["finetune", "--model", own, "--data", images, "--out", tmp_path / "b", *TRAIN],
    ):
        assert run(*argv) == 0
        printed = [line for line in capsys.readouterr().err.splitlines() if "other classes" in line]
        assert len(printed) == 1 and printed[0].startswith("warning: "), argv
        assert "label 1 is 'class2' in the data, 'class1' in the model" in printed[0]
    assert header(out)["label_names"] == ["class0", "class1", "class2"]
    for file in (tmp_path / "a" / "supernet.safetensors", tmp_path / "b" / "model.safetensors"):
        assert header(file)["label_names"] == ["class0", "class2", "klasse1"]


@pytest.mark.parametrize("option", [["--num-classes", 2], ["--model-kwargs", '{"num_classes": 2}']])
def test_a_file_gets_a_new_head(work: Path, tmp_path: Path, option: list[Any]) -> None:
    argv = [
        "finetune",
        "--model",
        work / "model.safetensors",
        *option,
        "--data",
        work / "two",
        "--out",
        tmp_path / "out",
    ]
    command(*argv, *TRAIN, tmp_path / "a.json")
    found = header(tmp_path / "out" / "model.safetensors")
    assert found["label_names"] == ["class0", "class1"] and found["model_args"]["num_classes"] == 2


def test_a_supernetwork_gets_a_new_head(work: Path, tmp_path: Path) -> None:
    """The same one when the run is resumed; its blocks and its list stay."""
    out = tmp_path / "out"
    argv = [
        "train",
        "--supernet",
        work / "planned.safetensors",
        "--num-classes",
        2,
        "--data",
        work / "two",
        "--out",
        out,
    ]
    command(*argv, *TRAIN, "--progressive-epochs", 0, tmp_path / "a.json")
    found = skd.load(out / "supernet.safetensors")
    assert found.model.num_classes == 2
    assert found.dropout_list.widths.tolist() == skd.load(work / "planned.safetensors").dropout_list.widths.tolist()
    assert run(*argv, *TRAIN, "--progressive-epochs", 0, "--resume", "auto") == 0


def test_a_checkpoint_gets_a_new_head(work: Path, tmp_path: Path) -> None:
    """The file's own is of three classes, as in --model-kwargs; timm's default is of a thousand."""
    kwargs = json.dumps({key: value for key, value in KWARGS.items() if key != "num_classes"})
    out = tmp_path / "out.safetensors"
    own = [*MODEL, kwargs, "--checkpoint", work / "own.pth", "--num-classes", 2]
    command("convert", *own, "--data", work / "two", "--out", out, *LOADING, tmp_path / "a.json")
    found, before = skd.load(out).model, skd.load(work / "model.safetensors")
    assert found.num_classes == 2 and torch.equal(found.pos_embed, before.pos_embed)
    own = ["--checkpoint", work / "model.safetensors", "--num-classes", 2]
    command("convert", *own, "--data", work / "two", "--out", out, *LOADING, tmp_path / "a.json")
    assert skd.load(out).model.num_classes == 2


def test_a_named_model_gets_its_head_at_once(work: Path, tmp_path: Path) -> None:
    argv = [
        "convert",
        *NAMED[:3],
        json.dumps({**KWARGS, "num_classes": 2}),
        "--num-classes",
        2,
        "--data",
        work / "two",
    ]
    command(*argv, "--out", tmp_path / "out.safetensors", *LOADING, tmp_path / "a.json")
    assert skd.load(tmp_path / "out.safetensors").model.num_classes == 2


def test_a_users_own_checkpoint_is_evaluated(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any conversion: as its file scores, whichever of the two state dicts is asked for."""
    right = top1(work / "model.safetensors", work / "images")
    assert top1(tmp_path / "a", work / "images", *NAMED, "--checkpoint", work / "own.pth") == right
    worse = timm.create_model(MODEL[1], **KWARGS).state_dict()
    own = torch.load(work / "own.pth", weights_only=True)
    torch.save({"model": own, "model_ema": worse, "args": argparse.Namespace()}, tmp_path / "both.pth")
    capsys.readouterr()
    checkpoint = ["--checkpoint", tmp_path / "both.pth"]
    assert top1(tmp_path / "a", work / "images", *NAMED, *checkpoint, "--checkpoint-weights", "model") == right
    assert "the weights are those of 'model' (see --checkpoint-weights)" in capsys.readouterr().out
    top1(tmp_path / "a", work / "images", *NAMED, *checkpoint)
    assert "the weights are those of 'model_ema'" in capsys.readouterr().out


def test_a_checkpoint_of_another_image_size(work: Path, tmp_path: Path) -> None:
    kwargs = json.dumps({**KWARGS, "img_size": 32})
    argv = ["convert", *MODEL, kwargs, "--checkpoint", work / "own.pth", "--data", work / "images", *LOADING]
    command(*argv, "--out", tmp_path / "out.safetensors", tmp_path / "a.json")
    assert tuple(skd.load(tmp_path / "out.safetensors").model.pos_embed.shape) == (1, 17, 24)


def test_a_folder_of_timms(work: Path, tmp_path: Path) -> None:
    save_for_hf(timm.create_model(MODEL[1], **KWARGS), tmp_path / "hub", model_args=KWARGS)
    argv = [
        "convert",
        "--model",
        f"local-dir:{tmp_path / 'hub'}",
        "--pretrained",
        "--data",
        work / "images",
        *LOADING,
    ]
    command(*argv, "--out", tmp_path / "out.safetensors", tmp_path / "a.json")
    assert skd.load(tmp_path / "out.safetensors").model.num_classes == 3


def test_json_says_which_weights_were_taken(work: Path, tmp_path: Path) -> None:
    """By every command that takes a checkpoint, of --checkpoint or of timm's own argument."""
    own = skd.load(work / "model.safetensors").state_dict()
    torch.save({"model": own, "model_ema": own}, tmp_path / "both.pth")
    both, alone = str(tmp_path / "both.pth"), str(work / "own.pth")
    inside = json.dumps({**KWARGS, "checkpoint_path": both})
    data = ["--data", work / "images"]
    kept = ["convert", *data, "--out", tmp_path / "out.safetensors", *LOADING]
    for argv, weights, file, key in (
        (["evaluate", *data, "--workers", 0], [*NAMED, "--checkpoint", both], both, "model_ema"),
        (kept, [*NAMED, "--checkpoint", both, "--checkpoint-weights", "model"], both, "model"),
        (kept, [*NAMED, "--checkpoint", alone], alone, None),
        (kept, ["--model", MODEL[1], "--model-kwargs", inside], both, "model_ema"),
        (["train", *data, "--out", tmp_path / "t", *TRAIN], [*NAMED, "--checkpoint", both], both, "model_ema"),
        (["finetune", *data, "--out", tmp_path / "f", *TRAIN], [*NAMED, "--checkpoint", both], both, "model_ema"),
    ):
        document = command(*argv, *weights, tmp_path / "a.json")
        assert (document["checkpoint"], document["checkpoint_weights"]) == (file, key)
    assert "checkpoint" not in command(*kept, "--checkpoint", work / "model.safetensors", tmp_path / "a.json")


def test_random_weights_are_warned_of_and_no_others(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = ["--model", MODEL[1], "--model-kwargs", json.dumps({**KWARGS, "checkpoint_path": str(work / "own.pth")})]
    for model, random in ((NAMED, True), (loaded, False), ([*NAMED, "--checkpoint", work / "own.pth"], False)):
        for argv in (
            ["convert", *model, "--data", work / "images", "--out", tmp_path / "out.safetensors", *LOADING],
            ["evaluate", *model, "--data", work / "images", "--workers", 0],
        ):
            assert run(*argv) == 0
            assert ("are random" in capsys.readouterr().err) == random, argv


def test_budgets_in_the_linear_convention(work: Path, tmp_path: Path) -> None:
    """As `skd extract` chooses them."""
    planned = skd.load(work / "planned.safetensors")
    chosen = {
        name: [choose_entry(planned, macs=share, convention=name) for share in (0.9, 0.7, 0.5)]
        for name in ("full", "linear")
    }
    assert chosen["full"] != chosen["linear"]
    for name, entries in chosen.items():
        argv = ["evaluate", "--supernet", work / "planned.safetensors", "--data", work / "images", "--workers", 0]
        argv += ["--convention", name]
        curve = command(*argv, "--budgets", 0.9, 0.7, 0.5, tmp_path / "a.json")["curve"]
        assert [row["entry"] for row in curve] == entries
        assert command(*argv, "--macs", 0.7, tmp_path / "a.json")["entry"] == entries[1]


TINY = "--model vit_tiny_patch16_224 --model-kwargs"
OWN = "--checkpoint WORK/model.safetensors"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert --model resnet18 DATA OUT", "ResNet; it must be a timm VisionTransformer"),
        ("evaluate --model convnext_atto DATA", "ConvNeXt; it must be a timm VisionTransformer"),
        ("finetune --model resnet18 DATA --out TMP/run", "ResNet; it must be a timm VisionTransformer"),
        (f'convert {TINY} \'{{"act_layer": "foo"}}\' DATA OUT', "with act_layer='foo'"),
        (f"convert {TINY} '{{\"pretrained\": true}}' DATA OUT", "--model-kwargs is"),
        (f'convert {TINY} \'{{"device": "meta"}}\' DATA OUT', "on the device meta"),
        (f'convert {TINY} \'{{"img_size": 8, "depth": 1}}\' DATA OUT', "such a model takes no image"),
        (f'convert {TINY} \'{{"checkpoint_path": "no.pth"}}\' DATA OUT', "checkpoint_path is 'no.pth'"),
        (f"convert {OWN} DATA OUT --device mps", "--device is 'mps', which cannot be used here"),
        (f"convert {OWN} DATA OUT --device meta", "--device is 'meta', which cannot be used here"),
        (f"convert {OWN} DATA --out TMP/z.pth", "call it .safetensors"),
        ("plan SUPERNET DATA --out TMP/z.PT", "call it .safetensors"),
        ("extract SUPERNET --entry 0 --out TMP/z.bin", "call it .safetensors"),
        ("extract SUPERNET --macs 0.5 OUT", "never planned"),
        ("extract SUPERNET --entry 3 OUT", "0..0, the full network alone: skd plan or skd train"),
        ("evaluate SUPERNET --entry -1 DATA", "0..0, the full network alone: skd plan or skd train"),
        ("evaluate SUPERNET DATA --device ''", "--device is ''"),
        (f"convert {TINY} '{{\"checkpoint_path\": 5}}' DATA OUT", "checkpoint_path is 5; there is no such file"),
        ("convert --checkpoint '' DATA OUT", "--checkpoint is '', which names nothing"),
        ("evaluate SUPERNET DATA --val-split /", "must be the name of one of its sub-folders"),
        ("convert --model WORK/model.safetensors DATA OUT", "a file; here it is a name in timm"),
        ("train --model TMP/no.pth DATA --out TMP/run", "a file (which is not there)"),
        ("evaluate --model WORK/own.pth DATA", "need --model NAME --checkpoint FILE"),
        ("evaluate --model WORK/no.safetensors DATA", "there is no such file"),
        ("evaluate --model WORK/model.safetensors --pretrained DATA", "it has its own architecture and weights"),
        ("evaluate --model WORK/model.safetensors --convention linear DATA", "--convention is given with --model"),
        ("evaluate SUPERNET --pretrained DATA", "the options of --model are not for it"),
        (f"convert {OWN} --model-kwargs '{{\"depth\": 3}}' DATA OUT", "--model-kwargs has depth, but"),
        (f"convert {OWN} --num-classes {2**62} DATA OUT", f"--num-classes is {2**62}; such a head cannot be made"),
        (f"convert {OWN} --checkpoint-weights ema DATA OUT", "--checkpoint-weights is given, but"),
        (f"convert {OWN} --num-classes 0 DATA OUT", "--num-classes is 0; it must be a whole number, at least 1"),
        (
            f"convert {OWN} --num-classes 2 --model-kwargs '{{\"num_classes\": 3}}' DATA OUT",
            "--num-classes is 2, but --model-kwargs has num_classes 3",
        ),
        ("finetune --model WORK/model.safetensors --data WORK/two --out TMP/run", "or --num-classes 2"),
        (f"convert {TINY} TWO --checkpoint WORK/own.pth DATA OUT", "--num-classes N makes a new head"),
        (
            f"convert {TINY} TWO --checkpoint WORK/own.pth --checkpoint-weights ema DATA OUT",
            "it has no state_dict_ema",
        ),
    ],
)
def test_mistakes(work: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what is wrong, exit status 2, and nothing written."""
    for short, full in (
        ("DATA", "--data WORK/images"),
        ("OUT", "--out TMP/out.safetensors"),
        ("SUPERNET", "--supernet WORK/converted.safetensors"),
        ("TWO", shlex.quote(json.dumps({**KWARGS, "num_classes": 2}))),
        ("WORK", str(work)),
        ("TMP", str(tmp_path)),
    ):
        line = line.replace(short, full)
    assert main(shlex.split(line)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_files_own_head_is_evaluated(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its number of classes as an argument asks for no other one, and skd evaluate takes none."""
    file, line = work / "model.safetensors", ["--model-kwargs", json.dumps({"num_classes": 3})]
    assert run("evaluate", "--model", file, *line, "--data", work / "images") == 2
    assert "evaluated with the head that it has" in capsys.readouterr().err
    arguments = parsed(["finetune", "--model", str(file), *line, "--data", "digits", "--out", str(tmp_path)])
    model = skd.load(file)
    before = model.head.weight.clone()
    assert torch.equal(with_new_head(model, arguments).head.weight, before)


def test_what_a_model_is_made_of_is_not_replaced(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hub" / name).write_text("{}")
    (tmp_path / "own.safetensors").write_text("weights")
    given = json.dumps({"checkpoint_path": str(tmp_path / "own.safetensors")})
    for line, out in (
        (["--model", f"local-dir:{tmp_path}/hub"], tmp_path / "hub" / "model.safetensors"),
        (["--model", "vit_tiny_patch16_224", "--model-kwargs", given], tmp_path / "own.safetensors"),
    ):
        assert run("convert", *line, "--data", work / "images", "--out", out) == 2
        assert "--out" in capsys.readouterr().err and out.read_text() in ("{}", "weights")


def test_a_supernetwork_has_its_own_weights(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--supernet", work / "none.safetensors", "--checkpoint", "x.pth", "--out", tmp_path / "run"]
    assert run("train", *line, "--data", work / "images") == 2
    assert "--supernet is given, a file with its own weights" in capsys.readouterr().err


def test_a_run_goes_on_with_the_model_that_it_converted_alone(work: Path, tmp_path: Path, capsys: Any) -> None:
    kwargs = {key: value for key, value in KWARGS.items() if key != "num_classes"}
    argv = [
        "train",
        *MODEL,
        json.dumps(kwargs),
        "--num-classes",
        2,
        "--data",
        work / "two",
        "--out",
        tmp_path / "out",
    ]
    assert run(*argv, *TRAIN) == 0
    capsys.readouterr()
    for more in (["--num-classes", 3], ["--model-kwargs", json.dumps({**kwargs, "depth": 1})]):
        assert run(*argv, *more, *TRAIN, "--resume", "auto") == 2
        assert f"resume: {more[0]} is " in capsys.readouterr().err
    assert run(*argv, *TRAIN, "--resume", "auto") == 0
