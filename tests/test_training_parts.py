"""The parts of training, each against numbers computed by hand or derived another way."""

import io
import json
import random
import signal

import numpy as np
import pytest
import torch
from helpers import Hooked, digit_data, digit_net, training_config
from rich.console import Console
from timm.layers import DropPath, SwiGLU, SwiGLUPacked
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import skd
from skd.data import Loader, data_config, generator, seeded, train_loader
from skd.data.digits import pixels
from skd.data.indexed import ArrayImages, PairSource
from skd.support.curve import area, measure_curve
from skd.training.batches import start_epoch
from skd.training.decay import ExpectedDecay, inclusion
from skd.training.dropping import CountedDropPath, DropPaths, drop_paths
from skd.training.history import Epoch, History, StepLog, drawn_means
from skd.training.mixing import Mixing
from skd.training.screen import Screen
from skd.training.step import by_hand
from skd.training.stopping import Stopped, stop_signals

# Stochastic depth


def test_drop_path_masks_follow_seed_and_step():
    """Not what was drawn before, nor the global generators."""
    net = digit_net(depth=3)
    first = DropPaths(net, 0.5, seed=7)
    masks = {step: first.masks(step, 64) for step in (0, 1, 2)}
    torch.manual_seed(5)
    second = DropPaths(net, 0.5, seed=7)
    for step in (2, 0, 1):
        assert torch.equal(second.masks(step, 64), masks[step])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(DropPaths(net, 0.5, seed=8).masks(0, 64), masks[0])


def test_drop_path_rates_rise_linearly_and_keep_the_mean():
    """Each branch is kept with probability 1 - rate and scaled by 1 / (1 - rate); the first block never drops."""
    masks = DropPaths(digit_net(depth=3), 0.5, seed=0).masks(0, 20_000)
    assert masks.shape == (6, 20_000)
    for row, rate in zip(masks, (0, 0, 0.25, 0.25, 0.5, 0.5), strict=True):
        values = torch.tensor([0.0, 1 / (1 - rate)] if rate else [1.0])
        assert torch.equal(row.unique(), values)
        assert (row == 0).double().mean().item() == pytest.approx(rate, abs=0.015)  # 4 sigma
        assert row.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(masks[4], masks[5]), "attention and MLP of a block drop independently"


def test_a_dropped_branch_adds_nothing_and_a_kept_one_more():
    net = digit_net(torch.float64).train()
    images = digit_data()[0][0][0][:3].double()
    x, _ = net.embed(images)
    y = net.step(0, x, 16) - x
    with drop_paths(net, 0.5, seed=0) as paths:
        mask = torch.tensor([0.0, 1.0, 2.0])
        paths.set(torch.stack([mask] * 4))
        torch.testing.assert_close(net.step(0, x, 16), x + mask.double()[:, None, None] * y, rtol=1e-12, atol=1e-12)
        net.eval()
        torch.testing.assert_close(net.step(0, x, 16), x + y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_own_drop_path_modules_come_back(rate):
    net = digit_net(drop_path_rate=0.2)
    own = [(block.drop_path1, block.drop_path2) for block in net.model.blocks]
    assert isinstance(own[1][0], DropPath)
    with pytest.raises(KeyError), drop_paths(net, rate, seed=0):
        inside = [module for block in net.model.blocks for module in (block.drop_path1, block.drop_path2)]
        assert {type(module) for module in inside} == {CountedDropPath if rate else nn.Identity}
        raise KeyError
    assert [(block.drop_path1, block.drop_path2) for block in net.model.blocks] == own


# Mixup and the loss

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # an odd number
LABELS = torch.tensor([0, 1, 2, 3, 4])


def mixed(config, *counters):
    with seeded(0, *counters):
        return Mixing(config.mixing, 10)(IMAGES, LABELS)


@pytest.mark.parametrize("changes", [{"cutmix": 0.0}, {"mixup": 0.0}, {}])
def test_mixing_is_a_function_of_what_it_is_seeded_with(changes):
    config = training_config(**changes)
    before = IMAGES.clone()
    images, targets = mixed(config, "step", 3)
    np.random.seed(1)  # noqa: NPY002 (the generator that Mixup draws from)
    torch.manual_seed(1)
    random.seed(1)
    again = mixed(config, "step", 3)
    assert torch.equal(again[0], images) and torch.equal(again[1], targets)
    assert any(not torch.equal(mixed(config, "step", step)[1], targets) for step in range(4, 9))
    assert torch.equal(IMAGES, before), "the caller's images changed"
    assert not torch.equal(images, before)


def test_mixup_by_hand():
    """lam of each image and 1 - lam of its mirror image in the batch; targets likewise."""
    images, targets = mixed(training_config(cutmix=0.0), "step", 0)
    lam = targets[0, 0].item()
    assert 0 < lam < 1
    torch.testing.assert_close(images, lam * IMAGES + (1 - lam) * IMAGES.flip(0))
    one_hot = F.one_hot(LABELS, 10).float()
    torch.testing.assert_close(targets, lam * one_hot + (1 - lam) * one_hot.flip(0))


def test_cutmix_by_hand():
    """A rectangle comes from the mirror image, and lam is the share that does not."""
    images, targets = mixed(training_config(mixup=0.0), "step", 1)
    foreign = images != IMAGES
    share = foreign[0].double().mean().item()
    assert 0 < share < 1
    assert targets[0, 0].item() == pytest.approx(1 - share)
    assert torch.equal(images, torch.where(foreign, IMAGES.flip(0), IMAGES))


def test_mixing_happens_in_its_share_of_the_steps():
    config = training_config(mixup_prob=0.3)
    counts = sum(not torch.equal(mixed(config, "step", step)[0], IMAGES) for step in range(400))
    assert 0.3 * 400 - 37 < counts < 0.3 * 400 + 37  # 4 sigma


@pytest.mark.parametrize("changes", [{"mixup_prob": 0.0}, {"mixup": 0.0, "cutmix": 0.0}])
def test_no_mixing(changes):
    images, labels = mixed(training_config(**changes), "step", 0)
    assert images is IMAGES and labels is LABELS


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_of_labels_and_of_mixed_targets(smoothing):
    """-sum of q log p with q = (1 - smoothing) * target + smoothing / classes."""
    mixing = Mixing(training_config(smoothing=smoothing).mixing, 10)
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft = mixed(training_config(), "step", 0)[1]
    for targets, dense in ((LABELS, F.one_hot(LABELS, 10).double()), (soft, soft.double())):
        q = (1 - smoothing) * dense + smoothing / 10
        expected = -(q * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(mixing.loss(logits, targets), expected, rtol=1e-6, atol=0)


def test_loss_of_half_precision_is_taken_in_float32():
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.arange(64) % 10
    loss = Mixing(training_config().mixing, 10).loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, label_smoothing=0.1))


# Weight decay


def decays(net, config):
    """{name: weight decay} of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in net.model.named_parameters()}
    groups = by_hand(net, config).state.optimizer.param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_only_matrices_decay():
    net = digit_net(class_token=True, global_pool="token", init_values=1e-2)
    found = decays(net, training_config(weight_decay=0.3))
    assert found.keys() == dict(net.model.named_parameters()).keys()
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    matrices |= {"patch_embed.proj.weight", "head.weight"}
    assert {name for name, decay in found.items() if decay} == matrices
    assert {found[name] for name in matrices} == {0.3}


def test_expected_decay_leaves_none_to_the_optimizer():
    assert set(decays(digit_net(), training_config(decay="expected")).values()) == {0.0}


def test_inclusion_by_hand():
    widths = [[4, 2], [3, 2], [1, 0]]
    dropout_list = skd.DropoutList(("0.attn", "0.mlp"), widths)
    assert np.allclose(inclusion(dropout_list, 0, 4), [1, 2 / 3, 2 / 3, 1 / 3])
    assert np.allclose(inclusion(dropout_list, 1, 2), [2 / 3, 2 / 3])


def gradients_at(net, entry):
    images, labels = digit_data()[0][0]
    net.zero_grad()
    F.cross_entropy(net(images.to(next(net.parameters()).dtype), entry=entry), labels).backward()
    return {id(p): p.grad.clone() for p in net.parameters()}


@pytest.mark.parametrize("layer", [None, SwiGLUPacked, SwiGLU])
def test_inclusion_lands_on_the_right_rows_and_columns(layer):
    """A coordinate outside of the narrow entry has no gradient there: P is a half exactly where that is so."""
    mlp = {} if layer is None else {"mlp_layer": layer, "act_layer": nn.SiLU}
    net = digit_net(torch.float64, num_heads=2, embed_dim=32, qkv_bias=True, **mlp)
    full = net.widths()
    net.dropout_list = skd.DropoutList(net.modules_in_order, [full, [8, 5, 0, full[3]]])
    narrow = gradients_at(net, 1)
    weights = [p for p in net.parameters() if p.ndim == 2]
    decay = ExpectedDecay(net, weights, 1.0)
    halves = 0
    for weight, share in zip(weights, decay.shares, strict=True):
        share = share.expand_as(weight)
        assert torch.equal(share == 0.5, narrow[id(weight)] == 0)
        assert torch.equal(share == 1.0, narrow[id(weight)] != 0)
        halves += int((share == 0.5).sum())
    assert halves > 1000


def test_expected_decay_by_hand():
    """p *= 1 - lr * wd * P, and a grown list counts from then on."""
    net = digit_net(torch.float64)
    weight = net.model.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    decay = ExpectedDecay(net, [weight], 0.5)
    decay.apply(0.1)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.05), rtol=1e-14, atol=0)
    net.dropout_list = skd.DropoutList(net.modules_in_order, [[16, 24, 16, 24], [16, 6, 16, 24], [16, 6, 16, 0]])
    decay.update()
    with torch.no_grad():
        weight.copy_(before)
    decay.apply(0.1)
    torch.testing.assert_close(weight[:6].detach(), before[:6] * (1 - 0.05), rtol=1e-14, atol=0)
    torch.testing.assert_close(weight[6:].detach(), before[6:] * (1 - 0.05 / 3), rtol=1e-14, atol=0)


# Batches of an epoch


def given(loader, epoch=0, start=0):
    return [images.sum().item() for images, _ in start_epoch(loader, 5, epoch, start)]


def test_a_list_from_any_place():
    batches = digit_data()[0]
    everything = given(batches)
    assert everything == [images.sum().item() for images, _ in batches]
    for start in range(8):
        assert given(batches, start=start) == everything[start:]


def test_skd_loaders_begin_in_the_middle_without_reading_what_was_before():
    images, labels = pixels()[0]
    source = PairSource(ArrayImages(images[:50], labels[:50]), "digits", "L")
    loader = train_loader(source, data_config(digit_net()), batch_size=16, seed=0)
    everything = given(loader, epoch=2)
    assert len(everything) == len(loader) == 3
    reads = []
    read = source.read
    source.read = lambda index: reads.append(index) or read(index)
    assert given(loader, epoch=2, start=2) == everything[2:]
    assert len(reads) == 16
    assert given(loader, epoch=2, start=3) == []
    assert given(loader, epoch=1) != everything
    assert isinstance(loader, Loader)


class Noisy(Dataset):
    """A source of images with noise from all three global random generators."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002 (that is the point)
        return torch.full((1,), float(index)) + noise, index


def test_a_shuffling_dataloader_repeats_itself():
    """Its order and its augmentation follow (seed, epoch, batch), from any place, whatever came before."""
    torch.manual_seed(0)
    loader = DataLoader(Noisy(), 8, shuffle=True)
    everything = given(loader, epoch=3)
    torch.manual_seed(1)
    other = DataLoader(Noisy(), 8, shuffle=True)
    given(other, epoch=2)
    assert given(other, epoch=3) == everything
    assert given(other, epoch=3, start=2) == everything[2:]
    assert given(other, epoch=4) != everything
    assert sorted(int(images.sum() > 0) for images, _ in start_epoch(other, 5, 3, 0)) == [1] * 5


def test_samplers_are_told_the_epoch():
    dataset = TensorDataset(torch.arange(8.0), torch.arange(8))
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=2, rank=0)
    told = []
    sampler.set_epoch = told.append
    given(DataLoader(dataset, 2, sampler=sampler), epoch=4)
    assert told == [4]


# The curve and its area


def rows_of(curve):
    return [{"budget": budget, "top1": top1} for budget, top1 in curve.items()]


@pytest.mark.parametrize(
    "curve, budgets, expected",
    [
        ({1.0: 80.0, 0.5: 60.0, 0.25: 20.0}, (1.0, 0.5, 0.25), (0.5 * 70 + 0.25 * 40) / 0.75),
        ({1.0: 80.0, 0.5: 60.0}, (1.0, 0.5, 0.25), (0.5 * 70 + 0.25 * 30) / 0.75),  # 0.25 counts as 0
        ({1.0: 80.0, 0.5: 60.0}, (0.25, 1.0, 0.5), (0.5 * 70 + 0.25 * 30) / 0.75),  # in any order
        ({1.0: 80.0}, (1.0,), 80.0),
        ({}, (1.0,), 0.0),
        ({0.5: 50.0}, (0.5, 0.5), 50.0),
        ({}, (0.5, 0.25), 0.0),
    ],
)
def test_area_by_hand(curve, budgets, expected):
    assert area(rows_of(curve), budgets) == pytest.approx(expected, rel=1e-12)


def test_a_curve_has_a_row_for_each_budget_that_is_met():
    net = digit_net()
    net.dropout_list = skd.DropoutList(net.modules_in_order, [[16, 24, 16, 24], [16, 0, 16, 24], [8, 0, 8, 0]])
    test = digit_data()[1]
    fractions = (net.dropout_list.macs / net.dropout_list.macs[0]).tolist()
    rows = measure_curve(net, test, (1.0, fractions[1], fractions[2] - 0.01, 0.99))
    assert [(row["budget"], row["entry"]) for row in rows] == [(1.0, 0), (fractions[1], 1), (0.99, 1)]
    for row in rows:
        assert row["top1"] == skd.evaluate(skd.extract(net, entry=row["entry"]), test)
        full, linear = (skd.cost(net, entry=row["entry"], convention=name) for name in ("full", "linear"))
        assert (row["macs"], row["macs_linear"], row["params"]) == (full.macs, linear.macs, full.params)
        assert row["macs_fraction"] == fractions[row["entry"]]
    assert measure_curve(net, test, (0.001,)) == []


# History


def test_step_log_by_hand():
    """Sums over an interruption are those of an epoch in one piece, bit for bit."""
    dropout_list = skd.DropoutList(("0.attn", "0.mlp"), [[4, 4], [2, 2], [0, 0]], macs=[1000, 500, 30])
    steps = [(0, 2.3, 0.1), (1, 2.1, 0.2), (2, 0.7, 0.3), (1, 1.1, 0.4), (0, 1.7, 0.5)]

    def log(some, earlier=None):
        record = StepLog(earlier)
        for entry, loss, seconds in some:
            record.add(entry, torch.tensor(loss, dtype=torch.float64), seconds, 16)
        return record.summary(dropout_list)

    whole = log(steps)
    assert (whole["count"], whole["images"]) == (5, 80)
    assert whole["loss"] == pytest.approx(7.9)
    small, half, full = drawn_means(whole)
    assert small == {"macs_fraction": 0.03, "count": 1, "loss": 0.7, "seconds": 0.3}
    assert half == {"macs_fraction": 0.5, "count": 2, "loss": pytest.approx(1.6), "seconds": pytest.approx(0.3)}
    assert full == {"macs_fraction": 1.0, "count": 2, "loss": pytest.approx(2.0), "seconds": pytest.approx(0.3)}
    for cut in range(6):
        assert log(steps[cut:], json.loads(json.dumps(log(steps[:cut])))) == whole
    assert log([]) == {"count": 0, "loss": 0.0, "images": 0, "drawn": []}


def epoch_of(number, **evaluated):
    return Epoch(epoch=number, step=4, lr=0.1, loss=2.0, images=64, entries=1, macs_fraction=1.0, **evaluated)


def test_history_knows_its_best_epoch():
    epochs = [epoch_of(0), epoch_of(1, curve=[{"top1": 5.0}], area=5.0)]
    history = History(None, epochs, 1)
    assert (history.best, history.curve, history.area) == (epochs[1], [{"top1": 5.0}], 5.0)
    assert [json.loads(line) for line in history.to_jsonl().splitlines()] == epochs
    assert (History().best, History().curve, History().area) == (None, [], None)


def test_a_history_without_evaluation_has_an_empty_curve():
    assert History(None, [epoch_of(0)], 0).curve == []


def test_an_epoch_is_the_mapping_that_its_line_is():
    """So what reads the lines of history.jsonl reads what `skd.train` returns, and the other way round."""
    row = epoch_of(3, area=5.0)
    line = json.loads(History(None, [row]).to_jsonl())
    assert line == row and Epoch(**line) == row
    assert line["epoch"] == row["epoch"] == row.epoch == 3 and row["area"] == 5.0 and row.get("top1") is None
    assert row != epoch_of(3) and list(row) == list(line)
    with pytest.raises(KeyError):
        row["to_jsonl"]


# Signals


def test_signals_are_remembered_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with stop_signals(True) as stop:
        assert stop.number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in before} == before


def test_ctrl_c_twice_means_now():
    with pytest.raises(KeyboardInterrupt), stop_signals(True):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_stopped_says_how_to_go_on():
    stopped = Stopped(signal.SIGTERM, "/runs/1/checkpoints/step-000000004.safetensors")
    assert "SIGTERM" in str(stopped) and str(stopped.checkpoint) in str(stopped) and "resume" in str(stopped)


# The screen


def test_bars_in_a_terminal_and_lines_elsewhere():
    """A bar is drawn while batches go by; without a terminal there is none, and nothing is lost either way."""
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        screen = Screen(console)
        assert list(screen.bar([1, 2, 3], "Evaluating")) == [1, 2, 3]
        assert list(screen.bar(iter([1, 2]), "Evaluating")) == [1, 2]
        with screen.steps(0, 3, 6, 2) as bar:
            bar.advance(2.5)
            bar.advance(None)
        assert ("Evaluating" in console.file.getvalue()) is terminal
        assert ("Epoch 1/3" in console.file.getvalue()) is terminal


def test_generators_of_entries_and_masks_are_not_the_same():
    """Counters with different names give independent numbers."""
    names = ("entry", "drop_path", "step", "order", "loader")
    draws = [generator(0, name, 0).random() for name in names]
    assert len(set(draws)) == len(names)


def test_hooked_batches():
    """Of which other tests rely on the count."""
    seen = []
    batches = Hooked([1, 2], seen.append)
    assert (list(batches), list(batches), seen, len(batches)) == ([1, 2], [1, 2], [0, 1, 2, 3], 2)
