"""A run is resumed with the network and the data that it began with, or not at all."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    QUIET,
    Hooked,
    assert_same_outcome,
    checkpoint_files,
    digit_data,
    digit_net,
    digit_vit,
    interrupted,
    perturb,
    raising,
    raw_bytes,
    run_training,
    training_config,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

import skd
from skd.cli import main
from skd.training import Stopped, checkpoints
from skd.training.origin import images_of, weights_hash


class Loader(Hooked):
    """Batches of a source that knows its classes, as skd's loaders have it."""

    def __init__(self, batches: Any, classes: list[str] | None, images: int, error: Any = None) -> None:
        super().__init__(batches, raising(batches, 7, error).hook if error else lambda number: None)
        self.source = type("Source", (), {"classes": classes, "__len__": lambda self: images})()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A run that ended after 7 steps."""
    interrupted(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_weights_are_refused(half: Path) -> None:
    """One element is enough; the network and the run stay as they are."""
    net, written = digit_net(), files(half)
    with torch.no_grad():
        net.model.head.bias[3] += 1e-3
    before = raw_bytes(net.state_dict())
    with pytest.raises(ValueError, match="of another network: the weights given") as refusal:
        run_training(net, training_config(), half, resume="auto")
    assert str(half) in str(refusal.value) and "other data" not in str(refusal.value)
    assert raw_bytes(net.state_dict()) == before and files(half) == written


@pytest.mark.parametrize(("name", "told"), [("val_loader", "validation"), ("calibration", "calibration")])
def test_other_numbers_of_images_are_refused(half: Path, name: str, told: str) -> None:
    batches = digit_data()[1 if name == "val_loader" else 2]
    count = sum(len(images) for images, _ in batches)
    for fewer in (batches[:1], DataLoader(TensorDataset(*batches[0]), 16)):
        with pytest.raises(ValueError, match=f"the {told} images are {len(batches[0][0])}, not {count}") as refusal:
            run_training(digit_net(), training_config(), half, resume="auto", **{name: fewer})
        assert "another network" not in str(refusal.value)


@pytest.mark.parametrize("first", [True, False])
def test_validation_images_for_a_part_of_a_run_are_refused(tmp_path: Path, first: bool) -> None:
    """The best weights so far would be given up, or could not be compared with."""
    test = digit_data()[1]
    with pytest.raises(OSError, match="gone"):
        loader = raising(digit_data()[0], 7, OSError("gone"))
        run_training(
            digit_net(), training_config(), tmp_path, train_loader=loader, val_loader=test if first else None
        )
    with pytest.raises(ValueError, match=f"there were{'' if first else ' no'} validation images"):
        run_training(digit_net(), training_config(), tmp_path, resume="auto", val_loader=None if first else test)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    """As many, with other names or in another order; all that differs is said at once."""
    train, test, _ = digit_data()
    names = [str(digit) for digit in range(10)]
    with pytest.raises(ConnectionError):
        loaders = Loader(train, names, 64, ConnectionError()), Loader(test, names, 64)
        run_training(digit_net(), training_config(), tmp_path, train_loader=loaders[0], val_loader=loaders[1])
    loaders = Loader(train, names[::-1], 64), Loader(test, names[::-1], 65)
    with pytest.raises(ValueError, match="other data") as refusal:
        run_training(
            digit_net(), training_config(), tmp_path, resume="auto", train_loader=loaders[0], val_loader=loaders[1]
        )
    told = "training and validation images have the classes 9, 8, 7, 6, 5 (and 5 more), not the classes 0, 1, 2, 3, 4"
    assert told in str(refusal.value) and "the validation images are 65, not 64" in str(refusal.value)


def test_what_a_loader_does_not_say_is_not_compared_but_learned(half: Path) -> None:
    """The run began with hooked batches, which say nothing, and goes on with a list, which has a number of images."""
    run_training(digit_net(), training_config(), half, resume="auto", val_loader=Loader(digit_data()[1], None, 64))
    with safe_open(checkpoint_files(half)[-1], framework="pt") as file:
        known = json.loads(file.metadata()[checkpoints.KEY])["origin"]["data"]
    assert known == {
        "training": {"classes": None, "images": 64},
        "validation": {"classes": None, "images": 64},
        "calibration": {"classes": None, "images": 32},
    }


def test_checkpoints_that_do_not_say_what_their_run_began_with_go_on(half: Path, tmp_path_factory: Any) -> None:
    """Those of earlier versions."""
    for path in checkpoint_files(half):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[checkpoints.KEY])
        del header["origin"]
        save_file(load_file(path), path, metadata={checkpoints.KEY: json.dumps(header)})
    run_training(digit_net(), training_config(), half, resume="auto")
    whole = tmp_path_factory.mktemp("whole")
    run_training(digit_net(), training_config(), whole)
    found, expected = ((out / "supernet.safetensors").read_bytes() for out in (half, whole))
    assert found == expected


@pytest.mark.parametrize("model_ema", [True, False])
def test_a_network_goes_on_where_it_was_stopped_or_has_ended(tmp_path: Path, model_ema: bool) -> None:
    """In a notebook it is the same object: it has the run's weights, though not those that it began with."""
    settings = training_config(model_ema=model_ema, eval_every=1)
    run_training(digit_net(), settings, tmp_path / "whole")
    net = digit_net()
    with pytest.raises(Stopped):
        loader = Hooked(digit_data()[0], lambda number: signal.raise_signal(signal.SIGTERM) if number == 6 else None)
        run_training(net, settings, tmp_path / "cut", train_loader=loader)
    for _ in range(2):  # stopped, then finished
        run_training(net, settings, tmp_path / "cut", resume="auto")
        assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


def test_another_model_is_not_fine_tuned_further(tmp_path: Path) -> None:
    train, test, _ = digit_data()
    config = skd.finetune_config(epochs=1, batch_size=16)
    skd.finetune(digit_vit(), train, test, config, out=tmp_path, console=QUIET)
    other = digit_vit()
    perturb(other, seed=1)
    with pytest.raises(ValueError, match="of another network"):
        skd.finetune(other, train, test, config, out=tmp_path, resume="auto", console=QUIET)


def test_random_weights_of_the_command_line_follow_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that its run can be resumed; others are refused."""
    kwargs = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1}
    argv = [
        "finetune",
        "--model",
        "vit_tiny_patch16_224",
        "--data",
        "digits",
        "--out",
        str(tmp_path),
        "--epochs",
        "1",
    ]
    argv += ["--workers", "0", "--batch-size", "64", "--aug-repeats", "1", "--aa", "none", "--model-kwargs"]
    assert main([*argv, json.dumps(kwargs | {"num_heads": 1})]) == 0
    assert main([*argv, json.dumps(kwargs | {"num_heads": 1}), "--resume", "auto"]) == 0
    capsys.readouterr()
    assert main([*argv, json.dumps(kwargs | {"num_heads": 1, "qkv_bias": False}), "--resume", "auto"]) == 2
    assert "of another network" in capsys.readouterr().err


def test_the_hash_sees_names_types_shapes_and_bytes() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(())}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(())},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(())},
        {"a": -torch.zeros(2, 3), "b": torch.ones(())},
        {"c": torch.zeros(2, 3), "b": torch.ones(())},
        {"a": torch.zeros(2, 3)},
    ]
    hashes = {weights_hash(each) for each in [state, *others]}
    assert len(hashes) == 6 and weights_hash({"b": torch.ones(()), "a": torch.zeros(3, 2).T}) == weights_hash(state)
    assert weights_hash({"a": torch.zeros(2, dtype=torch.bfloat16)})


def test_of_the_data_only_what_all_ranks_share_is_compared() -> None:
    """A rank's own loader of PyTorch's holds its share; the number of classes is no list of their names."""
    dataset = TensorDataset(torch.zeros(7, 1))
    dataset.classes = 3  # type: ignore[attr-defined]
    loader = DataLoader(dataset, batch_size=2)
    assert images_of(loader, None) == {"classes": None, "images": 7}
    assert images_of(loader, "a group") == {"classes": None, "images": None}
    assert images_of([(torch.zeros(2, 1), None), ()], None)["images"] == 2
