"""The demo, shortened: the contract of its files, and that the same seed gives the same numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import skd
from skd.data import MEAN, PREPROCESSING, STD, Split, batched, digits, shifted
from skd.demo import running as demo
from skd.demo.baselines import METHODS
from skd.support.outputs import replacing, write_json

ROW = {"entry", "macs", "macs_fraction", "macs_linear", "params", "top1"}


def some_digits() -> tuple[Split, Split]:
    """The first 512 of the training images and 150 of the others."""
    return tuple(Split(s.images[:n], s.labels[:n]) for s, n in zip(digits(), (512, 150), strict=True))


def short_demo(out: Path, seed: int = 0) -> tuple[dict[str, Any], str]:
    """Fewer images and budgets, one epoch; the summary and what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "digits", some_digits)
        patch.setattr(demo, "CALIBRATION_IMAGES", 128)
        patch.setattr(demo, "RANDOM_DRAWS", 1)
        patch.setattr(demo, "BUDGETS", (1.0, 0.75, 0.5, 0.25))
        console = Console(file=io.StringIO(), width=100)
        summary = demo.run_demo(out, seed=seed, epochs=1, train_epochs=2, console=console)
    return summary, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One finished demo in a folder that held other things."""
    out = tmp_path_factory.mktemp("demo")
    (out / "mine.txt").write_text("keep")
    (out / "curve.png").write_text("old")
    return (out, *short_demo(out))


def test_files(finished: Any) -> None:
    out, summary, _ = finished
    assert {path.name for path in out.iterdir()} == {*demo.FILES, "mine.txt"}
    assert (out / "mine.txt").read_text() == "keep"
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "summary.json").read_text()) == summary
    assert len(summary["files"]) == len(list(out.glob("sub-*.safetensors"))) >= 3


def test_summary(finished: Any) -> None:
    _, summary, _ = finished
    assert summary["function_error"] < 1e-5 and summary["function_error_fp64"] < 1e-12
    full, rows = summary["full"], summary["subnetworks"]
    assert set(full) == ROW - {"entry"} and full["macs_fraction"] == 1
    assert full["macs_linear"] < full["macs"]
    assert len(rows) >= 3 and rows[0] == {"entry": 0, **full}
    for row in rows:
        assert set(row) == ROW and 0 <= row["top1"] <= 100
        assert row["macs_fraction"] == pytest.approx(row["macs"] / full["macs"])
    for key in ("macs", "macs_linear", "params"):
        sizes = [row[key] for row in rows]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for name in ("converted", "original_order"):
        assert [row["entry"] for row in summary[name]] == [row["entry"] for row in rows]
        assert [row["macs"] for row in summary[name]] == [row["macs"] for row in rows]
    assert summary["converted"][0]["top1"] == pytest.approx(summary["stand_in_top1"])
    assert [row["epoch"] for row in summary["training"]] == [0, 1]
    assert set(summary["knowledge_concentration"]) == set(METHODS)
    assert all(list(row) == ["0.75", "0.5", "0.25"] for row in summary["knowledge_concentration"].values())
    assert summary["seconds"]["total"] > 0 and summary["seed"] == 0 and "torch" in summary["versions"]


def test_printed_tables(finished: Any) -> None:
    _, summary, printed = finished
    smallest = summary["subnetworks"][-1]
    for text in (
        "WPAC",
        "Hessian",
        "MACs (full)",
        "MACs (linear)",
        f"{smallest['params']:,}",
        "supernet.safetensors",
    ):
        assert text in printed


def test_files_load_and_agree(finished: Any) -> None:
    """Each file of a sub-network computes what the super-network's entry computes, and scores as reported."""
    out, summary, _ = finished
    supernet = skd.load(out / "supernet.safetensors")
    assert len(supernet.dropout_list) == summary["dropout_list_entries"]
    _, test = some_digits()
    tops = {row["entry"]: row["top1"] for row in summary["subnetworks"]}
    for name, entry in summary["files"].items():
        plain = skd.load(out / name)
        with torch.no_grad():
            torch.testing.assert_close(plain(test.images), supernet(test.images, entry=entry), atol=1e-4, rtol=1e-4)
        assert skd.evaluate(plain, batched(test)) == pytest.approx(tops[entry], abs=0.5)
        assert skd.cost(plain) == skd.cost(supernet, entry=entry)
        assert plain.pretrained_cfg["label_names"] == PREPROCESSING["label_names"]
        assert tuple(plain.pretrained_cfg["mean"]) == (MEAN,) and tuple(plain.pretrained_cfg["std"]) == (STD,)
        assert tuple(plain.pretrained_cfg["input_size"]) == (1, 8, 8)


@pytest.mark.slow
def test_same_seed_same_summary(finished: Any, tmp_path: Path) -> None:
    """Whatever state the caller's random numbers are in; and that state stays as it was."""
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again, _ = short_demo(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), state)
    first = dict(finished[1])
    assert first.pop("seconds").keys() == again.pop("seconds").keys()
    assert again == first
    for name in demo.FILES:
        if name.endswith(".safetensors"):
            assert (finished[0] / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


def test_digits_are_split_and_normalised() -> None:
    train, test = digits()
    assert train.images.shape == (1347, 1, 8, 8) and test.images.shape == (450, 1, 8, 8)
    pixels = torch.cat([train.images, test.images])
    assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3
    assert len(pixels.flatten(1).unique(dim=0)) == 1797, "an image is in both parts"
    share = train.labels.bincount() / torch.cat([train.labels, test.labels]).bincount()
    assert (share - 1347 / 1797).abs().max() < 0.01
    assert torch.equal(digits()[1].images, test.images), "the split changes"


def test_batches() -> None:
    split = Split(torch.rand(10, 1, 8, 8), torch.arange(10))
    parts = batched(split, 4)
    assert [len(labels) for _, labels in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in parts]), split.images)
    with pytest.raises(ValueError, match="size is 0"):
        batched(split, 0)


def test_shifts_move_by_at_most_a_pixel() -> None:
    """A single bright pixel lands on each of the nine places; what comes in is the background."""
    image = torch.full((1, 1, 8, 8), -MEAN / STD)
    image[0, 0, 3, 4] = 1.0
    moved = shifted(image.expand(500, 1, 8, 8), torch.Generator().manual_seed(0))
    assert ((moved == 1.0).sum((1, 2, 3)) == 1).all()
    places = {tuple(place) for place in (moved[:, 0] == 1.0).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    assert moved.unique().numel() == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
