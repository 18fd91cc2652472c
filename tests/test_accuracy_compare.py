"""benchmarks/accuracy/compare.py on a network of seconds: units are resumed, paired and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import skd
from benchmarks.accuracy import compare, contenders, counting, images, measuring, summary
from benchmarks.accuracy.contenders import CONTENDERS, Contender, Unit
from benchmarks.result import Info

SHORT = ("published", "paper, planned", "loss", "groups of 4, headless")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits only: two blocks, eight steps of pre-training and four of training."""
    digits = replace(images.TASKS["digits"], pretraining=2, epochs=2, steps=2, less_deep=0)
    monkeypatch.setitem(images.TASKS, "digits", digits)
    monkeypatch.setitem(images.SIZES, "small", (32, 2))
    monkeypatch.setattr(measuring, "SHARES", (1.0, 0.5, 0.25))
    monkeypatch.setattr(measuring, "PLANNING", 128)
    for name in SHORT:
        plan = {**CONTENDERS[name].plan, "rounds": 2}
        monkeypatch.setitem(CONTENDERS, name, replace(CONTENDERS[name], plan=plan))
    whole = images.load("digits", None)
    few = images.Images(*(images.Split(*(part[:150] for part in split)) for split in whole))
    monkeypatch.setattr(compare, "load", lambda *_: few)
    monkeypatch.setitem(
        compare.PLANS, "ablation", lambda: (Unit("digits", "small", s, n) for s in range(2) for n in SHORT)
    )


def run(out: Path, *more: str) -> dict[str, Any]:
    arguments = ["--data", ".", "--out", str(out), "--plan", "ablation", "--json", str(out / "result.json"), *more]
    assert compare.main(arguments) == 0
    document: dict[str, Any] = json.loads((out / "result.json").read_text())
    return document


@pytest.mark.usefixtures("short")
def test_a_comparison_is_resumed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, "--only", "*/0/*")
    assert [unit["contender"] for unit in first["units"]] == [*SHORT]
    for unit in first["units"]:
        rows = {row["share"]: row for row in unit["rows"]}
        # Without training the full network is as it was.
        assert "train" in unit["seconds"] or rows[1.0]["alone"] == unit["full"]
        assert all(row["macs_fraction"] <= share for share, row in rows.items())
        assert (rows[1.0]["compensated"] is None) == (unit["contender"] == "published")
    capsys.readouterr()
    (other,) = [file for file in (tmp_path / "units").iterdir() if file.name == "digits-small-0-loss.json"]
    changed = json.loads(other.read_text())
    changed["settings"]["contender"]["training"] = {"planner": "paper"}
    other.write_text(json.dumps(changed))  # as if the contender had been another one
    both = run(tmp_path)
    measured = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digits/")]
    assert [line.split(" (")[0] for line in measured] == [
        "digits/small/0/loss",
        *(f"digits/small/1/{name}" for name in SHORT),
    ]
    again = [unit for unit in both["units"] if unit["seed"] == 0]
    for before, after in zip(first["units"], again, strict=True):
        assert before["rows"] == after["rows"], "the same network, images and steps"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    both["contenders"]["published"]["convert"] = {}  # as if it had been another one
    (tmp_path / "known.json").write_text(json.dumps(both))
    taken = run(elsewhere, "--known", str(tmp_path / "known.json"), "--hours", "0")
    assert taken["units"] == [unit for unit in both["units"] if unit["contender"] != "published"]
    assert taken["device"] == both["device"] and not (elsewhere / "networks").exists()
    page = tmp_path / "page.md"
    page.write_text(f"{summary.BEGIN}\nold\n{summary.END}\n")
    shown = ["--table", str(tmp_path / "result.json"), "--write", str(page), "--plot", str(tmp_path / "curves.svg")]
    assert compare.main(shown) == 0
    text = page.read_text()
    assert "old" not in text and "| loss, compensated |" in text and (tmp_path / "curves.svg").stat().st_size > 1000


@pytest.mark.usefixtures("short")
def test_no_unit_begins_after_the_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has no finished unit"):
        run(tmp_path, "--hours", "0")
    assert not list((tmp_path / "units").iterdir())


def record(contender: str, seed: int, points: dict[float, float]) -> Info:
    rows = [Info(share=share, alone=top1, compensated=None) for share, top1 in points.items()]
    times = Info(convert=1.0, train=2.0)
    return Info(
        task="fashion", size="small", seed=seed, contender=contender, full=90.0, rows=rows, seconds=times,
        forwards=times, entries=9,
    )  # fmt: skip


def test_differences_are_of_the_same_seeds() -> None:
    units = [record("published", seed, {1.0: 80.0 + seed, 0.1: 60.0 + 10 * seed}) for seed in (0, 1)]
    units += [record("loss", seed, {1.0: 81.0 + seed, 0.1: 63.0 + 12 * seed}) for seed in (0, 1, 2)]
    (group,) = summary.groups(Info(units=units, contenders={}))
    assert summary.differences(group)[-1] == "| loss | 2 | +1.00 ± 0.00 | +4.00 ± 1.00 | +2.50 ± 0.50 |"
    assert summary.accuracies(group)[-1].startswith("| loss | 3 | 82.00 ± 0.58 | 75.00 ± 6.93 |")


def test_an_option_is_compared_with_what_it_changes() -> None:
    names = ("paper", "loss", "groups of 4", "groups of 4, sandwich", "published")
    units = [record(name, 0, {1.0: 80.0 + 3 * index, 0.1: 60.0}) for index, name in enumerate(names)]
    units[1]["rows"][0]["compensated"] = 90.0  # type: ignore[index,call-overload]
    (group,) = summary.groups(Info(units=units, contenders={}))
    found = [row.split(" | ")[:3] for row in summary.differences(group, contenders.without_option)[2:]]
    assert found == [
        ["| loss", "1", "+3.00"],
        ["| loss, compensated", "1", "+10.00"],
        ["| groups of 4", "1", "+3.00"],
        ["| groups of 4, sandwich", "1", "+3.00"],
    ]
    others = {contenders.without_option(name) for name in CONTENDERS} - {None}
    assert others <= set(CONTENDERS)
    assert contenders.without_option("loss, balanced, planned") == "loss, planned"


def test_a_budget_that_one_contender_misses_is_in_no_area() -> None:
    units = [record("published", 0, {1.0: 80.0, 0.5: 70.0}), record("loss", 0, {1.0: 80.0, 0.5: 70.0, 0.1: 0.0})]
    (group,) = summary.groups(Info(units=units, contenders={}))
    assert group.shares == [1.0, 0.5] and group.all_shares() == [1.0, 0.5, 0.1]
    assert summary.differences(group)[-1] == "| loss | 1 | +0.00 | +0.00 |  | +0.00 |"


def test_the_area_is_over_the_logarithm() -> None:
    curve = {1.0: 90.0, 0.1: 60.0, 0.01: 0.0}
    assert summary.area(curve, [1.0, 0.1, 0.01]) == pytest.approx((75 + 30) / 2)
    assert summary.area(curve, [1.0, 0.01]) == pytest.approx(45)


def test_forward_passes_are_counted_by_macs() -> None:
    model = images.build(images.TASKS["digits"], "small")
    supernet = skd.SuperNet(model)
    full = supernet.widths()
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [full, [width // 2 for width in full]])
    share = supernet.dropout_list.macs[1] / supernet.dropout_list.macs[0]
    x = torch.zeros(3, 1, 8, 8)
    with counting.counted() as count:
        supernet(x, entry=1).sum().backward()
        with torch.no_grad():
            model(x)
        assert count.forwards == pytest.approx(3 * 3 * share + 3)
        with torch.no_grad():
            stream, shared = supernet.embed(x)
            for index, width in enumerate(full):
                stream = supernet.step(index, stream, width, shared=shared)
    assert count.forwards == pytest.approx(3 * 3 * share + 6, rel=0.05)  # embeddings and norms are left out
    supernet(x)
    assert count.forwards == pytest.approx(3 * 3 * share + 6, rel=0.05)


def test_training_images_are_a_function_of_seed_and_epoch() -> None:
    split = images.Split(torch.randn(200, 1, 8, 8), torch.arange(200))
    loader = images.TrainingImages(split, images.TASKS["fashion"], 3, 5)
    loader.set_epoch(1)
    first = list(loader)
    loader.set_epoch(1, start_batch=2)
    (last,) = loader
    assert torch.equal(last[0], first[2][0]) and torch.equal(last[1], first[2][1])
    loader.set_epoch(2)
    assert not torch.equal(next(iter(loader))[1], first[0][1])
    with pytest.raises(ValueError, match="200 images have 3 batches"):
        images.TrainingImages(split, images.TASKS["fashion"], 4, 5)


def test_the_harder_images_belong_to_their_numbers() -> None:
    """No change in the middle of the ranges but for the rectangle, which has the size and the grey it should."""
    picture = torch.rand(2, 1, 28, 28)
    drawn = np.array([[2 / 3, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.25], [0.0, 0.9, 0.1, 1.0, 1.0, 0.0, 0.0, 1.0]])
    both = images.harder(picture, drawn)
    torch.testing.assert_close(images.harder(picture[1:], drawn[1:])[0], both[1])
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[12:16, 12:16] = True
    covered = (both[0, 0] == 0.25) & inside
    changed = ((both[0] - picture[0]).abs() > 1e-4)[0]
    assert int(changed.sum()) <= 36 and bool(covered[13:15, 13:15].all())
    assert (both[1, 0, :6, :6] == 1).all() and (both[1, 0, -2:, :2] == 0).all()


def test_every_planned_unit_is_of_a_contender() -> None:
    for plan in contenders.PLANS.values():
        units = list(plan())
        assert len(set(units)) == len(units) and {unit.contender for unit in units} <= set(CONTENDERS)
        assert {unit.task for unit in units} <= set(images.TASKS)
        assert len({compare.file_of(u, Path()) for u in units}) == len(units)
    parts = [compare.part_of(list(contenders.ablation()), f"{i}/2") for i in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(contenders.ablation())
    assert not {unit.network for unit in parts[0]} & {unit.network for unit in parts[1]}
    with pytest.raises(TypeError):
        Contender(epochs=3)  # type: ignore[call-arg]


def test_what_is_stored_is_recognised_after_a_field_was_added() -> None:
    """By fields that differ from their defaults, alone."""
    assert images.described(Contender()) == {} == images.described(CONTENDERS["paper, planned"])
    assert images.described(CONTENDERS["loss"]) == {"training": {"planner": "loss"}}
    assert images.described(CONTENDERS["paper"]) == {"training": {"planner": "paper"}}
    task = images.described(images.TASKS["harder"])
    assert task["epochs"] == 12 and "spread" not in task
