"""`attention_group`: how many coordinates of every head one step of planning removes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import nested, random_batches, tiny_vit

import skd


@pytest.fixture(scope="module")
def net() -> skd.SuperNet:
    return skd.convert(tiny_vit(), random_batches(), attention_group=4)


@pytest.mark.parametrize("planner", ["paper", "loss"])
def test_planners_remove_such_groups(net: skd.SuperNet, planner: str) -> None:
    assert [module.group_size for module in net.infos] == [4, 3, 4, 3]
    table = net.width_table
    net.dropout_list = skd.plan(net, random_batches(), target=0.8, planner=planner)
    assert planner == "paper" or np.diff(net.dropout_list.widths[:, [0, 2]], axis=0).min() == -4
    assert (net.dropout_list.widths[:, [0, 2]] % 8 == 4).any()
    assert net.width_table is table  # the list has its place from the start
    images, last = random_batches()[0][0], len(net.dropout_list) - 1
    with torch.no_grad():
        torch.testing.assert_close(skd.extract(net, entry=last)(images), net(images, entry=last))


def test_files_keep_it(net: skd.SuperNet, tmp_path: Path) -> None:
    skd.save(net, tmp_path / "net.safetensors")
    loaded = skd.load(tmp_path / "net.safetensors")
    assert [module.group_size for module in loaded.infos] == [4, 3, 4, 3]
    assert len(loaded.width_table) == len(net.width_table) > len(skd.SuperNet(tiny_vit()).width_table)


def test_files_of_networks_whose_heads_differ(tmp_path: Path) -> None:
    """A head that is narrower than a group has a smaller one, which is not the one that was chosen."""
    net = skd.SuperNet(tiny_vit())
    cut = skd.extract(nested(net, [6, 72, 16, 72]), entry=1)
    again = skd.SuperNet(cut)
    assert [module.group_size for module in again.infos] == [6, 3, 8, 3]
    skd.save(again, tmp_path / "net.safetensors")
    assert [module.group_size for module in skd.load(tmp_path / "net.safetensors").infos] == [6, 3, 8, 3]


@pytest.mark.parametrize(
    ("options", "group", "expected"),
    [
        ({}, None, [8, 3, 8, 3]),
        ({}, 99, [16, 3, 16, 3]),
    ],
    ids=["as published", "more than a head"],
)
def test_other_groups(options: dict[str, Any], group: int | None, expected: list[int]) -> None:
    found = skd.convert(tiny_vit(**options), random_batches(), attention_group=group)
    assert [module.group_size for module in found.infos] == expected


@pytest.mark.parametrize("group", [0, -8, 4.0, True])
def test_others_are_refused(group: Any) -> None:
    with pytest.raises(ValueError, match=f"^attention_group is {group!r}; it must be an int of at least 1"):
        skd.convert(tiny_vit(), random_batches(), attention_group=group)


def test_heads_that_are_not_narrowed() -> None:
    with pytest.warns(UserWarning, match="attention_group is 4; this model has no heads that are narrowed"):
        found = skd.convert(tiny_vit(qk_norm=True), random_batches(), attention_group=4)
    assert [module.group_size for module in found.infos] == [16, 3, 16, 3]
