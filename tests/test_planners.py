"""Planners by name: one file each, used by `skd.plan`, by training and by the command line."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_outcome, digit_data, digit_net, interrupted, run_training, training_config

import skd
from skd import planners
from skd.cli import main
from skd.planning import propose
from skd.training.report import write_report


def halving(supernet: Any, batches: Any, target: float, *, current: Any, convention: str, group: Any) -> Any:
    """Halves the widest MLP, once per round."""
    column = max(range(len(current.modules)), key=lambda i: (current.modules[i][-3:] == "mlp", current.widths[-1][i]))
    row = current.widths[-1].copy()
    row[column] //= 2
    return skd.DropoutList(current.modules, [*current.widths, row], costs=current.costs)


@pytest.fixture
def toy() -> Iterator[str]:
    """The name under which `halving` is registered for one test."""
    assert planners.register("toy")(halving) is halving
    yield "toy"
    planners.unregister("toy")
    assert "toy" not in planners.names()


@contextmanager
def registered(name: str, planner: Any) -> Iterator[None]:
    planners.register(name)(planner)
    try:
        yield
    finally:
        planners.unregister(name)


def halved(times: int) -> np.ndarray:
    """`halving`'s list for `digit_net`: two MLPs of 24 neurons behind attentions of 16."""
    return np.array([[16, 24, 16, 24], [16, 12, 16, 24], [16, 12, 16, 12], [16, 6, 16, 12]][: times + 1])


def contributed() -> str:
    """The planner that CONTRIBUTING.md shows."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    return textwrap.dedent(re.search(r"<!-- snippet: planner -->\n *```python\n(.*?)```", text, re.DOTALL).group(1))


# The registry


def test_a_registered_planner_is_found_by_its_name(toy: str) -> None:
    assert planners.names() == ["loss", "paper", "toy"] and planners.planner(toy) is halving
    with pytest.raises(ValueError, match="planner 'paper' is there already"):
        planners.register("paper")(halving)
    assert planners.planner("paper") is not halving


def test_an_unknown_name_is_answered_with_those_there_are(toy: str) -> None:
    for call in (planners.planner, lambda name: skd.plan(digit_net(), digit_data()[2], planner=name)):
        with pytest.raises(ValueError, match=r"^planner is 'papre'; it must be one of \['loss', 'paper', 'toy'\]$"):
            call("papre")
    with pytest.raises(ValueError, match=r"^planner is 'papre'"):
        training_config(planner="papre")


def test_a_file_in_the_package_is_all_that_a_planner_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one in CONTRIBUTING.md: `skd.plan`, settings and commands know it, and nothing else was touched."""
    (tmp_path / "even.py").write_text(contributed())
    monkeypatch.setattr(planners, "__path__", [*planners.__path__, str(tmp_path)])
    try:
        assert planners.names() == ["even", "loss", "paper"]
        assert training_config(planner="even").planner == "even"
        planned = skd.plan(digit_net(), digit_data()[2], target=0.8, rounds=4, planner="even", steps=8)
        assert np.array_equal(planned.widths[-1] * 8 // planned.widths[0], [1] * 4)
        removed = 1 - planned.macs / planned.macs[0]
        assert len(planned) == 5 and (removed[1:] <= 0.8 * np.arange(1, 5) / 4).all()
        for command in ("plan", "train"):
            with pytest.raises(SystemExit):
                main([command, "--help"])
            assert "--planner {even,loss,paper}" in capsys.readouterr().out
    finally:
        planners.unregister("even")


# skd.plan


def test_the_paper_planner_is_importance_ranked_and_extended() -> None:
    """METHOD 2, steps 1 to 4, one after the other, by what is public of them."""
    net, batches = digit_net(), digit_data()[2]
    grown, total = net.dropout_list, skd.cost(net, convention="linear").macs
    for step in (1, 2, 3):
        proposal = propose(net, batches, grown, convention="linear")
        grown = grown.extended(proposal.operations, 0.7 * total * step / 3)
    for planner in ("paper", planners.planner("paper")):
        planned = skd.plan(net, batches, target=0.7, rounds=3, convention="linear", planner=planner)
        assert planned == grown and planned.removed_macs == grown.removed_macs and len(grown) > 4
        assert planned.to_json() == grown.to_json()
        assert planned.sensitivity == proposal.sensitivity


def test_plan_calls_a_function_once_per_round() -> None:
    calls = []

    def spying(supernet: Any, batches: Any, target: float, *, label: str = "", **given: Any) -> Any:
        calls.append((supernet, len(list(batches)), len(list(batches)), target, len(given["current"]), label))
        assert given["convention"] == "linear" and given["group"] is None
        return halving(supernet, batches, target, **given)

    net = digit_net()
    batches = iter(list(digit_data()[2]))
    planned = skd.plan(net, batches, target=0.6, rounds=3, convention="linear", planner=spying, label="first")
    assert np.array_equal(planned.widths, halved(3))
    total = skd.cost(net, convention="linear").macs
    assert calls == [(net, 2, 2, pytest.approx(0.6 * total * n / 3), n, "first") for n in (1, 2, 3)]


def test_options_that_a_planner_does_not_have_are_refused_in_one_line() -> None:
    for option in ({"label": "0.attn"}, {"round": 3}, {"current": None}):
        name = next(iter(option))
        with pytest.raises(ValueError, match=rf"^planner 'loss' cannot be called .*argument '{name}'$"):
            skd.plan(digit_net(), digit_data()[2], **option)
    with pytest.raises(ValueError, match="planner 3 cannot be called"):
        skd.plan(digit_net(), digit_data()[2], planner=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda current: current.widths, "returned a ndarray; it must be a DropoutList"),
        (lambda current: skd.DropoutList(current.modules, [[8, 8, 8, 8]]), "returned a list that does not begin"),
        (lambda current: skd.DropoutList("abcd", current.widths), "returned a list that does not begin"),
    ],
)
def test_answers_that_do_not_grow_the_list_are_refused(answer: Callable[[Any], Any], match: str) -> None:
    def wrong(supernet: Any, batches: Any, target: float, *, current: Any, convention: str, group: Any) -> Any:
        return answer(current)

    with pytest.raises(ValueError, match=rf"^planner wrong {match}"):
        skd.plan(digit_net(), digit_data()[2], planner=wrong)


# Training


def test_training_grows_the_list_by_the_planner_it_is_told(toy: str, tmp_path: Path) -> None:
    """An empty sensitivity says that the list grew, by a planner that does not measure it."""
    net, config = digit_net(), training_config(planner=toy)
    history = run_training(net, config, tmp_path)
    assert np.array_equal(net.dropout_list.widths, halved(2))
    assert [row["entries"] for row in history.epochs] == [2, 3, 3]
    assert [row["sensitivity"] for row in history.epochs] == [{}, {}, None]
    text = write_report(tmp_path, history, net, config).read_text()
    assert "In the shaded epochs" in text and "Importance of the modules" not in text


@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_run_has_the_same_list(toy: str, tmp_path: Path, at: int) -> None:
    config = training_config(planner=toy)
    run_training(digit_net(), config, tmp_path / "whole")
    interrupted(tmp_path / "stopped", at, planner=toy)
    net = digit_net()
    run_training(net, config, tmp_path / "stopped", resume="auto")
    assert_same_outcome(tmp_path / "stopped", tmp_path / "whole")
    assert np.array_equal(net.dropout_list.widths, halved(2))


def test_in_training_too_a_planner_may_read_the_images_twice() -> None:
    read = []

    def reading(supernet: Any, batches: Any, target: float, **given: Any) -> Any:
        read.append([[images.sum().item() for images, _ in batches] for _ in range(2)])
        return halving(supernet, batches, target, **given)

    with registered("reading", reading):
        run_training(digit_net(), training_config(planner="reading"))
    expected = [images.sum().item() for images, _ in digit_data()[2]]
    assert read == [[expected, expected]] * 2


def test_the_targets_of_training_are_those_of_plan() -> None:
    targets: dict[str, list[float]] = {"plan": [], "train": []}
    for where, noted in targets.items():

        def noting(supernet: Any, batches: Any, target: float, *, noted: Any = noted, **given: Any) -> Any:
            noted.append(target)
            return halving(supernet, batches, target, **given)

        with registered(where, noting):
            if where == "plan":
                skd.plan(digit_net(), digit_data()[2], target=0.6, rounds=2, planner="plan")
            else:
                run_training(digit_net(), training_config(planner="train", target=0.6))
    assert targets["train"] == targets["plan"] and len(targets["plan"]) == 2


def test_online_importance_is_the_paper_planners_alone(toy: str) -> None:
    assert skd.TrainConfig(importance="online").chosen_planner == "paper"
    assert skd.TrainConfig().chosen_planner == "loss"
    with pytest.raises(
        ValueError, match=r"^importance is 'online', which only the planner 'paper' has; planner is 'toy'"
    ):
        training_config(planner=toy, importance="online")


# The command line


def test_the_plan_command_passes_the_name_on(tmp_path: Path, toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("converted.safetensors", "planned.safetensors")]
    skd.save(digit_net(), files[0])
    argv = ["plan", "--supernet", files[0], "--out", files[1], "--data", "digits", "--workers", "0", "--rounds", "2"]
    assert main([*argv, "--planner", "toy", "--device", "cpu"]) == 0, capsys.readouterr().err
    assert np.array_equal(skd.load(files[1]).dropout_list.widths, halved(2))
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--planner", "papre"])
    assert stop.value.code == 2
    assert "invalid choice: 'papre'" in capsys.readouterr().err


def test_the_train_command_passes_the_name_on(tmp_path: Path, toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    skd.save(digit_net(), tmp_path / "converted.safetensors")
    argv = ["train", "--supernet", str(tmp_path / "converted.safetensors"), "--data", "digits", "--workers", "0"]
    argv += ["--epochs", "2", "--progressive-epochs", "1", "--batch-size", "256", "--aug-repeats", "1"]
    assert main([*argv, "--out", str(tmp_path / "run"), "--planner", "toy", "--device", "cpu"]) == 0
    listed = skd.load(tmp_path / "run" / "supernet.safetensors").dropout_list
    assert np.array_equal(listed.widths, halved(1)), capsys.readouterr()


def test_the_plan_command_says_whether_corrections_follow(tmp_path: Path) -> None:
    """To a planner with that option: they do if they are asked for, or moments are made or were stored."""
    told = []

    def asking(*arguments: Any, compensated: bool = True, **options: Any) -> Any:
        told.append(compensated)
        return halving(*arguments, **options)

    source, out = str(tmp_path / "converted.safetensors"), str(tmp_path / "planned.safetensors")
    skd.save(digit_net(), source)
    with registered("asking", asking):
        for more in (
            [],
            ["--compensate", "0.95"],
            ["--planner-options", '{"compensated": true}'],
            ["--moments"],
            ["--supernet", out],  # with the moments of the line above
            ["--supernet", out, "--planner-options", '{"compensated": false}'],
        ):
            argv = ["plan", "--supernet", source, "--data", "digits", "--workers", "0", "--calibration-images", "64"]
            argv += [
                "--out",
                out,
                "--rounds",
                "1",
                "--target",
                "0.1",
                "--planner",
                "asking",
                "--device",
                "cpu",
                *more,
            ]
            assert main(argv) == 0
    assert told == [False, True, True, True, True, False]


def test_a_planner_can_be_forgotten() -> None:
    with registered("other", halving):
        assert planners.planner("other") is halving
    for name in ("other", "missing"):
        with pytest.raises(ValueError, match=f"planner {name!r} was not registered"):
            planners.unregister(name)
