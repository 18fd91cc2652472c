"""What goes wrong in a long run: NaN, and a full disk."""

import errno
import functools
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from helpers import (
    Hooked,
    assert_same_outcome,
    checkpoint_files,
    digit_data,
    digit_net,
    leftovers,
    raw_bytes,
    read_checkpoint,
    run_training,
    training_config,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import skd
from skd.training import Diverged, checkpoints

NAN = math.nan
EVERY_STEP = {"checkpoint_steps": 1, "checkpoint_hist": 99}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run with the settings of `training_config`."""
    out = tmp_path_factory.mktemp("reference")
    run_training(digit_net(), training_config(), out)
    return out


def assert_finite(out):
    """In every checkpoint, every tensor."""
    for path in checkpoint_files(out):
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor).all(), f"{name} of {path.name}"


# Not a number


class Poisoned(Hooked):
    """Batches of which one, by its number over all epochs, has a NaN in one image."""

    def __init__(self, batches, at, value):
        super().__init__(batches, lambda number: None)
        self.at, self.value = at, value

    def __iter__(self):
        for images, labels in super().__iter__():
            if self.given - 1 == self.at:
                images = images.clone()
                images[3, 0, 2, 5] = self.value
            yield images, labels


@pytest.mark.parametrize(
    "at, last, value", [(6, 6, NAN), (5, 4, NAN), (7, 6, NAN), (4, 4, NAN), (11, 10, NAN), (6, 6, math.inf)]
)
def test_a_nan_image_ends_the_run_before_it_spoils_a_checkpoint(tmp_path, reference, at, last, value):
    """The message names the newest checkpoint; from there a run with good images ends as if nothing had happened."""
    loader = Poisoned(digit_data()[0], at, value)
    with pytest.raises(Diverged, match="NaN") as error:
        run_training(digit_net(), training_config(), tmp_path, train_loader=loader)
    assert loader.given == at + 1, "no step is taken after it"
    newest = checkpoint_files(tmp_path)[-1]
    assert newest.name == f"step-{last:09d}.safetensors"
    assert str(error.value).endswith(f"the last good checkpoint is {newest}")
    assert f"epoch {at // 4}" in str(error.value)
    assert_finite(tmp_path)
    run_training(digit_net(), training_config(), tmp_path, resume="auto")
    assert_same_outcome(tmp_path, reference)


@pytest.mark.parametrize("out", [True, False])
def test_nan_at_once(tmp_path, out):
    net = digit_net()
    with torch.no_grad():
        net.model.blocks[1].mlp.fc1.weight[3, 3] = NAN
    with pytest.raises(Diverged, match="no checkpoint had been written") as error:
        run_training(net, training_config(**EVERY_STEP, progressive_epochs=0), tmp_path if out else None)
    assert "epoch 0" in str(error.value)
    assert not checkpoint_files(tmp_path)


def nan_gradient(net, step):
    """The backward pass of one step gives a NaN, the loss of that step does not."""
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * NAN if len(calls) == step + 1 else gradient

    net.model.head.weight.register_hook(hook)


@pytest.mark.parametrize("step", [2, 3, 10, 11])
def test_a_nan_gradient_is_noticed_before_its_weights_are_put_away(tmp_path, step):
    """The loss is finite until the next step: neither a checkpoint nor a network of NaN may be written meanwhile."""
    net = digit_net()
    config = training_config(**EVERY_STEP, progressive_epochs=0, eval_every=1)
    nan_gradient(net, step)
    with pytest.raises(Diverged) as error:
        run_training(net, config, tmp_path, calibration=None)
    assert_finite(tmp_path)
    newest = checkpoint_files(tmp_path)[-1]
    assert newest.name == f"step-{step:09d}.safetensors"
    assert str(newest) in str(error.value)
    if step > 4:
        saved = skd.load(tmp_path / "supernet.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in saved.state_dict().values())


def test_a_nan_gradient_without_a_folder():
    """The last step of all: nobody would see it afterwards."""
    net = digit_net()
    nan_gradient(net, 11)
    with pytest.raises(Diverged):
        run_training(net, training_config(progressive_epochs=0), calibration=None)


@pytest.mark.parametrize("power, taken", [(60, False), (17, True)])
def test_an_overflow_in_half_precision_is_no_divergence(tmp_path, monkeypatch, power, taken):
    """The scaler leaves such a step out and halves the scale: the weights stay as they were."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**power)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    net = digit_net()
    before = raw_bytes(net.state_dict())
    config = training_config(**EVERY_STEP, amp_dtype="float16", lr=2e-2)
    run_training(net, config, tmp_path)
    assert_finite(tmp_path)
    (first, one), (_, last) = (read_checkpoint(checkpoint_files(tmp_path)[index]) for index in (0, -1))
    weights = {name.removeprefix("model."): t for name, t in first.items() if name.startswith("model.")}
    if not taken:
        assert raw_bytes(weights) == before
        assert one["scaler"]["scale"] == 2.0 ** (power - 1)
        assert last["scaler"]["scale"] == 2.0 ** (power - 12)
    assert (raw_bytes(net.state_dict()) != before) is taken


# A full disk

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing_save(real, fails, error):
    """`save_file` that leaves half a file and fails, in the calls for which ``fails(path)``."""

    def save(tensors, path, metadata=None):
        if not fails(Path(path)):
            return real(tensors, path, metadata=metadata)
        real(tensors, path, metadata=metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        raise error

    return save


def failing_replace(fails, error):
    real = os.replace

    def replace(source, target):
        if fails(Path(target)):
            raise error
        real(source, target)

    return replace


def nth(number, name):
    """True for the `number`-th path with `name` in it, from 0."""
    count = iter(range(10**6))
    return lambda path: name in path.name and next(count) == number


def fill_disk(patch, how, number):
    """Let writing the checkpoint `number` fail."""
    fails = nth(number, "step-")
    if how == "replace":
        patch.setattr(os, "replace", failing_replace(fails, FULL))
    else:
        error = FULL if how == "write" else SafetensorError("I/O error: No space left on device (os error 28)")
        patch.setattr(checkpoints, "save_file", failing_save(save_file, fails, error))


@pytest.mark.parametrize(
    "how, number", [("write", 0), ("write", 4), ("safetensors", 3), ("replace", 4), ("replace", 8)]
)
def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, reference, how, number):
    """Earlier checkpoints stay whole, nothing half-written stays, and the message says where to go on."""
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, how, number)
        with pytest.raises(OSError, match="No space left") as error:
            run_training(digit_net(), training_config(), tmp_path)
    assert not leftovers(tmp_path)
    files = checkpoint_files(tmp_path)
    assert len(files) == min(number, 2)
    for path in files:
        read_checkpoint(path)
    last = f"the last whole checkpoint is {files[-1]}" if files else "there is no earlier checkpoint"
    assert str(error.value).endswith(last)
    assert f"checkpoint {tmp_path / 'checkpoints'}" in str(error.value)
    run_training(digit_net(), training_config(), tmp_path, resume="auto")
    assert_same_outcome(tmp_path, reference)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An uninterrupted run that is evaluated after each epoch."""
    out = tmp_path_factory.mktemp("evaluated")
    run_training(digit_net(), training_config(eval_every=1), out)
    return out


@pytest.mark.parametrize("name", ["supernet.safetensors", "history.jsonl", "dropout_list.json", "run.json"])
def test_a_full_disk_while_results_are_written(tmp_path, evaluated, name):
    """The file of before stays, and the run can go on."""
    config, first = training_config(eval_every=1), tmp_path
    fails = nth(0 if name == "run.json" else 1, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", failing_replace(fails, FULL))
        with pytest.raises(OSError, match="No space left"):
            run_training(digit_net(), config, first)
    assert not leftovers(first)
    if name == "supernet.safetensors":
        skd.load(first / name)
    elif name != "run.json":
        assert (first / name).read_text()
    run_training(digit_net(), config, first, resume="auto")
    assert_same_outcome(first, evaluated)
    assert (first / "run.json").exists()


@pytest.fixture
def file_size_limit():
    """A real limit of the kernel on the size of files that this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow(tmp_path, reference, file_size_limit):
    """The kernel refuses the bytes: whatever safetensors makes of that, the checkpoint of before is whole."""
    loader = Hooked(digit_data()[0], lambda number: file_size_limit(50_000) if number == 7 else None)
    with pytest.raises(OSError, match="the last whole checkpoint is"):
        run_training(digit_net(), training_config(), tmp_path, train_loader=loader)
    file_size_limit(resource.RLIM_INFINITY)
    assert not leftovers(tmp_path)
    assert [path.name for path in checkpoint_files(tmp_path)] == [f"step-{n:09d}.safetensors" for n in (4, 6)]
    run_training(digit_net(), training_config(), tmp_path, resume="auto")
    assert_same_outcome(tmp_path, reference)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^out is .*a file"):
        run_training(digit_net(), training_config(), tmp_path / "file")


# Lost work


def test_what_cannot_be_saved_is_not_trained(tmp_path: Path) -> None:
    """It is said before the first step, and not at the first evaluation."""
    steps: list[int] = []
    loader = Hooked(digit_data()[0], steps.append)
    net = digit_net()
    net.model.head = torch.nn.Sequential(torch.nn.Dropout(0.1), net.model.head)
    with pytest.raises(ValueError, match="obj cannot be rebuilt from its constructor arguments"):
        run_training(net, training_config(), tmp_path / "a", train_loader=loader)
    tied = digit_net()
    tied.model.blocks[1].mlp.fc1.weight = tied.model.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.\w+ and blocks\.1\.mlp\.fc1\.\w+ are one tensor"):
        run_training(tied, training_config(), tmp_path / "a", train_loader=loader)
    (tmp_path / "b" / "supernet.safetensors").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out has a folder supernet\.safetensors"):
        run_training(digit_net(), training_config(), tmp_path / "b", train_loader=loader)
    assert steps == [] and not checkpoint_files(tmp_path / "a")


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_finished_run_is_not_overwritten_when_its_checkpoints_are_gone(tmp_path: Path, resume: str | None) -> None:
    run_training(digit_net(), training_config(epochs=1, progressive_epochs=0), tmp_path)
    written = (tmp_path / "supernet.safetensors").read_bytes()
    for path in checkpoint_files(tmp_path):
        path.unlink()
    with pytest.raises(ValueError, match="a finished run whose checkpoints are gone"):
        run_training(digit_net(), training_config(epochs=1, progressive_epochs=0), tmp_path, resume=resume)
    assert (tmp_path / "supernet.safetensors").read_bytes() == written
