"""Checkpoints that are damaged, missing, or of another run."""

import json
import math
import os
import shutil
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import (
    Hooked,
    assert_same_outcome,
    checkpoint_files,
    digit_data,
    digit_net,
    interrupted,
    leftovers,
    raising,
    raw_bytes,
    run_training,
    training_config,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import skd
from skd import planners
from skd.training import Diverged, checkpoints


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run with the settings of `training_config`."""
    out = tmp_path_factory.mktemp("reference")
    run_training(digit_net(), training_config(), out)
    return out


# Damaged checkpoints


def truncate(path, share):
    os.truncate(path, int(os.path.getsize(path) * share))


def rewrite(path, change):
    """The same tensors under another header."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[checkpoints.KEY])
    save_file(tensors, path, metadata=change(header))


def forget(folder, setting):
    """Leave a setting out of all checkpoints, as in those from before it was one."""

    def change(header):
        header["config"].pop(setting)
        return {checkpoints.KEY: json.dumps(header)}

    for path in checkpoint_files(folder):
        rewrite(path, change)


DAMAGE = {
    "half of it": lambda path: truncate(path, 0.5),
    "one byte short": lambda path: os.truncate(path, os.path.getsize(path) - 1),
    "a longer tail": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8),
    "nothing": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(os.path.getsize(path))),
    "garbage": lambda path: path.write_bytes(b"\x93garbage" * 1000),
    "garbage header": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 99 + path.read_bytes()[107:]),
    "no header": lambda path: rewrite(path, lambda header: None),
    "header of something else": lambda path: rewrite(path, lambda header: {"skd": "{}"}),
    "header that is no JSON": lambda path: rewrite(path, lambda header: {checkpoints.KEY: "{'epoch': 1}"}),
    "header that is a list": lambda path: rewrite(path, lambda header: {checkpoints.KEY: "[]"}),
    "newer format": lambda path: rewrite(path, lambda header: {checkpoints.KEY: json.dumps(header | {"format": 99})}),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended after 7 steps; not to be changed."""
    out = tmp_path_factory.mktemp("stopped")
    interrupted(out)
    return out


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "half"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(half, reference, kind):
    """With a warning that names it; the one before is used, and the run ends the same."""
    older, newest = checkpoint_files(half)
    DAMAGE[kind](newest)
    with pytest.warns(UserWarning, match=newest.name) as caught:
        run_training(digit_net(), training_config(), half, resume="auto")
    assert not any(older.name in str(warning.message) for warning in caught)
    assert_same_outcome(half, reference)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    """It is newer than what the resumed run writes at first, of which it must not be taken for the last to keep."""
    interrupted(tmp_path, checkpoint_hist=1)
    truncate(checkpoint_files(tmp_path)[0], 0.5)

    loader = raising(digit_data()[0], 5, ConnectionError())
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ConnectionError):
        run_training(digit_net(), training_config(checkpoint_hist=1), tmp_path, resume="auto", train_loader=loader)
    _, header = checkpoints.newest(tmp_path / "checkpoints")
    assert header["step"] == 4


def test_a_damaged_checkpoint_is_not_called_good(half):
    """Where the run fails before it has written another."""
    older, newest = checkpoint_files(half)
    truncate(newest, 0.5)
    config = training_config(checkpoint_steps=0)
    spoilt = [(images * math.nan, labels) for images, labels in digit_data()[0]]
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(Diverged) as error:
        run_training(digit_net(), config, half, resume="auto", train_loader=spoilt)
    assert str(error.value).endswith(f"the last good checkpoint is {older}")


def test_with_all_checkpoints_damaged_the_run_starts_again(half, reference):
    for path in checkpoint_files(half):
        truncate(path, 0.9)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        run_training(digit_net(), training_config(), half, resume="auto")
    assert len([warning for warning in caught if "is damaged" in str(warning.message)]) == 2
    assert_same_outcome(half, reference)


def test_other_files_among_the_checkpoints(half, reference):
    """Notes of a user stay; a temporary file that a kill has left goes."""
    folder = half / "checkpoints"
    (folder / "step-best.safetensors").write_text("notes")
    (folder / ".step-000000008.4711.safetensors").write_bytes(bytes(100))
    (folder / "notes.txt").write_text("notes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_training(digit_net(), training_config(), half, resume="auto")
    (folder / "step-best.safetensors").unlink()
    assert not leftovers(half), "they would pile up, gigabytes of them"
    assert_same_outcome(half, reference)


def test_resuming_with_nothing_there_is_a_new_run(tmp_path, reference):
    run_training(digit_net(), training_config(), tmp_path / "new", resume="auto")
    assert_same_outcome(tmp_path / "new", reference)


def test_resuming_a_finished_run_computes_nothing(tmp_path, reference):
    net = digit_net()
    run_training(net, training_config(), tmp_path)
    other = digit_net()
    loader = Hooked(digit_data()[0], lambda number: None)
    run_training(other, training_config(), tmp_path, resume="auto", train_loader=loader)
    assert loader.given == 0
    assert raw_bytes(other.state_dict()) == raw_bytes(net.state_dict())
    assert other.dropout_list == net.dropout_list
    assert_same_outcome(tmp_path, reference)


@pytest.mark.parametrize("name", ["history.jsonl", "dropout_list.json", "run.json"])
def test_records_that_a_kill_has_kept_from_being_written(tmp_path, reference, name):
    """Killed after the last checkpoint and before the records: resuming has only them to write."""
    run_training(digit_net(), training_config(), tmp_path)
    (tmp_path / name).unlink()
    run_training(digit_net(), training_config(), tmp_path, resume="auto")
    assert (tmp_path / name).exists()
    assert_same_outcome(tmp_path, reference)


# Resuming another run


# Another good value of each setting.
OTHER = {
    "epochs": 4,
    "batch_size": 32,
    "lr": 1e-3,
    "lr_base": 1e-3,
    "lr_base_size": 256,
    "min_lr": 1e-6,
    "warmup_epochs": 1,
    "warmup_lr": 1e-5,
    "sched_on_updates": True,
    "opt": "sgd",
    "opt_eps": 1e-6,
    "weight_decay": 0.1,
    "decay": "expected",
    "clip_grad": 1.0,
    "grad_accum_steps": 2,
    "amp_dtype": "bfloat16",
    "tf32": True,
    "channels_last": True,
    "grad_checkpointing": True,
    "torchcompile": True,
    "cuda_graph": True,
    "drop_path": 0.2,
    "mixup": 0.5,
    "cutmix": 0.5,
    "mixup_prob": 0.5,
    "mixup_switch_prob": 0.25,
    "smoothing": 0.2,
    "model_ema": False,
    "model_ema_decay": 0.9,
    "model_ema_warmup": False,
    "scale": (0.5, 1.0),
    "ratio": (0.9, 1.1),
    "hflip": 0.0,
    "vflip": 0.5,
    "color_jitter": 0.0,
    "aa": None,
    "train_interpolation": "bilinear",
    "reprob": 0.0,
    "remode": "const",
    "recount": 2,
    "aug_repeats": 1,
    "augment_on": "cpu",
    "target": 0.5,
    "progressive_epochs": 3,
    "planner": "other",
    "planner_options": {"sensitivity": "sqrt"},
    "importance": "online",
    "entry_sampling": "small",
    "refit_start": True,
    "kd_teacher": "original",
    "kd_temperature": 3.0,
    "task_loss_weight": 0.25,
    "log": "tensorboard",
    "calibration_images": 512,
    "convention": "linear",
    "eval_every": 1,
    "budgets": (1.0, 0.5),
    "expected_top1": 50.0,
    "checkpoint_hist": 5,
    "checkpoint_steps": 3,
    "workers": 2,
    "validation_batch_size": 32,
    "bad_images": "fail",
    "log_interval": 7,
    "seed": 1,
}
MAY_DIFFER = {"workers", "log", "log_interval", "checkpoint_hist", "checkpoint_steps", "expected_top1", "cuda_graph"}


@pytest.fixture(autouse=True)
def other_planner():
    """A planner of another name."""
    planners.register("other")(planners.planner("paper"))
    yield
    planners.unregister("other")


def test_all_settings_are_compared():
    """A new setting must get another value here, and be one that may differ or that is refused."""
    assert sorted(OTHER) == sorted(setting.name for setting in fields(skd.TrainConfig))
    unchanged = training_config()
    assert all(getattr(unchanged, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", sorted(OTHER.keys() - MAY_DIFFER))
def test_a_run_with_other_settings_is_not_gone_on_with(stopped, name):
    old = training_config().to_dict()[name]
    config = training_config(**{name: OTHER[name]})
    net = digit_net()
    before = raw_bytes(net.state_dict())
    with warnings.catch_warnings(), pytest.raises(ValueError, match="other settings") as refusal:
        warnings.simplefilter("ignore")  # CUDA graphs are not for a CPU
        run_training(net, config, stopped, resume="auto")
    assert f"{name} is {config.to_dict()[name]}, it was {old}" in str(refusal.value)
    assert raw_bytes(net.state_dict()) == before


def test_settings_that_may_differ(half, reference):
    """They change nothing in what is computed, though the second half has other checkpoints."""
    changes = {name: OTHER[name] for name in MAY_DIFFER - {"checkpoint_hist"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_training(digit_net(), training_config(**changes), half, resume="auto")
    found, expected = ((out / "supernet.safetensors").read_bytes() for out in (half, reference))
    assert found == expected
    names = [path.name for path in checkpoint_files(half)]
    assert names == ["step-000000009.safetensors", "step-000000012.safetensors"]


def test_checkpoints_from_before_planners_had_names(half, reference):
    """Their planner is "paper": a run goes on with it, and with no other."""
    forget(half, "planner")
    with pytest.raises(ValueError, match="planner is None, it was paper"):
        run_training(digit_net(), training_config(planner=None), half, resume="auto")
    run_training(digit_net(), training_config(), half, resume="auto")
    found, expected = ((out / "supernet.safetensors").read_bytes() for out in (half, reference))
    assert found == expected  # the list was complete


def test_checkpoints_from_before_the_device_augmented(half, reference):
    """Their images were augmented in the workers: a run goes on with that, and says so."""
    forget(half, "augment_on")
    with pytest.raises(ValueError, match="augment_on is auto, it was cpu"):
        run_training(digit_net(), training_config(), half, resume="auto")
    run_training(digit_net(), training_config(augment_on="cpu"), half, resume="auto")
    found, expected = ((out / "supernet.safetensors").read_bytes() for out in (half, reference))
    assert found == expected


def test_data_of_another_length(stopped):
    with pytest.raises(ValueError, match="an epoch has 3 steps, it had 4"):
        run_training(digit_net(), training_config(), stopped, resume="auto", train_loader=digit_data()[0][:3])


@pytest.mark.parametrize(
    "other",
    [{"depth": 1}, {"depth": 3}, {"embed_dim": 32}, {"mlp_ratio": 2.0}, {"num_heads": 2}, {"qkv_bias": False}],
)
def test_another_network(stopped, other):
    with pytest.raises(ValueError, match="of another network"):
        run_training(digit_net(**other), training_config(), stopped, resume="auto")


def test_a_folder_with_a_run_is_not_written_over(stopped):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already") as refusal:
        run_training(digit_net(), training_config(), stopped)
    assert str(stopped) in str(refusal.value) and "resume" in str(refusal.value)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
