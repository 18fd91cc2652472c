"""The fit of the shared output layers to several entries at once, and its place in a run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import (
    QUIET,
    assert_close,
    assert_same_outcome,
    digit_data,
    digit_net,
    interrupted,
    nested,
    run_training,
    tiny_vit,
    training_config,
    weights,
)

import skd
from skd.training import starting
from skd.training.starting import fit_shared

ENTRIES = [[8, 24, 16, 24], [8, 10, 8, 24], [8, 10, 8, 6], [8, 0, 8, 6]]


def distances(net: skd.SuperNet, original: skd.SuperNet) -> list[float]:
    """Of each entry the mean squared distance of its logits to the original network's."""
    images = torch.cat([images for images, _ in digit_data()[2]]).to(next(net.parameters()).dtype)
    with torch.no_grad():
        whole = original.eval()(images)
        return [float((net.eval()(images, entry=e) - whole).square().mean()) for e in range(len(net.dropout_list))]


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_small_entries_come_nearer_and_the_full_network_stays(init_values: float | None) -> None:
    net = nested(digit_net(torch.float64, init_values=init_values), *ENTRIES)
    original = copy.deepcopy(net)
    before = distances(net, original)
    fit_shared(net, digit_data()[2])
    after = distances(net, original)
    assert all(new < 0.7 * old for new, old in zip(after[2:], before[2:], strict=True)), (before, after)
    assert after[0] < 0.2 * before[-1]
    changed = {name for name, tensor in weights(net).items() if not torch.equal(tensor, weights(original)[name])}
    assert changed and all(".proj." in name or ".fc2." in name for name in changed)


def test_one_module_by_hand() -> None:
    """Weighted least squares over the rows of both entries: class tokens, since the head reads no other."""
    net = nested(skd.SuperNet(tiny_vit(depth=1)), [8, 72])
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    proj, features = net.model.blocks[0].attn.proj, torch.zeros(2, 6, 48, dtype=torch.float64)
    kept = (torch.arange(48) % 16 < 8, torch.ones(48, dtype=torch.bool))
    for number, entry in enumerate((1, 0)):
        sub, found = skd.extract(net, entry=entry), list[torch.Tensor]()
        sub.blocks[0].attn.proj.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
        sub(images)
        features[number][:, kept[number]] = found[0][:, 0].detach()
    narrow, whole = features
    weights = torch.tensor([1.0, starting.OF_FULL], dtype=torch.float64).repeat_interleave(6)
    h, before = torch.cat([narrow, whole]), copy.deepcopy(proj)
    missing = torch.cat([(whole - narrow) @ proj.weight.detach().mT, torch.zeros(6, 48, dtype=torch.float64)])
    centred = h - (weights[:, None] * h).sum(0) / weights.sum()
    penalty = starting.RIDGE * (weights[:, None] * centred.square()).sum(0).mean()
    rows = torch.cat([h, torch.ones(12, 1, dtype=torch.float64)], 1)
    shrunk = torch.diag(torch.tensor([1.0] * 48 + [0.0], dtype=torch.float64))
    solved = torch.linalg.solve(
        rows.mT @ (weights[:, None] * rows) + penalty * shrunk, rows.mT @ (weights[:, None] * missing)
    )
    fit_shared(net, [(images, torch.zeros(6, dtype=torch.int64))])
    torch.testing.assert_close(proj.weight, before.weight + solved[:-1].mT, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(proj.bias, before.bias + solved[-1], rtol=1e-6, atol=1e-8)


def test_a_list_of_one_changes_nothing() -> None:
    net = digit_net(torch.float64)
    before = weights(net)
    fit_shared(net, digit_data()[2])
    assert_close(weights(net), before, 1e-9)


@pytest.mark.parametrize("progressive_epochs, epoch", [(0, 0), (2, 1)])
def test_it_is_done_once(monkeypatch: pytest.MonkeyPatch, progressive_epochs: int, epoch: int) -> None:
    """In the last epoch that grows the list, after it has grown; or at the start."""
    seen: list[int] = []
    monkeypatch.setattr(starting, "fit_shared", lambda net, *_: seen.append(len(net.dropout_list)))
    net = digit_net() if progressive_epochs else nested(digit_net(), *ENTRIES)
    history = run_training(net, training_config(progressive_epochs=progressive_epochs, refit_start=True))
    assert seen == [history.epochs[epoch]["entries"]] == [len(net.dropout_list)]


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """Stopped after the fit, in its epoch: it is not repeated."""
    changes = {"refit_start": True, "progressive_epochs": 2}
    run_training(digit_net(), training_config(**changes), tmp_path / "whole")
    interrupted(tmp_path / "cut", 7, **changes)
    run_training(digit_net(), training_config(**changes), tmp_path / "cut", resume="auto")
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


def test_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="calibration is None"):
        run_training(digit_net(), training_config(progressive_epochs=0, refit_start=True), calibration=None)
    config = skd.finetune_config(epochs=1, batch_size=16, refit_start=True)
    with pytest.raises(ValueError, match="refit_start is true; a plain model"):
        skd.finetune(skd.extract(digit_net(), entry=0), *digit_data()[:2], config, console=QUIET)
