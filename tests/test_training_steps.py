"""One training step as METHOD 2 says, against numbers computed by hand: gradient, decay, parts, masks, draws."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from helpers import (
    QUIET,
    Hooked,
    assert_close,
    digit_data,
    digit_net,
    nested,
    random_batches,
    run_training,
    tiny_vit,
    training_config,
    weights,
)
from torch.nn import functional as F

import skd
from skd.data import generator, seeded
from skd.training.decay import ExpectedDecay
from skd.training.dropping import CountedDropPath, DropPaths
from skd.training.mixing import Mixing

# One step, nothing random in it: no Mixup, no drop path, no average, and plain gradient descent.
STEP = {"epochs": 1, "progressive_epochs": 0, "mixup_prob": 0.0, "drop_path": 0.0, "model_ema": False}
STEP |= {"opt": "momentum", "weight_decay": 0.0, "lr": 0.1, "checkpoint_steps": 0}


def seed_drawing(entries, wanted):
    """A seed with which the first step draws `wanted` of a list of `entries`."""
    return next(s for s in range(100) if generator(s, "entry", 0).integers(entries) == wanted)


# One step


@pytest.mark.parametrize("entry", [0, 1])
def test_one_step_by_hand(entry):
    """The gradient of the label-smoothed loss of the drawn sub-network, once."""
    batch = digit_data()[0][:1]
    net = nested(digit_net(torch.float64), [8, 7, 16, 0])
    expected = copy.deepcopy(net)
    config = training_config(**STEP, seed=seed_drawing(2, entry))
    history = run_training(net, config, train_loader=batch, val_loader=None)
    loss = F.cross_entropy(expected(batch[0][0].double(), entry=entry), batch[0][1], label_smoothing=0.1)
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert_close(weights(net), weights(expected))
    assert history.epochs[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("amp_dtype", ["float32", "float16"])
def test_the_gradient_is_clipped_by_its_norm(amp_dtype):
    """Of the true gradient: in half precision the scale of the loss is taken out first."""
    batch = digit_data()[0][:1]
    steps = {}
    for clip in (None, 0.01, 100.0):
        net = digit_net()
        before = weights(net)
        config = training_config(**STEP | {"amp_dtype": amp_dtype}, clip_grad=clip)
        run_training(net, config, train_loader=batch, val_loader=None)
        steps[clip] = torch.cat([(weights(net)[name] - before[name]).flatten() for name in before])
    assert steps[0.01].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-2)
    assert torch.equal(steps[100.0], steps[None])
    assert F.cosine_similarity(steps[0.01], steps[None], dim=0) > 0.999
    assert steps[None].norm() > 10 * steps[0.01].norm()


@pytest.mark.parametrize("decay, share", [("published", 1.0), ("expected", 0.5)])
def test_weight_decay_of_coordinates_that_were_not_drawn(decay, share):
    """Published: all of them, at every step. Expected: half of it for what half of the entries include."""
    lr, wd = 0.01, 0.5
    net = nested(digit_net(torch.float64), [8, 0, 16, 24])
    before = weights(net)
    config = training_config(**STEP | {"opt": "adamw", "weight_decay": wd, "lr": lr}, decay=decay)
    config = config.changed(seed=seed_drawing(2, 1))  # the narrow entry: what it leaves out has no gradient
    run_training(net, config, train_loader=digit_data()[0][:1], val_loader=None)
    after = weights(net)

    def idle(state):
        """What the narrow entry leaves out: an MLP, and half of the only head."""
        qkv = state["blocks.0.attn.qkv.weight"].unflatten(0, (3, 16))
        proj = state["blocks.0.attn.proj.weight"]
        return qkv[:, 8:], proj[:, 8:], state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"]

    for old, new in zip(idle(before), idle(after), strict=True):
        torch.testing.assert_close(new, old * (1 - lr * wd * share), rtol=1e-12, atol=0)
    for name in ("mlp.fc1.bias", "mlp.fc2.bias", "norm2.weight", "norm2.bias"):
        assert torch.equal(after[f"blocks.0.{name}"], before[f"blocks.0.{name}"]), name
    moved = after["blocks.1.mlp.fc1.weight"] / before["blocks.1.mlp.fc1.weight"]
    assert not torch.allclose(moved, torch.full_like(moved, 1 - lr * wd * share)), "a gradient reached this one"


def test_expected_decay_follows_the_list_as_it_grows(monkeypatch):
    """P is that of the list of the moment."""
    lengths, apply = [], ExpectedDecay.apply

    def spy(self, lr):
        fresh = ExpectedDecay(self.supernet, self.parameters, self.weight_decay)
        assert all(torch.equal(a, b) for a, b in zip(self.shares, fresh.shares, strict=True))
        lengths.append(len(self.supernet.dropout_list))
        apply(self, lr)

    monkeypatch.setattr(ExpectedDecay, "apply", spy)
    run_training(digit_net(), training_config(decay="expected"))
    assert len(lengths) == 12
    assert 1 < lengths[0] < lengths[4] == lengths[-1]


def test_expected_and_published_decay_agree_where_everything_is_included():
    runs = []
    for decay in ("published", "expected"):
        net = digit_net(torch.float64)
        run_training(net, training_config(**STEP | {"opt": "adamw", "weight_decay": 0.5}, decay=decay))
        runs.append(weights(net))
    assert_close(*runs)


@pytest.mark.parametrize("entries", [1, 3])
def test_accumulated_parts_equal_one_batch(entries):
    """Also with drop path, whose masks are drawn for the whole batch."""
    runs = []
    for size, parts in ((16, 1), (8, 2), (4, 4)):
        net = digit_net(torch.float64)
        if entries > 1:
            nested(net, [8, 12, 16, 24], [8, 0, 0, 5])
        batches = [
            (x, y)
            for images, labels in digit_data()[0]
            for x, y in zip(images.split(size), labels.split(size), strict=True)
        ]
        changes = {"epochs": 2, "drop_path": 0.6, "opt": "adamw", "lr": 1e-3, "grad_accum_steps": parts}
        config = training_config(**STEP | changes, smoothing=0.2)
        history = run_training(net, config, train_loader=batches, val_loader=None)
        runs.append((weights(net), [(row["step"], row["images"], row["loss"]) for row in history.epochs]))
    for found, records in runs[1:]:
        assert_close(found, runs[0][0], 1e-10)
        for record, expected in zip(records, runs[0][1], strict=True):
            assert record == pytest.approx(expected, rel=1e-6)


def test_parts_that_do_not_make_a_step_are_left_out():
    net = digit_net()
    config = training_config(**STEP | {"batch_size": 32, "grad_accum_steps": 2})
    history = run_training(net, config, train_loader=digit_data()[0][:3])
    assert (history.epochs[0]["step"], history.epochs[0]["images"]) == (1, 32)


def test_mixing_of_a_step_is_counted(monkeypatch):
    """What the network sees is what `Mixing` draws by (seed, step)."""
    seen = []
    forward = skd.SuperNet.forward

    def spy(self, images, entry=None):
        if self.training:
            seen.append(images.clone())
        return forward(self, images, entry)

    monkeypatch.setattr(skd.SuperNet, "forward", spy)
    config = training_config(**STEP | {"epochs": 2, "mixup_prob": 1.0, "seed": 5})
    run_training(digit_net(), config, val_loader=None)
    assert len(seen) == 8
    for step, images in enumerate(seen):
        with seeded(5, "step", step):
            assert torch.equal(images, Mixing(config.mixing, 10)(*digit_data()[0][step % 4])[0])


def test_masks_of_a_step_are_counted(monkeypatch):
    """What the branches see in training is `DropPaths.masks` of (seed, step), in parts or not."""
    seen = []
    factors = CountedDropPath.factors

    def spy(self, dtype):
        if self.training:
            seen.append(self.mask.clone())
        return factors(self, dtype)

    monkeypatch.setattr(CountedDropPath, "factors", spy)
    net = digit_net()
    changes = {"epochs": 2, "drop_path": 0.5, "batch_size": 32, "grad_accum_steps": 2, "seed": 9}
    config = training_config(**STEP | changes)
    run_training(net, config, val_loader=None)
    expected = DropPaths(net, 0.5, seed=9)
    assert len(seen) == 4 * 2 * 4
    for step in range(4):
        first, second = (torch.stack(seen[8 * step + 4 * part :][:4]) for part in (0, 1))
        assert torch.equal(torch.cat([first, second], 1), expected.masks(step, 32))


def test_recomputed_activations_give_the_same_weights():
    """The recomputation drops the same branches."""
    runs = []
    for checkpointing in (False, True):
        net, seen = digit_net(torch.float64), set()
        config = training_config(drop_path=0.5, grad_checkpointing=checkpointing)
        loader = Hooked(digit_data()[0], lambda _: seen.add(net.model.grad_checkpointing))  # noqa: B023
        run_training(net, config, train_loader=loader)
        runs.append(weights(net))
        assert seen == {checkpointing}
        assert net.model.grad_checkpointing is False
    assert_close(*runs, 1e-11)


def test_channels_last_gives_the_same_weights(monkeypatch):
    """The patch embedding sees the layout, in each part of a step; the weights keep theirs."""
    runs, layouts = [], set()
    embed = skd.SuperNet.embed

    def spy(self, images):
        if self.training:
            layouts.add(images.is_contiguous(memory_format=torch.channels_last))
        return embed(self, images)

    monkeypatch.setattr(skd.SuperNet, "embed", spy)
    for channels_last in (False, True):
        net = skd.SuperNet(tiny_vit())
        layouts.clear()
        config = training_config(**STEP, channels_last=channels_last, grad_accum_steps=2, batch_size=8)
        skd.train(net, random_batches(4), None, config, calibration=random_batches(1), console=QUIET)
        assert layouts == {channels_last}
        assert all(parameter.is_contiguous() for parameter in net.parameters())
        runs.append(weights(net))
    assert_close(*runs, 1e-11)


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_a_switch_that_goes_back(fails):
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before, seen = [switch.fp32_precision for switch in switches], []

    def look(_):
        seen.append([switch.fp32_precision for switch in switches])
        assert torch.get_float32_matmul_precision() in ("highest", "high"), "the older switch still answers"
        if fails:
            raise OSError("the disk is gone")

    for allowed in (False, True):
        seen.clear()
        with contextlib.suppress(OSError):
            run_training(
                digit_net(), training_config(**STEP, tf32=allowed), train_loader=Hooked(digit_data()[0], look)
            )
        assert seen[0] == (["tf32", "tf32"] if allowed else before)
        assert [switch.fp32_precision for switch in switches] == before


def test_learning_rate_by_hand():
    """Linear warm-up, then a cosine over all epochs, one value per epoch."""
    config = training_config(epochs=5, warmup_epochs=2, lr=1e-2, min_lr=1e-4, warmup_lr=1e-5, eval_every=5)
    found = [row["lr"] for row in run_training(digit_net(), config).epochs]
    cosine = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]
    assert found == pytest.approx([1e-5, (1e-5 + 1e-2) / 2, *cosine[2:]])


def test_learning_rate_by_steps():
    """The last step of an epoch is 4 * epoch + 3 of 8."""
    config = training_config(epochs=2, progressive_epochs=1, lr=1e-2, min_lr=0.0, sched_on_updates=True)
    found = [row["lr"] for row in run_training(digit_net(), config).epochs]
    assert found == pytest.approx([1e-2 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (3, 7)])


# Which sub-networks are trained


@pytest.fixture
def drawn(monkeypatch):
    """The entries of all training steps."""
    entries = []
    forward = skd.SuperNet.forward

    def spy(self, images, entry=None):
        if self.training:
            entries.append(entry)
        return forward(self, images, entry)

    monkeypatch.setattr(skd.SuperNet, "forward", spy)
    return entries


def test_every_entry_is_drawn_alike_the_last_included(drawn):
    """Chi-square with 4 degrees of freedom: 18.5 is passed once in 1,000; the seed is fixed."""
    net = nested(digit_net(depth=1), [8, 24], [8, 12], [0, 12], [0, 1])
    image, label = digit_data()[0][0][0][:1], digit_data()[0][0][1][:1]
    run_training(net, training_config(**STEP, seed=4), train_loader=[(image, label)] * 300, val_loader=None)
    assert drawn == [int(generator(4, "entry", step).integers(5)) for step in range(300)]
    counts = np.bincount(drawn, minlength=5)
    assert len(counts) == 5
    assert ((counts - 60) ** 2 / 60).sum() < 18.5


def test_draws_go_on_over_epochs(drawn):
    """By the steps of the run: an epoch does not repeat the one before."""
    net = nested(digit_net(depth=1), [8, 24], [8, 12], [0, 12])
    run_training(net, training_config(**STEP | {"epochs": 3}), val_loader=None)
    assert drawn == [int(generator(0, "entry", step).integers(4)) for step in range(12)]
    assert len({tuple(drawn[start : start + 4]) for start in (0, 4, 8)}) == 3


def test_without_growing_epochs_the_given_list_is_trained(drawn):
    net = nested(digit_net(), [8, 3, 8, 3])
    given = net.dropout_list
    history = run_training(net, training_config(progressive_epochs=0), calibration=None)
    assert net.dropout_list == given
    assert set(drawn) == {0, 1}
    assert [row["entries"] for row in history.epochs] == [2, 2, 2]


# Precision


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_autocast_keeps_weights_in_float32(amp_dtype):
    losses = {}
    for dtype in ("float32", amp_dtype):
        net = digit_net()
        history = run_training(net, training_config(amp_dtype=dtype, mixup_prob=0.0))
        losses[dtype] = history.epochs[0]["loss"]
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert losses[amp_dtype] == pytest.approx(losses["float32"], rel=0.02)
    assert losses[amp_dtype] != losses["float32"]
