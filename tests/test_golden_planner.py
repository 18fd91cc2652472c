"""The planner (METHOD 2, steps 3 and 4) on hand-made cases of the published arithmetic.

Where the published behaviour is a defect, the test is named for what happens instead.
"""

import numpy as np
import pytest
from golden_data import document

import skd

CASES = {case["name"]: case["calls"] for case in document("planner_units")["cases"]}
AGREEING = ("decreasing", "nonmonotone", "cross_module_ties", "add_ops_zero")
COMMON = document("planner_units")["common"]
MODULES = tuple(COMMON["module_order"])
FLOOR = 1e-4


def by_kind(attn, mlp):
    return {name: COMMON[attn if name.endswith("attn") else mlp] for name in MODULES}


FULL = by_kind("head_dim", "mlp_hidden")
PRICE = by_kind("attn_dim_MACs", "mlp_dim_MACs")
GROUP = by_kind("attn_group_size", "mlp_group_size")
ALL_MACS = sum(FULL[name] * PRICE[name] for name in MODULES)


def ranked(call, widths=None, **options):
    """Our operations, at the widths of the call unless others are given."""
    widths = {name: (widths or call["end_points_before"])[name] for name in MODULES}
    scores = {name: np.array(call["imp_raw"][name])[: widths[name]] for name in MODULES}
    return skd.rank_operations(scores, call["sensitivity"], PRICE, GROUP, widths, **options)


def start():
    return skd.DropoutList(MODULES, [list(FULL.values())])


def published(call, without=None):
    """[(module, width, macs, score)] in the published order."""
    operations = [
        (op["rank"], name, op["mask_point"], op["MACs"], op["contribution"])
        for name in MODULES
        for op in call["operations"][name]
        if name != without
    ]
    return [operation[1:] for operation in sorted(operations)]


def as_rows(operations, without=None):
    return [(op.module, op.width, op.macs, op.score) for op in operations if op.module != without]


def assert_same(ours, theirs):
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    np.testing.assert_allclose([row[2:] for row in ours], [row[2:] for row in theirs], rtol=1e-12)


def published_list(call):
    tables, entries = call["mask_tables_after"], len(call["op_codes"]) + 1
    return skd.DropoutList(MODULES, [[tables[name][str(i)] for name in MODULES] for i in range(entries)])


def assert_every_entry_removes_something(grown):
    removed = -np.diff(grown.widths, axis=0)
    assert (removed.sum(1) > 0).all()
    assert ((removed > 0).sum(1) == 1).all(), "one module at a time"


@pytest.mark.parametrize("name", AGREEING)
def test_operations(name):
    (call,) = CASES[name]
    assert_same(as_rows(ranked(call)), published(call))


@pytest.mark.parametrize("name", AGREEING)
def test_dropout_list(name):
    (call,) = CASES[name]
    grown = start().extended(ranked(call), call["target_reduction"])
    assert len(grown) == 1 + call["add_ops"]
    assert grown == published_list(call)
    assert grown.removed_macs == pytest.approx(call["accounted_reduction"], abs=1e-12)
    assert_every_entry_removes_something(grown)


def test_target_hit_exactly_is_taken():
    (call,) = CASES["cross_module_ties"]
    grown = start().extended(ranked(call), call["target_reduction"])
    assert grown.removed_macs == call["target_reduction"] == 48.0
    assert len(start().extended(ranked(call), 47.999)) == len(grown) - 1


def test_target_below_the_first_operation_leaves_the_full_network():
    (call,) = CASES["add_ops_zero"]
    grown = start().extended(ranked(call), call["target_reduction"])
    assert grown == start()
    assert len(grown) == 1, "there is always an entry to draw"


def test_negative_sensitivity_is_pruned_first():
    """Published: no operation at all, so the module that hurts can never be dropped."""
    (call,) = CASES["negative_sensitivity"]
    assert call["sensitivity"]["1.mlp"] < 0 and published(call, without="1.mlp") == published(call)
    ours = ranked(call)
    assert_same(as_rows(ours, without="1.mlp"), published(call))
    first = ours[:32]
    assert [(op.module, op.width) for op in first] == [("1.mlp", width) for width in range(124, -1, -4)]
    scores = np.array(call["imp_raw"]["1.mlp"])
    for op in first:
        expected = FLOOR * scores[op.width :].sum() / scores.sum() / ((128 - op.width) * PRICE["1.mlp"])
        assert op.score == pytest.approx(expected, rel=1e-12)
    grown = start().extended(ours, call["target_reduction"])
    assert grown.entry(32) == FULL | {"1.mlp": 0}
    assert grown.removed_macs == pytest.approx(48.0)
    assert_every_entry_removes_something(grown)


def test_zero_sensitivity_gives_entries_that_remove_something():
    """Published: all its scores are zero, its largest cut comes first, and 19 entries remove nothing."""
    call, _ = CASES["zero_sensitivity_cut"]
    assert np.ptp(published_list(call).widths, axis=0).max() == 0 and len(published_list(call)) == 20
    ours = ranked(call)
    assert_same(as_rows(ours, without="1.mlp"), published(call, without="1.mlp"))
    assert all(op.score > 0 for op in ours)
    grown = start().extended(ours, call["target_reduction"])
    assert len(grown) == 20 and grown.removed_macs == 19.0
    assert [grown.entry(i) for i in range(20)] == [FULL | {"1.mlp": 128 - 4 * i} for i in range(20)]


def test_zero_sensitivity_in_a_second_round():
    """The second round goes on from the widths of the first; published entries of both stay in the list."""
    first_call, second_call = CASES["zero_sensitivity_cut"]
    first = start().extended(ranked(first_call), first_call["target_reduction"])
    widths = first.entry(len(first) - 1)
    assert widths["1.mlp"] == 52
    second = first.extended(ranked(second_call, widths), second_call["target_reduction"])
    assert np.array_equal(second.widths[: len(first)], first.widths)
    assert second.entry(len(first) + 12) == FULL | {"1.mlp": 0}
    assert second.removed_macs == 48.0
    assert sum((FULL[m] - w) * PRICE[m] for m, w in second.entry(len(second) - 1).items()) == 48.0
    assert_every_entry_removes_something(second)


def test_zero_scores_become_uniform():
    """Published: 0/0 is NaN and the module has no operation; here every neuron is worth the same."""
    (call,) = CASES["nan_importance"]
    assert not any(call["imp_raw"]["0.mlp"]) and not call["operations"]["0.mlp"]
    ours = ranked(call)
    assert_same(as_rows(ours, without="0.mlp"), published(call))
    uniform = [op for op in ours if op.module == "0.mlp"]
    assert [op.width for op in uniform] == list(range(124, -1, -4)), "equal scores: larger widths first"
    worth = call["sensitivity"]["0.mlp"] / 128 / PRICE["0.mlp"]
    np.testing.assert_allclose([op.score for op in uniform], worth, rtol=1e-12)
    assert [op.macs for op in uniform] == [1.0] * 32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_no_scores_are_refused(bad):
    (call,) = CASES["decreasing"]
    broken = call | {"imp_raw": call["imp_raw"] | {"0.mlp": [bad, *call["imp_raw"]["0.mlp"][1:]]}}
    with pytest.raises(ValueError, match=r"scores of 0\.mlp"):
        ranked(broken)


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_reach_every_target(name):
    """Down to nothing at all: no module is out of the planner's reach."""
    call = CASES[name][0]
    grown = start().extended(ranked(call), ALL_MACS)
    assert set(grown.entry(len(grown) - 1).values()) == {0}
    assert grown.removed_macs == pytest.approx(ALL_MACS)
    assert_every_entry_removes_something(grown)
