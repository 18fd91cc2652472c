"""`skd.train` as METHOD 2 says: how the list grows, which weights are kept, and what a run leaves as it was."""

import contextlib
import copy
import itertools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Hooked,
    assert_close,
    checkpoint_files,
    digit_data,
    digit_net,
    digit_vit,
    raising,
    raw_bytes,
    read_checkpoint,
    run_training,
    spoilt,
    timeless,
    training_config,
    weights,
)
from torch.utils.data import DataLoader, IterableDataset

import skd
import skd.planners.paper as paper_module
from skd.support.curve import area, measure_curve
from skd.training import evaluation
from skd.training.batches import start_epoch

# How the list grows


def dropout_lists(out):
    return [skd.DropoutList.from_json(read_checkpoint(path)[1]["dropout_list"]) for path in checkpoint_files(out)]


@pytest.mark.parametrize("convention", ["full", "linear"])
def test_the_list_grows_as_the_planner_would_grow_it(tmp_path, convention):
    """With a learning rate of nearly nothing, training is `skd.plan` with as many rounds as there are growing epochs.

    Importance is measured in evaluation mode, or drop path would show.
    """
    net = digit_net(torch.float64)
    config = training_config(epochs=5, progressive_epochs=3, target=0.8, drop_path=0.9, lr=1e-30, checkpoint_hist=9)
    config = config.changed(convention=convention, checkpoint_steps=0, planner=None)
    history = run_training(net, config, tmp_path)
    planned = skd.plan(digit_net(torch.float64), digit_data()[2], target=0.8, rounds=3, convention=convention)
    assert net.dropout_list == planned
    assert net.dropout_list.removed_macs == planned.removed_macs
    lists = dropout_lists(tmp_path)
    for earlier, later in itertools.pairwise(lists):
        assert np.array_equal(later.widths[: len(earlier)], earlier.widths), "old entries changed"
        assert (np.diff(later.widths, axis=0) <= 0).all(), "entries are not nested"
    entries = [row["entries"] for row in history.epochs]
    assert entries == [len(grown) for grown in lists]
    assert 1 < entries[0] < entries[1] < entries[2] == entries[3] == entries[4]
    assert [row["sensitivity"] is not None for row in history.epochs] == [True, True, True, False, False]
    total = skd.cost(net, convention=convention).macs
    for epoch, grown in enumerate(lists[:3]):
        assert 0 < grown.removed_macs <= 0.8 * total * (epoch + 1) / 3 * (1 + 1e-9)


def test_importance_is_measured_on_the_raw_weights(tmp_path, monkeypatch):
    """Of the moment, and not on their average."""
    seen = []

    def spy(supernet, batches, current, **options):
        seen.append((raw_bytes(weights(supernet)), supernet.training, len(current)))
        return propose(supernet, batches, current, **options)

    propose = paper_module.propose
    monkeypatch.setattr(paper_module, "propose", spy)
    net = digit_net()
    start = raw_bytes(weights(net))
    config = training_config(checkpoint_hist=9, checkpoint_steps=0, model_ema_decay=0.99, model_ema_warmup=False)
    run_training(net, config, tmp_path)
    tensors, header = read_checkpoint(checkpoint_files(tmp_path)[0])
    raw, average = (
        raw_bytes({name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)})
        for part in ("model.", "ema.")
    )
    assert len(seen) == 2
    assert seen[0][0] == start
    assert seen[1][0] == raw != average
    assert seen[1][2] == len(skd.DropoutList.from_json(header["dropout_list"]))


def test_importance_reads_the_calibration_images_in_evaluation_mode_and_draws_nothing(monkeypatch):
    states, modes = [], []
    net = digit_net()

    def spy(*arguments, **options):
        states.append(random_states())
        proposal = propose(*arguments, **options)
        states.append(random_states())
        return proposal

    propose = paper_module.propose
    monkeypatch.setattr(paper_module, "propose", spy)
    calibration = Hooked(digit_data()[2], lambda _: modes.append(net.training))
    run_training(net, training_config(), calibration=calibration)
    assert calibration.given == 2 * 2, "one pass in each growing epoch"
    assert modes == [False] * 4
    assert len(states) == 4 and states[0] == states[1] and states[2] == states[3]


# The average, and which weights are kept


def parts(path):
    """(raw weights, average) in a checkpoint."""
    tensors, _ = read_checkpoint(path)
    return tuple(
        {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        for part in ("model.", "ema.")
    )


@pytest.mark.parametrize("warmup", [False, True])
def test_average_by_hand(tmp_path, warmup):
    """ema = d * ema + (1 - d) * weights after every step; the first step is taken as it is."""
    config = training_config(epochs=1, progressive_epochs=1, checkpoint_steps=1, checkpoint_hist=9)
    config = config.changed(model_ema_decay=0.7, model_ema_warmup=warmup)
    net = digit_net(torch.float64)
    run_training(net, config, tmp_path)
    files = checkpoint_files(tmp_path)
    assert len(files) == 4
    expected = parts(files[0])[0]
    for step, path in enumerate(files):
        raw, average = parts(path)
        decay = (min(0.7, 1 - (1 + step) ** (-2 / 3)) if warmup else 0.7) if step else 0.0
        expected = {name: decay * expected[name] + (1 - decay) * raw[name] for name in raw}
        assert_close(average, expected)
    assert_close(weights(net), expected)
    assert_close(weights(skd.load(tmp_path / "supernet.safetensors")), expected)


def test_without_the_average_the_raw_weights_are_kept(tmp_path):
    net = digit_net()
    run_training(net, training_config(model_ema=False), tmp_path)
    raw, average = parts(checkpoint_files(tmp_path)[-1])
    assert average == {}
    assert raw_bytes(weights(net)) == raw_bytes(raw)
    assert raw_bytes(weights(skd.load(tmp_path / "supernet.safetensors"))) == raw_bytes(raw)


def test_what_is_evaluated_is_what_is_saved(tmp_path):
    config = training_config(eval_every=1, checkpoint_hist=9, model_ema_decay=0.8)
    net = digit_net()
    original = skd.evaluate(net, digit_data()[1])
    history = run_training(net, config, tmp_path)
    assert history.original_top1 == original
    best = history.best
    assert best["best"] and [row["best"] for row in history.epochs].count(True) == 1
    saved = skd.load(tmp_path / "supernet.safetensors")
    assert measure_curve(saved, digit_data()[1], config.budgets) == best["curve"]
    for row in history.epochs:
        assert row["area"] == area(row["curve"], config.budgets)
        smallest = row["macs_fraction"]
        assert [point["budget"] for point in row["curve"]] == [b for b in config.budgets if b >= smallest]
    assert len(history.epochs[0]["curve"]) < len(config.budgets), "the list was short, the rest counts as 0"
    assert history.area == max(row["area"] for row in history.epochs)


def scripted(monkeypatch, *areas):
    """Evaluations that give these areas, one after the other."""
    values = iter((50.0, *areas))  # the first is of the network before training

    def measure(supernet, batches, budgets, **_):
        value = next(values)
        list(batches)
        return [{"budget": b, "entry": 0, "macs": 1, "macs_fraction": b, "top1": value} for b in budgets]

    monkeypatch.setattr(evaluation, "measure_curve", measure)


@pytest.mark.parametrize("areas, best", [((5, 9, 7, 3), 1), ((9, 5, 9, 7), 2), ((0, 0, 0, 0), 3)])
def test_the_best_epoch_is_kept_and_the_later_of_equals(tmp_path, monkeypatch, areas, best):
    scripted(monkeypatch, *areas)
    net = digit_net()
    config = training_config(epochs=4, eval_every=1, checkpoint_hist=9, checkpoint_steps=0)
    history = run_training(net, config, tmp_path)
    assert history.best_epoch == best
    assert [row["area"] for row in history.epochs] == pytest.approx(areas)
    assert [row["best"] for row in history.epochs] == [epoch == best for epoch in range(4)]
    kept = raw_bytes(parts(checkpoint_files(tmp_path)[best])[1])
    assert raw_bytes(weights(net)) == kept
    assert raw_bytes(weights(skd.load(tmp_path / "supernet.safetensors"))) == kept


def test_cuda_graphs_fall_back_on_a_cpu():
    """Saying why, and to the same weights."""
    runs = []
    for graph in (False, True):
        net = digit_net()
        with pytest.warns(UserWarning, match="not on a GPU") if graph else contextlib.nullcontext():
            run_training(net, training_config(cuda_graph=graph))
        runs.append(raw_bytes(weights(net)))
    assert runs[0] == runs[1]


def test_evaluations_happen_when_asked_and_at_the_end():
    history = run_training(digit_net(), training_config(epochs=5, eval_every=2))
    assert [row["curve"] is not None for row in history.epochs] == [False, True, False, True, True]


def test_without_evaluation_the_last_weights_are_kept(tmp_path):
    net = digit_net()
    history = run_training(net, training_config(), tmp_path, val_loader=None)
    average = parts(checkpoint_files(tmp_path)[-1])[1]
    assert raw_bytes(weights(net)) == raw_bytes(average)
    assert raw_bytes(weights(skd.load(tmp_path / "supernet.safetensors"))) == raw_bytes(average)
    assert (history.original_top1, history.best_epoch, history.area) == (None, 2, None)
    assert len(net.dropout_list) == len(skd.load(tmp_path / "supernet.safetensors").dropout_list) > 1


def random_states():
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 (others' generator)
    return python, repr(numpy), torch.get_rng_state().tolist()


# What a run leaves as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_network_gets_its_own_modules_and_mode_back(training, fails):
    net = digit_net(drop_path_rate=0.3).train(training)
    modules = dict(net.named_modules())
    config = training_config(grad_checkpointing=True)
    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            run_training(net, config, train_loader=raising(digit_data()[0], 6, OSError("the disk is gone")))
    else:
        run_training(net, config)
    assert dict(net.named_modules()) == modules
    assert {module.training for module in net.modules()} == {training}
    assert net.model.grad_checkpointing is False
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_batches_are_not_changed():
    before = [copy.deepcopy(batches) for batches in digit_data()]
    run_training(digit_net(), training_config())
    for batches, old in zip(digit_data(), before, strict=True):
        for batch, expected in zip(batches, old, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_a_run_is_a_function_of_its_seed(tmp_path):
    """Bit for bit, whatever the global generators hold, which are left as they were."""
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (others' generator)
        np.random.randn()  # noqa: NPY002 (an odd number of normal numbers: one is kept for later)
        torch.manual_seed(number)
        net, before = digit_net(), random_states()
        history = run_training(net, training_config(drop_path=0.2, seed=seed), tmp_path / str(number))
        assert random_states() == before
        runs.append((raw_bytes(weights(net)), timeless(history.epochs)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


# What is refused or warned of


@pytest.mark.parametrize("which", ["train_loader", "val_loader", "calibration"])
def test_iterators_are_refused(which):
    with pytest.raises(ValueError, match=f"^{which} is an iterator"):
        run_training(digit_net(), training_config(), **{which: iter(digit_data()[0])})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: digit_net(num_classes=0), "no classifier"),
        (digit_vit, "must be a SuperNet"),
    ],
)
def test_networks_that_cannot_be_trained(make, message):
    with pytest.raises(ValueError, match=message):
        run_training(make(), training_config())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"calibration": None}, "^calibration is None"),
        ({"calibration": []}, "has no batch"),
        ({"train_loader": []}, "^train_loader has no batch"),
        ({"train_loader": 5}, "^train_loader is a int"),
        ({"val_loader": []}, "has no batch"),
        ({"resume": "yes"}, "^resume is 'yes'"),
        ({"resume": "auto"}, "^resume is 'auto', but there is no `out`"),
        ({"config": {"epochs": 3}}, "^config is a dict"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        run_training(digit_net(), **{"config": training_config(), **changes})


BAD_BATCHES = {
    "label": (lambda images, labels: (images, labels + 10), r"labels has 1\d..19; the head has classes 0..9"),
    "size": (lambda images, labels: (images[:, :, :4], labels), r"size \(4, 8\); the model takes \(8, 8\)"),
    "channels": (lambda images, labels: (images.repeat(1, 3, 1, 1), labels), "3 channels; the model takes 1"),
    "integers": (lambda images, labels: (images.byte(), labels), "must be a floating-point"),
    "not a pair": (lambda images, labels: images, r"must be \(images, labels\)"),
    "too few labels": (lambda images, labels: (images, labels[1:]), "must be an integer tensor of shape"),
    "no labels": (lambda images, labels: (images, None), "labels"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_bad_training_batches_are_named(kind):
    """By the loader and the number of the batch in its epoch."""
    change, message = BAD_BATCHES[kind]
    batches = spoilt(digit_data()[0], 3, change)
    with pytest.raises(ValueError, match=message) as refusal:
        run_training(digit_net(), training_config(), train_loader=batches)
    assert "train_loader" in str(refusal.value)
    assert "3" in str(refusal.value).split(":")[0], "which batch?"


@pytest.mark.parametrize("kind", ["label", "size"])
@pytest.mark.parametrize("which, index", [("val_loader", 1), ("calibration", 2)])
def test_bad_batches_of_other_loaders_are_named(kind, which, index):
    change, message = BAD_BATCHES[kind]
    batches = spoilt(digit_data()[index], 1, change)
    with pytest.raises(ValueError, match=message) as refusal:
        run_training(digit_net(), training_config(), **{which: batches})  # which looks at labels
    assert "[1]" in str(refusal.value)


def test_steps_cannot_be_scheduled_without_a_length():
    class Endless:
        def __iter__(self):
            return iter(digit_data()[0])

    with pytest.raises(ValueError, match="sched_on_updates"):
        run_training(digit_net(), training_config(sched_on_updates=True), train_loader=Endless())
    history = run_training(digit_net(), training_config(), train_loader=Endless())
    assert history.epochs[-1]["step"] == 12


def test_unknown_optimizers():
    with pytest.raises(ValueError, match="opt is 'adamq'"):
        run_training(digit_net(), training_config(opt="adamq"))


@pytest.mark.parametrize("off, warns", [(0.4, False), (-0.4, False), (0.6, True), (-0.6, True)])
def test_a_network_that_is_not_what_was_expected(off, warns):
    top1 = skd.evaluate(digit_net(), digit_data()[1])
    config = training_config(epochs=1, progressive_epochs=1, expected_top1=top1 + off)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_training(digit_net(), config)
    messages = [str(item.message) for item in caught if "expected" in str(item.message)]
    assert len(messages) == warns
    if warns:
        assert f"{top1:.2f} %" in messages[0] and f"{top1 + off:.2f} %" in messages[0]


@pytest.mark.parametrize("changes, warns", [({"batch_size": 32}, 1), ({}, 0), ({"batch_size": 32, "lr": 1e-3}, 0)])
def test_a_batch_size_that_the_learning_rate_is_not_for(changes, warns):
    """Once, not every step; nothing to warn of where the learning rate was given."""
    config = training_config(**{"epochs": 1, "progressive_epochs": 1, "lr": None, **changes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_training(digit_net(), config)
    messages = [str(item.message) for item in caught if "batch_size" in str(item.message)]
    assert len(messages) == warns
    if warns:
        assert "16 images per step, but batch_size is 32" in messages[0]


# Batches come to the model as the loader made them


def test_epochs_read_the_loader_once_each(tmp_path):
    loader = Hooked(digit_data()[0], lambda _: None)
    run_training(digit_net(), training_config(), train_loader=loader)
    assert loader.given == 3 * 4
    assert len(list(start_epoch(loader, 0, 0, 0))) == 4


class Stream(IterableDataset):  # type: ignore[type-arg]
    """A data set that does not know how many batches it has, as PyTorch's streams."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_loaders_of_streams_have_no_length() -> None:
    train, test, calibration = (DataLoader(Stream(part), batch_size=None) for part in digit_data())
    net = digit_net()
    run_training(net, training_config(), train_loader=train, val_loader=test, calibration=calibration)
    other = digit_net()
    run_training(other, training_config())
    assert raw_bytes(net.state_dict()) == raw_bytes(other.state_dict())


def test_a_list_that_was_planned_with_another_convention_does_not_grow_beyond_the_target_of_the_run() -> None:
    """With 64 tokens, where most of an attention's MACs are products that one convention does not count."""
    net, calibration = digit_net(patch_size=1), digit_data()[2]
    net.dropout_list = skd.plan(net, calibration, target=0.5, rounds=1, convention="linear", planner="paper")
    config = training_config(epochs=1, progressive_epochs=1, target=0.6, convention="full", checkpoint_steps=0)
    run_training(net, config)
    assert net.dropout_list.macs[-1] >= 0.4 * net.dropout_list.macs[0]


def test_a_teacher_that_there_is_not_is_said() -> None:
    with pytest.warns(UserWarning, match="kd_teacher is 'larger', but there is only the full network"):
        run_training(digit_net(), training_config(epochs=1, progressive_epochs=0, kd_teacher="larger"))
