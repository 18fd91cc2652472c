"""`skd.finetune`: plain models, extracted ones among them, trained in place (METHOD 3)."""

import contextlib
import copy
import math

import pytest
import torch
from earlier import sized_zero
from helpers import (
    QUIET,
    checkpoint_files,
    digit_data,
    digit_net,
    digit_vit,
    leftovers,
    nested,
    raising,
    raw_bytes,
    read_checkpoint,
    run_training,
    spoilt,
    weights,
)
from internals import modules_of

import skd


def tuned(model, out=None, resume=None, **changes):
    train, test, _ = digit_data()
    config = skd.finetune_config(**{"epochs": 2, "batch_size": 16, "lr": 1e-3, "workers": 0, **changes})
    return skd.finetune(model, train, test, config, out=out, resume=resume, console=QUIET)


def widths_of(model):
    return [info.full_width for info in modules_of(model)]


@pytest.mark.parametrize("narrow", [None, [8, 5, 16, 24], [0, 5, 16, 0], [0, 0, 8, 24]])
def test_finetuning_changes_a_plain_model_in_place(tmp_path, narrow):
    """An extracted one too, of which a module may have no width at all."""
    model = digit_vit()
    if narrow is not None:
        model = skd.extract(nested(skd.SuperNet(model), narrow), entry=1)
    parameters, modules = list(model.parameters()), dict(model.named_modules())
    before, widths = weights(model), widths_of(model)
    history = tuned(model, tmp_path)
    assert dict(model.named_modules()) == modules
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert widths_of(model) == widths
    assert all((weights(model)[name] != before[name]).any() for name in before if before[name].numel())
    assert history.best["curve"][0]["top1"] == skd.evaluate(model, digit_data()[1])
    assert {row["entries"] for row in history.epochs} == {1}
    saved = skd.load(tmp_path / "model.safetensors")
    assert type(saved) is type(digit_vit())
    assert raw_bytes(weights(saved)) == raw_bytes(weights(model))
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("opt", ["adamw", "lion"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_run_of_an_earlier_version_goes_on(tmp_path, opt):
    """Its checkpoints have tensors of size 0 for skipped modules; it ends where it would have ended."""
    cut = skd.extract(nested(skd.SuperNet(digit_vit()), [0, 5, 16, 0]), entry=1)
    whole, again = copy.deepcopy(cut), copy.deepcopy(cut)
    changes = {"epochs": 3, "opt": opt, "checkpoint_steps": 2}
    config = skd.finetune_config(batch_size=16, lr=1e-3, workers=0, **changes)
    stopped = raising(digit_data()[0], 7, ConnectionError())
    with contextlib.suppress(ConnectionError):
        earlier = sized_zero(cut, tmp_path)
        skd.finetune(earlier, stopped, digit_data()[1], config, out=tmp_path / "run", console=QUIET)
    tensors, _ = read_checkpoint(checkpoint_files(tmp_path / "run")[-1])
    assert any(name.startswith("optimizer.") and not tensor.numel() for name, tensor in tensors.items())
    tuned(again, tmp_path / "run", resume="auto", **changes)
    tuned(whole, **changes)
    assert raw_bytes(weights(again)) == raw_bytes(weights(whole))


def test_finetuning_is_training_of_a_list_of_one_entry():
    model, net = digit_vit(), digit_net()
    tuned(model)
    config = skd.finetune_config(epochs=2, batch_size=16, lr=1e-3, workers=0)
    run_training(net, config, calibration=None)
    assert raw_bytes(weights(model)) == raw_bytes(weights(net))


def test_finetuning_of_what_is_no_plain_model():
    for network in (digit_net(), digit_net().model, torch.nn.Linear(3, 3)):
        with pytest.raises(ValueError, match=r"^model "):
            tuned(network)


def test_finetuning_drops_nothing():
    with pytest.raises(ValueError, match="progressive_epochs is 3"):
        tuned(digit_vit(), progressive_epochs=3, epochs=4)


def test_a_failed_finetuning_leaves_the_model_alone():
    model = digit_vit()
    before = raw_bytes(weights(model))
    bad = spoilt(digit_data()[0], 3, lambda images, labels: (images * math.nan, labels))
    with pytest.raises(skd.training.Diverged):
        skd.finetune(model, bad, None, skd.finetune_config(epochs=2, batch_size=16), console=QUIET)
    assert raw_bytes(weights(model)) == before
