"""A planner's own options: those of "paper", and how the command line and training give them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digit_data, digit_net, nested, random_batches, run_training, tiny_vit, training_config
from test_commands import KWARGS, MODEL, command, make_images

import skd
from skd import planners
from skd.planning import propose
from skd.training.online import OnlineImportance


def test_the_square_root_of_the_sensitivity_ranks_the_operations() -> None:
    net, batches = digit_net(), digit_data()[2]
    scores, gamma = skd.importance(net, batches)
    roots = {name: math.sqrt(value) for name, value in gamma.items()}
    prices = dict(zip(net.modules_in_order, net.costs.planned_per_unit("full"), strict=True))
    groups = {info.name: info.group_size for info in net.infos}
    widths = net.dropout_list.entry(0)
    proposal = propose(net, batches, net.dropout_list, sensitivity="sqrt")
    assert proposal.operations == skd.rank_operations(scores, roots, prices, groups, widths)
    assert proposal.sensitivity == roots
    planned = {use: skd.plan(net, batches, rounds=1, planner="paper", sensitivity=use) for use in ("sqrt", "count")}
    assert planned["sqrt"].sensitivity == roots and planned["count"].sensitivity == gamma


class Unchanged(torch.nn.Module):
    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x


@pytest.mark.parametrize("changes", [{}, {"init_values": 0.3}])
def test_the_published_skip_adds_the_norm_of_the_stream(changes: dict[str, Any]) -> None:
    """By timm's own model with the identity in place of each module, as the published code has it."""
    model = tiny_vit(**changes)
    batches = [(images, model(images).argmax(-1)) for images, _ in random_batches(4, 16)]
    net = nested(skd.SuperNet(model), [16, 72, 16, 72])
    _, found = skd.importance(net, batches, skip="published")
    _, other = skd.importance(net, batches)

    def correct() -> int:
        with torch.no_grad():
            return sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in batches)

    whole = correct()
    for name in found:
        block, part = model.blocks[int(name[0])], name[2:]
        own = getattr(block, part)
        setattr(block, part, Unchanged())
        assert found[name] == max(whole - correct(), 0.5) / whole
        setattr(block, part, own)
    assert changes or found != other


@pytest.mark.parametrize("name", ["sensitivity", "skip"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is 'best'; it may be one of"):
        skd.plan(digit_net(), digit_data()[2], planner="paper", **{name: "best"})


def test_options_are_checked_by_name() -> None:
    planners.check_options("loss", {"points": 3})
    planners.check_options("loss", None)
    for name in ("point", "current", "target"):
        with pytest.raises(ValueError, match=f"planner 'loss' has no option '{name}'; it has .'points'"):
            planners.check_options("loss", {name: 3})
    config = training_config(planner=None, planner_options={"skip": "published"})
    with pytest.raises(ValueError, match="planner 'loss' has no option 'skip'"):
        run_training(digit_net(), config)


def test_training_gives_its_planner_the_options(tmp_path: Path) -> None:
    """The list of the first epoch is that of the planner with these options, at the weights before training."""
    options = {"sensitivity": "sqrt"}
    for importance in ("passes", "online"):
        net, config = digit_net(), training_config(planner="paper", planner_options=options, importance=importance)
        out = tmp_path / importance
        history = run_training(net, config, out)
        _, gamma = skd.importance(digit_net(), digit_data()[2])
        assert history.epochs[0]["sensitivity"] == {name: math.sqrt(value) for name, value in gamma.items()}
        assert json.loads((out / "run.json").read_text())["config"]["planner_options"] == options


def test_importance_followed_in_training_takes_the_root_too() -> None:
    net = digit_net()
    online = OnlineImportance(net)
    counts = []
    for use in ("count", "sqrt"):
        for index, buffer in enumerate(online.buffers, 1):
            assert buffer is not None
            buffer.fill_(index)
        counts.append(online.propose("full", use).sensitivity)
    assert counts[1] == {name: math.sqrt(value) for name, value in counts[0].items()} != counts[0]


def test_the_commands(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    data = ["--data", tmp_path / "images", "--workers", 0, "--calibration-images", 24]
    converted, planned, report = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.json"))
    command("convert", *MODEL, json.dumps(KWARGS), *data, "--out", converted, report)
    plan = ["plan", "--supernet", converted, *data, "--out", planned, "--rounds", 1, "--target", 0.6]
    command(*plan, "--planner", "loss", "--planner-options", '{"points": 1}', report)
    coarse = skd.load(planned).dropout_list
    command(*plan, "--planner", "loss", report)
    assert coarse != skd.load(planned).dropout_list and len(coarse) > 2
    command(*plan, "--keep", '{"0.mlp": 8}', "--exclude", "1.attn,1.mlp", report)
    listed = skd.load(planned).dropout_list
    narrowest, full = listed.entry(len(listed) - 1), listed.entry(0)
    assert narrowest["0.mlp"] >= 8 and all(narrowest[name] == full[name] for name in ("1.attn", "1.mlp"))
    from skd.cli import main

    for bad in (["--planner-options", '{"skip": "published"}'], ["--keep", '{"9.mlp": 8}'], ["--exclude", "x"]):
        assert main([str(word) for word in (*plan, *bad)]) == 2
    argv = ["train", "--supernet", converted, *data[:4], "--out", tmp_path / "run", "--dry-run"]
    with pytest.raises(SystemExit):
        main([str(word) for word in (*argv, "--planner-options", "sqrt")])
