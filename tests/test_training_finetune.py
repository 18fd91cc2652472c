"""`skd.finetune`: plain models, extracted ones among them, trained in place (METHOD 3)."""

import math

import pytest
import torch
from helpers import (
    QUIET,
    digit_data,
    digit_net,
    digit_vit,
    leftovers,
    nested,
    raw_bytes,
    run_training,
    spoilt,
    weights,
)

import skd
from skd.architecture import describe


def tuned(model, out=None, **changes):
    train, test, _ = digit_data()
    config = skd.finetune_config(**{"epochs": 2, "batch_size": 16, "lr": 1e-3, "workers": 0, **changes})
    return skd.finetune(model, train, test, config, out=out, console=QUIET)


def widths_of(model):
    return [info.full_width for info in describe(model)]


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
