"""A run that a signal stops goes on to the same end, bit for bit, whatever its settings and loaders."""

import json
import signal
import threading

import pytest
import torch
from helpers import (
    QUIET,
    Hooked,
    assert_same_outcome,
    checkpoint_files,
    digit_data,
    digit_net,
    raw_bytes,
    run_training,
    timeless,
    training_config,
)
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import skd
from skd.data import digits
from skd.training import Stopped

NAMES = ("train_loader", "val_loader", "calibration")


# Signals at chosen places, in this process


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    known = {}

    def get(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("reference")
            run_training(digit_net(), training_config(**changes), known[key])
        return known[key]

    return get


def signalling(batches, at, number):
    return Hooked(batches, lambda given: signal.raise_signal(number) if given == at else None)


# Loader, number of the batch over the whole run, and the step of the checkpoint that is to appear.
PLACES = {
    "before the first step": (1, 0, 0),  # while the network before training is evaluated
    "in the first importance": (2, 1, 0),
    "in the second importance": (2, 2, 4),
    "first step": (0, 0, 1),
    "in an epoch": (0, 5, 6),
    "last step of an epoch": (0, 3, 4),
    "in an evaluation": (1, 2, 8),
    "at the end of an evaluation": (1, 3, 8),
    "in the last evaluation": (1, 5, 12),
}


@pytest.mark.parametrize(
    "place, name",
    [*((place, "SIGTERM") for place in PLACES), ("in an epoch", "SIGINT"), ("in an evaluation", "SIGINT")],
)
def test_a_signal_anywhere(tmp_path, references, place, name):
    """The step or the reading of a batch is finished, a checkpoint written, and the rest is as without the signal."""
    number = getattr(signal, name)
    changes = {"eval_every": 2, "sched_on_updates": True, "checkpoint_steps": 3}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    which, at, step = PLACES[place]
    loaders = list(digit_data())
    loaders[which] = signalling(loaders[which], at, number)
    net = digit_net()
    modules = dict(net.named_modules())
    config = training_config(**changes)
    with pytest.raises(Stopped) as stopped:
        run_training(net, config, tmp_path, **dict(zip(NAMES, loaders, strict=True)))
    newest = checkpoint_files(tmp_path)[-1]
    assert (stopped.value.signal, stopped.value.checkpoint) == (number, newest)
    assert newest.name == f"step-{step:09d}.safetensors"
    assert name in str(stopped.value) and str(newest) in str(stopped.value)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert dict(net.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in net.parameters())
    run_training(digit_net(), config, tmp_path, resume="auto")
    assert_same_outcome(tmp_path, references(**changes))


def test_stopped_after_each_single_step(tmp_path, references):
    """A list is read again from the epoch's first batch, at the end of an epoch all of it, and then the next."""
    for step in range(13):
        loader = signalling(digit_data()[0], step % 4 or (4 if step else 0), signal.SIGTERM)
        try:
            run_training(digit_net(), training_config(), tmp_path, resume="auto", train_loader=loader)
        except Stopped:
            assert checkpoint_files(tmp_path)[-1].name == f"step-{step + 1:09d}.safetensors"
        else:
            break
    assert step == 12
    assert_same_outcome(tmp_path, references())


def test_without_a_folder_signals_are_left_alone():
    """There is nothing to put away, so the program's own handler is asked."""
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        history = run_training(
            digit_net(), training_config(), train_loader=signalling(digit_data()[0], 3, signal.SIGTERM)
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [1]
    assert len(history.epochs) == 3


def test_training_in_a_thread(tmp_path, references):
    """Only the main thread may handle signals; others train without."""
    errors = []

    def work():
        try:
            run_training(digit_net(), training_config(), tmp_path)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert errors == []
    assert_same_outcome(tmp_path, references())


@pytest.mark.parametrize(
    "changes",
    [
        {"opt": "momentum"},
        {"opt": "lamb"},  # its number of steps is in the parameter group
        {"opt": "adan"},
        {"opt": "adamp"},  # plain numbers in its state
        {"opt": "nadamw"},
        {"amp_dtype": "float16"},
        {"amp_dtype": "bfloat16"},
        {"decay": "expected", "entry_sampling": "small"},
        {"entry_sampling": "sandwich"},
        {"model_ema": False},
        {"grad_checkpointing": True, "clip_grad": 0.1},
        {"warmup_epochs": 1, "convention": "linear"},
        {"planner": "loss"},
    ],
)
def test_every_state_is_put_away(tmp_path, changes):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"epochs": 2, "progressive_epochs": 1, "checkpoint_steps": 0, **changes}
    run_training(digit_net(), training_config(**changes), whole)
    loader = signalling(digit_data()[0], 5, signal.SIGTERM)
    with pytest.raises(Stopped):
        run_training(digit_net(), training_config(**changes), cut, train_loader=loader)
    run_training(digit_net(), training_config(**changes), cut, resume="auto")
    assert_same_outcome(cut, whole)


def test_float64_and_other_networks(tmp_path):
    net = {"dtype": torch.float64, "class_token": True, "global_pool": "token", "init_values": 0.1, "depth": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(digit_net(**net), training_config(), whole)
    with pytest.raises(Stopped):
        loader = signalling(digit_data()[0], 6, signal.SIGTERM)
        run_training(digit_net(**net), training_config(), cut, train_loader=loader)
    run_training(digit_net(**net), training_config(), cut, resume="auto")
    assert_same_outcome(cut, whole)
    assert {tensor.dtype for tensor in load_file(cut / "supernet.safetensors").values()} == {torch.float64}


def test_the_best_weights_survive_a_stop(tmp_path):
    """They may be of an epoch before it: kept in supernet.safetensors, and loaded from there."""
    config = training_config(epochs=4, eval_every=1, lr=0.5, model_ema=False, warmup_epochs=1, warmup_lr=1e-4)
    nets = [digit_net(), digit_net(), digit_net()]
    history = run_training(nets[0], config, tmp_path / "whole")
    assert history.best_epoch < 3, "this test needs a run that gets worse"
    with pytest.raises(Stopped):
        loader = signalling(digit_data()[0], 13, signal.SIGTERM)
        run_training(nets[1], config, tmp_path / "cut", train_loader=loader)
    again = run_training(nets[2], config, tmp_path / "cut", resume="auto")
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")
    assert raw_bytes(nets[2].state_dict()) == raw_bytes(nets[0].state_dict())
    assert again.best_epoch == history.best_epoch
    assert timeless(again.epochs) == timeless(history.epochs)


def test_finetuning_goes_on_as_well(tmp_path):
    train, test, _ = digit_data()
    config = skd.finetune_config(epochs=2, batch_size=16, checkpoint_steps=3)

    def tuned(out, loader, resume=None):
        net = digit_net()
        net.dropout_list = skd.DropoutList(net.modules_in_order, [net.widths(), [0, 5, 16, 0]])
        model = skd.extract(net, entry=1)
        skd.finetune(model, loader, test, config, out=out, resume=resume, console=QUIET)
        return raw_bytes(model.state_dict())

    expected = tuned(tmp_path / "whole", train)
    with pytest.raises(Stopped):
        tuned(tmp_path / "cut", signalling(train, 5, signal.SIGTERM))
    assert tuned(tmp_path / "cut", train, "auto") == expected
    found, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert raw_bytes(found) == raw_bytes(whole)


# PyTorch's own loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_dataloader_is_reproducible_and_resumes(tmp_path, workers):
    """Shuffled by the seed of the run, whatever the global generators hold, which are left as they were."""
    images, labels = digits()[0]
    dataset = TensorDataset(images[:64], labels[:64])

    def run(number, out, at=None, resume=None):
        loader = DataLoader(dataset, 16, shuffle=True, num_workers=workers)
        batches = loader if at is None else Interrupted(loader, at)
        torch.manual_seed(number)
        state = torch.get_rng_state()
        net = digit_net()
        run_training(net, training_config(epochs=2, progressive_epochs=1), out, train_loader=batches, resume=resume)
        assert torch.equal(torch.get_rng_state(), state)

    run(1, tmp_path / "whole")
    run(2, tmp_path / "again")
    assert_same_outcome(tmp_path / "again", tmp_path / "whole")
    with pytest.raises(Stopped):
        run(3, tmp_path / "cut", at=5)
    run(4, tmp_path / "cut", resume="auto")
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")
    epochs = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "history.jsonl").read_text().splitlines()]
    assert len(set(epochs)) == 2


class Interrupted:
    """A loader that sends SIGTERM after batch `at`."""

    def __init__(self, loader, at):
        self.loader, self.at, self.given = loader, at, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return self._batches(iter(self.loader))  # begun here and now: PyTorch draws numbers for it

    def _batches(self, iterator):
        for batch in iterator:
            if self.given == self.at:
                signal.raise_signal(signal.SIGTERM)
            self.given += 1
            yield batch


def test_dataloaders_to_evaluate_and_calibrate_with(tmp_path):
    """PyTorch draws from the global generator whenever one is read, even in order: the run must not show it."""
    images, labels = digits()[0]
    dataset = TensorDataset(images[:64], labels[:64])

    def run(number, out):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        test, calibration = DataLoader(dataset, 32), DataLoader(dataset, 16, shuffle=True)
        run_training(digit_net(), training_config(), out, val_loader=test, calibration=calibration)
        assert torch.equal(torch.get_rng_state(), state)

    run(1, tmp_path / "one")
    run(2, tmp_path / "other")
    assert_same_outcome(tmp_path / "other", tmp_path / "one")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As a script asks for it, of what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loader = signalling(digit_data()[0], 2, signal.SIGINT)
        run_training(digit_net(), training_config(epochs=1, progressive_epochs=0), tmp_path, train_loader=loader)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
