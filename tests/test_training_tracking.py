"""What `--log tensorboard` writes, read back by TensorBoard's own reader: every epoch once, also in a resumed run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, Hooked, checkpoint_files, digit_data, digit_net, digit_vit, run_training, training_config

import skd
from skd import cli
from skd.training import Stopped, tracking
from skd.training.run import make_run
from skd.training.screen import Screen

CONFIG = training_config(log="tensorboard", eval_every=2)


def written(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}}, as TensorBoard shows it; a step that it would show twice is an error."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    for name, points in found.items():
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), (name, steps)
    return {name: {point.step: point.value for point in points} for name, points in found.items()}


def expected(history: skd.History) -> dict[str, dict[int, float]]:
    """The same from the history."""
    found: dict[str, dict[int, float]] = {"top1/original": {0: history.original_top1 or 0.0}}
    for row in history.epochs:
        values = {"loss": row.loss, "lr": row.lr, "list/entries": row.entries, "list/smallest": row.macs_fraction}
        values |= {f"top1/{point['budget']:.4f}": point["top1"] for point in row.curve or []}
        values |= {} if row.area is None else {"area": row.area}
        for name, value in values.items():
            found.setdefault(name, {})[row.epoch + 1] = pytest.approx(value, rel=1e-6)
    return found


def test_every_epoch_and_the_curve_are_there(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    history = run_training(digit_net(), CONFIG, tmp_path)
    found = written(tmp_path)
    assert found == expected(history)
    assert list(found["loss"]) == [1, 2, 3]
    assert list(found["top1/1.0000"]) == list(found["area"]) == [2, 3]
    assert {"top1/0.5000", "top1/0.2500"} <= found.keys()


@pytest.mark.parametrize("kept", [9, 2], ids=["from the last checkpoint", "from the end of the first epoch"])
def test_a_resumed_run_doubles_no_step(tmp_path: Path, kept: int) -> None:
    """Also where later checkpoints are gone, and an epoch that was written is trained once more."""
    pytest.importorskip("tensorboard")
    train = Hooked(digit_data()[0], lambda given: signal.raise_signal(signal.SIGTERM) if given == 9 else None)
    with pytest.raises(Stopped):
        run_training(digit_net(), CONFIG.changed(checkpoint_hist=9), tmp_path, train_loader=train)
    for path in checkpoint_files(tmp_path)[kept:]:
        path.unlink()
    history = run_training(digit_net(), CONFIG.changed(checkpoint_hist=9), tmp_path, resume="auto")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert written(tmp_path) == expected(history)


def test_a_run_that_is_tracked_later_has_its_first_epochs_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train = Hooked(digit_data()[0], lambda given: signal.raise_signal(signal.SIGTERM) if given == 9 else None)
    with pytest.raises(Stopped):
        run_training(digit_net(), CONFIG.changed(log=None), tmp_path, train_loader=train)
    assert not (tmp_path / "tensorboard").exists()
    history = run_training(digit_net(), CONFIG, tmp_path, resume="auto")
    assert written(tmp_path) == expected(history)


def test_a_fine_tuned_model_has_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = skd.finetune_config(epochs=1, batch_size=16, workers=0, log="tensorboard")
    history = skd.finetune(digit_vit(), *digit_data()[:2], config, out=tmp_path, console=QUIET)
    assert written(tmp_path) == expected(history)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(digit_net(), *digit_data()[:2], CONFIG, digit_data()[2], screen=Screen(QUIET), folder=tmp_path)
    monkeypatch.setattr(type(run.state), "rank", rank)
    run.begin_tracking()
    assert (run.tracker is None) == (rank > 0) and (tmp_path / "tensorboard").exists() == (rank == 0)


def test_without_a_folder_there_is_nothing_to_write_to() -> None:
    with pytest.raises(ValueError, match="log is 'tensorboard', but there is no `out`"):
        run_training(digit_net(), CONFIG)


def test_where_it_is_missing_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work: the files that the command would read are not even there."""
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    calls: Any = {
        "Python": lambda: run_training(digit_net(), CONFIG, tmp_path / "run"),
        "finetune": lambda: skd.finetune(digit_vit(), [], None, skd.finetune_config(log="tensorboard"), out=tmp_path),
    }
    for call in calls.values():
        with pytest.raises(ImportError, match=r"pip install 'skd\[tensorboard\]'"):
            call()
    words = f"train --supernet none.safetensors --data digits --out {tmp_path}/run --log tensorboard"
    assert cli.main(words.split()) == 1
    assert "pip install 'skd[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
