"""extract: plain timm modules, logits of every entry, budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_batches, tiny_vit
from torch import nn

import skd


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_entry_is_its_masked_network(dtype: torch.dtype, tolerance: float) -> None:
    batches = random_batches(dtype=dtype)
    supernet = skd.convert(tiny_vit(dtype), batches)
    supernet.dropout_list = skd.plan(supernet, batches, target=1.0, rounds=3)
    images = batches[0][0]
    with torch.no_grad():
        for entry in range(len(supernet.dropout_list)):
            expected = supernet(images, entry=entry)
            found = skd.extract(supernet, entry=entry)(images)
            assert (found - expected).norm() / expected.norm() < tolerance, entry
    assert supernet.dropout_list.widths[-1].tolist() == [0, 0, 0, 0]


def test_the_result_is_plain_timm_and_shares_no_memory(planned: skd.SuperNet) -> None:
    for entry in (0, len(planned.dropout_list) - 1):
        sub = skd.extract(planned, entry=entry)
        modules = {type(module).__module__.split(".")[0] for module in sub.modules()}
        assert modules <= {"timm", "torch"}
        mine = {parameter.data_ptr() for parameter in planned.parameters()}
        assert not mine & {p.data_ptr() for p in sub.parameters() if p.numel()}
        assert sum(p.numel() for p in sub.parameters()) == planned.dropout_list.params[entry]
        assert skd.cost(sub) == skd.cost(planned, entry=entry)


def test_width_zero_keeps_its_place(model: Any, batches: Any) -> None:
    supernet = skd.SuperNet(model)
    full = supernet.widths()
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [full, [0, 0, full[2], full[3]]])
    sub = skd.extract(supernet, entry=1)
    block: Any = sub.blocks[0]
    assert len(sub.blocks) == 2
    assert isinstance(block.attn, torch.fx.GraphModule) and isinstance(block.mlp, torch.fx.GraphModule)
    assert isinstance(block.norm1, nn.Identity) and isinstance(block.norm2, nn.Identity)
    assert not list(block.parameters()) and not block.state_dict()
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    mask = torch.zeros(17, 17, dtype=torch.float64)
    assert all(torch.equal(block(x, **given), x) for given in ({}, {"attn_mask": mask}, {"is_causal": True}))


def test_budgets_take_the_largest_that_fits(planned: skd.SuperNet) -> None:
    dropout_list, full = planned.dropout_list, skd.cost(planned)
    for entry in (0, 3, len(dropout_list) - 1):
        macs, params = int(dropout_list.macs[entry]), int(dropout_list.params[entry])
        assert skd.cost(skd.extract(planned, macs=macs)).macs == macs
        assert skd.cost(skd.extract(planned, params=params)).params == params
        if entry:
            assert skd.cost(skd.extract(planned, macs=int(dropout_list.macs[entry - 1]) - 1)).macs == macs
    assert skd.cost(skd.extract(planned, macs=0.5)).macs <= full.macs / 2
    assert skd.cost(skd.extract(planned, params=0.5)).params <= full.params / 2
    assert skd.cost(skd.extract(planned, macs=1.0)) == full
    linear = skd.cost(planned, convention="linear").macs
    half = skd.extract(planned, macs=linear // 2, convention="linear")
    assert skd.cost(half, convention="linear").macs <= linear // 2


def test_a_budget_below_the_smallest_says_which_is_the_smallest(planned: skd.SuperNet) -> None:
    last = len(planned.dropout_list) - 1
    smallest = int(planned.dropout_list.macs[-1])
    with pytest.raises(ValueError, match=rf"macs is 5, .*smallest sub-network is entry {last} with {smallest:,}"):
        skd.extract(planned, macs=5)
    with pytest.raises(ValueError, match=r"params is 0\.01"):
        skd.extract(planned, params=0.01)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "exactly one of macs, params, entry and latency_ms"),
        ({"macs": 0.5, "entry": 0}, "exactly one"),
        ({"macs": 1.5}, "macs is 1.5; a float is a fraction"),
        ({"macs": 0.0}, "macs is 0.0"),
        ({"macs": -3}, "macs is -3"),
        ({"macs": float("nan")}, "macs is nan"),
        ({"params": "4G"}, "params is '4G'"),
        ({"params": True}, "params is True"),
        ({"entry": 10_000}, "entry is 10000; it may be"),
        ({"macs": 0.5, "convention": "flops"}, "convention is 'flops'"),
    ],
)
def test_bad_choices(planned: skd.SuperNet, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skd.extract(planned, **arguments)


def test_numpy_integers_are_counts(planned: skd.SuperNet) -> None:
    budget = planned.dropout_list.macs[2]
    assert isinstance(budget, np.int64)
    assert skd.cost(skd.extract(planned, macs=budget)).macs == budget


def test_training_mode_and_grad_flags_carry_over(planned: skd.SuperNet) -> None:
    sub = skd.extract(planned.train(), macs=0.5)
    assert all(module.training for module in sub.modules())
    assert all(parameter.requires_grad for parameter in sub.parameters())
    assert not any(module.training for module in skd.extract(planned.eval(), macs=0.5).modules())


def test_an_extracted_model_can_be_converted_again(planned: skd.SuperNet, batches: Any) -> None:
    sub = skd.extract(planned, macs=0.5)
    again = skd.convert(sub, batches)
    images = batches[0][0]
    torch.testing.assert_close(again(images), sub(images), rtol=1e-10, atol=1e-12)
    again.dropout_list = skd.plan(again, batches, rounds=2)
    entry = len(again.dropout_list) - 1
    torch.testing.assert_close(skd.extract(again, entry=entry)(images), again(images, entry=entry))
