"""The contender `published` of benchmarks/accuracy against the golden numbers of the published arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import FULL, MODULES, batches, build, document, start_weights, stored_list
from helpers import digit_data, digit_net, training_config
from rich.console import Console

import skd
from benchmarks.accuracy import published

CASES = {case["name"]: case["calls"] for case in document("planner_units")["cases"]}
COMMON = document("planner_units")["common"]
EPOCHS = [("A_plain", epoch) for epoch in range(5)]  # rounds of A_sgd take the same path, after steps of training


def record(scenario: str, epoch: int) -> Any:
    return document("piad")[scenario]["epochs"][epoch]


def assert_operations(found: list[published.Reduction], expected: Any, modules: tuple[str, ...]) -> None:
    """In the published order; `expected` has those of each module."""
    ranked = sorted((op["rank"], name, op) for name in modules for op in expected[name])
    assert [(modules[op.module], op.width) for op in found] == [(name, op["mask_point"]) for _, name, op in ranked]
    np.testing.assert_allclose([op.macs for op in found], [op["MACs"] for *_, op in ranked], rtol=1e-12)
    contributions = [op["contribution"] for *_, op in ranked]
    np.testing.assert_allclose([op.contribution for op in found], contributions, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_hand_made_cases_with_every_defect(name: str) -> None:
    """Negative and zero sensitivities and scores without a sum as well, which skd mends."""
    modules = tuple(COMMON["module_order"])
    prices, groups = (
        [COMMON[pair[not module.endswith("attn")]] for module in modules]
        for pair in (("attn_dim_MACs", "mlp_dim_MACs"), ("attn_group_size", "mlp_group_size"))
    )
    for number, call in enumerate(CASES[name]):
        before = call["end_points_before"]
        widths = [before[module] for module in modules]
        scores = [np.array(call["imp_raw"][module])[: before[module]] for module in modules]
        sensitivity = [call["sensitivity"][module] for module in modules]
        found = published.reductions(scores, sensitivity, prices, groups)
        assert_operations(found, call["operations"], modules)
        rows = published.grown(widths, found, call["target_reduction"] - call["reduced_before"])
        assert len(rows) == call["add_ops"]
        tables, done = call["mask_tables_after"], len(call["op_codes"]) - len(rows)
        assert done == 0 or number == 1
        for row, entry in zip(rows.tolist(), range(done + 1, done + 1 + len(rows)), strict=True):
            assert row == [tables[module][str(entry)] for module in modules]


def test_entries_that_remove_nothing_are_part_of_it() -> None:
    """As a check of the test above: the case has them."""
    call = CASES["zero_sensitivity_cut"][0]
    assert {tuple(set(table.values())) for table in call["mask_tables_after"].values()} == {(32,), (128,)}


@pytest.mark.parametrize(("scenario", "epoch"), EPOCHS)
def test_one_round_at_the_published_weights(scenario: str, epoch: int) -> None:
    """Accuracies of every batch, sensitivities, operations and the list, from images alone."""
    stored = record(scenario, epoch)
    supernet = skd.SuperNet(build(start_weights(scenario, epoch)))
    current = stored_list(scenario, epoch - 1) if epoch else skd.DropoutList(MODULES, [FULL])
    measured = published.measure(supernet, batches(5, 32), current.widths[-1].tolist())
    np.testing.assert_allclose(100 * measured.accuracy, stored["acc_table"], rtol=1e-12)
    expected = [stored["sensitivity"][name] for name in MODULES]
    np.testing.assert_allclose(measured.sensitivity(), expected, rtol=1e-10, atol=1e-15)
    prices = supernet.costs.planned_per_unit("linear")
    groups = [info.group_size for info in supernet.infos]
    found = published.reductions(measured.scores, measured.sensitivity(), prices, groups)
    in_millions = [op._replace(macs=op.macs / 1e6, contribution=op.contribution * 1e6) for op in found]
    assert_operations(in_millions, stored["operations"], MODULES)
    target = 1e6 * stored["target_reduction_cumulative"]
    grown = published.planner(supernet, batches(5, 32), target, current=current, convention="linear", group=None)
    assert grown == stored_list(scenario, epoch)
    assert published.removed(grown, prices) == pytest.approx(1e6 * stored["reduced_after_by_table"], rel=1e-12)


def test_a_batch_without_a_correct_prediction_leaves_no_operation() -> None:
    """Published: 0/0."""
    measured = published.Measured([np.ones(4)], np.array([[0.0, 0.0], [0.5, 0.25]]))
    assert np.isnan(measured.sensitivity()).all()
    assert published.reductions(measured.scores, measured.sensitivity(), [1.0], [1]) == []


def test_skd_plan_knows_it_inside_the_block_only() -> None:
    net, data = digit_net(), digit_data()[2]
    with published.registered():
        planned = skd.plan(net, data, target=0.5, rounds=2, planner="published", convention="linear")
        training_config(planner="published")
    assert len(planned) > 1
    with pytest.raises(ValueError, match="planner is 'published'"):
        skd.plan(net, data, planner="published")


@pytest.mark.parametrize("never_drawn", [0, 1])
def test_its_steps_are_those_of_skd_but_for_the_smallest_entry(never_drawn: int) -> None:
    """With nothing kept from the draw, the same weights bit for bit."""
    images, _, calibration = digit_data()
    net = digit_net()
    other = copy.deepcopy(net)
    config = training_config(sched_on_updates=True, model_ema=False, mixup=0.0, cutmix=0.0, drop_path=0.0)
    skd.train(net, images, None, config, calibration=calibration, console=Console(quiet=True))
    published.train(other, images, config, calibration, steps=len(images), never_drawn=never_drawn)
    assert other.dropout_list == net.dropout_list or never_drawn
    same = [torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True)]
    assert all(same) if never_drawn == 0 else not all(same)
