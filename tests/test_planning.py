"""importance, rank_operations, DropoutList, plan."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_batches, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import skd

NAMES = ("0.attn", "0.mlp")


def ranked(raw: list[list[float]], **changes: Any) -> list[skd.Operation]:
    """rank_operations of two modules of 4 and 8 units in groups of 2."""
    arguments: dict[str, Any] = {
        "scores": dict(zip(NAMES, raw, strict=True)),
        "sensitivity": {"0.attn": 0.5, "0.mlp": 0.5},
        "macs_per_unit": {"0.attn": 2.0, "0.mlp": 1.0},
        "group_size": {"0.attn": 2, "0.mlp": 2},
        "widths": {"0.attn": 4, "0.mlp": 8},
    }
    return skd.rank_operations(**{**arguments, **changes})


def test_scores_by_hand() -> None:
    operations = ranked([[4, 3, 2, 1], [8, 7, 6, 5, 4, 3, 2, 1]], sensitivity={"0.attn": 1.0, "0.mlp": 1.0})
    by_width = {(op.module, op.width): op for op in operations}
    # attention: tail (2 + 1) / 10 over 2 units of 2 MACs
    assert by_width["0.attn", 2].score == pytest.approx(0.3 / 4)
    assert by_width["0.attn", 0].score == pytest.approx(1.0 / 8)
    assert by_width["0.mlp", 6].score == pytest.approx(3 / 36 / 2)
    assert by_width["0.attn", 2].macs == by_width["0.attn", 0].macs == 4
    assert [(op.module, op.width) for op in operations][:3] == [("0.mlp", 6), ("0.mlp", 4), ("0.attn", 2)]


def test_a_rejected_width_does_not_end_the_walk() -> None:
    operations = ranked([[1, 1, 1, 1], [1, 1, 0, 0, 9, 9, 1, 1]])
    widths = sorted(op.width for op in operations if op.module == "0.mlp")
    assert widths == [0, 6]  # 2 and 4 would drop a richer tail than 0
    by_width = {op.width: op.macs for op in operations if op.module == "0.mlp"}
    assert by_width == {6: 2.0, 0: 6.0}  # 0's own MACs reach to the next kept width


def test_ties_go_by_module_then_larger_width() -> None:
    operations = ranked([[1] * 4, [1] * 8], macs_per_unit={"0.attn": 2.0, "0.mlp": 1.0})
    assert [(op.module, op.width) for op in operations] == [
        ("0.attn", 2), ("0.attn", 0), ("0.mlp", 6), ("0.mlp", 4), ("0.mlp", 2), ("0.mlp", 0),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 70), group=st.integers(1, 12), seed=st.integers(0, 10_000), uniform=st.booleans())
def test_any_plan_is_nested_and_every_operation_removes_something(
    width: int, group: int, seed: int, uniform: bool
) -> None:
    generator = np.random.default_rng(seed)
    widths = {"0.attn": width, "0.mlp": 2 * width + 1}
    scores = {n: np.full(w, 1 / 3) if uniform else generator.random(w) for n, w in widths.items()}
    operations = skd.rank_operations(
        scores, dict.fromkeys(widths, 0.3), dict.fromkeys(widths, 0.1), dict.fromkeys(widths, group), widths
    )
    whole = skd.DropoutList(NAMES, [list(widths.values())])
    total = 0.1 * sum(widths.values())
    grown = whole.extended(operations, total)
    assert grown.widths[-1].tolist() == [0, 0]
    assert len(grown) == len(operations) + 1
    assert (np.diff(grown.widths, axis=0).sum(1) < 0).all()
    assert grown.removed_macs == pytest.approx(total)
    half = whole.extended(operations, total / 2)
    assert half.removed_macs <= total / 2 * (1 + 1e-8)
    assert np.array_equal(half.widths, grown.widths[: len(half)])
    if uniform:  # rounding must not reject a width of equal score
        assert len(operations) == sum(-(-w // group) for w in widths.values())


def test_modules_are_ordered_by_block_number_whatever_the_order_of_the_dicts() -> None:
    names = ["10.attn", "2.mlp", "2.attn"]
    operations = skd.rank_operations(
        {n: [1.0] for n in names}, dict.fromkeys(names, 1), dict.fromkeys(names, 1), dict.fromkeys(names, 1),
        dict.fromkeys(names, 1),
    )  # fmt: skip
    assert [op.module for op in operations] == ["2.attn", "2.mlp", "10.attn"]
    with pytest.raises(ValueError, match="module name is 'head'"):
        skd.rank_operations({}, {}, {}, {}, {"head": 3})


def test_an_exact_hit_is_taken_and_one_more_is_not() -> None:
    operations = ranked([[4, 3, 2, 1], [8, 7, 6, 5, 4, 3, 2, 1]], macs_per_unit={"0.attn": 0.2, "0.mlp": 0.1})
    first_three = sum(op.macs for op in operations[:3])
    whole = skd.DropoutList(NAMES, [[4, 8]])
    assert len(whole.extended(operations, first_three)) == 4
    assert len(whole.extended(operations, first_three * 0.999)) == 3
    assert len(whole.extended(operations, 0.0)) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": {"0.attn": [1] * 4}}, "scores has no module '0.mlp'"),
        ({"scores": {"0.attn": [1] * 3, "0.mlp": [1] * 8}}, r"shape \(3,\); its width is 4"),
        ({"scores": {"0.attn": [-1] * 4, "0.mlp": [1] * 8}}, "negative or non-finite"),
        ({"scores": {"0.attn": [float("nan")] * 4, "0.mlp": [1] * 8}}, "negative or non-finite"),
        ({"macs_per_unit": {"0.attn": 0.0, "0.mlp": 1.0}}, "must be positive"),
        ({"group_size": {"0.attn": 0, "0.mlp": 1}}, "must be positive"),
        ({"sensitivity": {"0.attn": float("nan"), "0.mlp": 1.0}}, "sensitivity of 0.attn is nan"),
        ({"floor": -1.0}, "floor is -1.0"),
    ],
)
def test_rank_operations_rejects(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ranked([[1] * 4, [1] * 8], **changes)


def test_dropout_list_rejects() -> None:
    with pytest.raises(ValueError, match="widths has shape"):
        skd.DropoutList(NAMES, [[1, 2, 3]])
    with pytest.raises(ValueError, match="entry 1 is wider"):
        skd.DropoutList(NAMES, [[4, 8], [5, 8]])
    with pytest.raises(ValueError, match="negative"):
        skd.DropoutList(NAMES, [[4, -8]])
    with pytest.raises(ValueError, match="a name twice"):
        skd.DropoutList(("a", "a"), [[4, 8]])
    whole = skd.DropoutList(NAMES, [[4, 8]])
    with pytest.raises(ValueError, match=r"module '7\.attn'"):
        whole.extended([skd.Operation("7.attn", 0, 1.0, 0.1)], 10)
    with pytest.raises(ValueError, match="it must be below 8"):
        whole.extended([skd.Operation("0.mlp", 8, 1.0, 0.1)], 10)
    with pytest.raises(ValueError, match=r"macs has shape \(2,\)"):
        skd.DropoutList(NAMES, [[4, 8]], macs=[3, 4])
    with pytest.raises(ValueError, match=r"entry is 1; it may be 0\.\.0"):
        whole.entry(1)
    for text in ("[", "{}", "[]", "null"):
        with pytest.raises(ValueError, match="not a dropout list"):
            skd.DropoutList.from_json(text)


def test_json_round_trip_is_integers_only(planned: skd.SuperNet) -> None:
    dropout_list = planned.dropout_list
    text = dropout_list.to_json()

    def only_integers(value: Any) -> bool:
        if isinstance(value, dict | list):
            return all(only_integers(item) for item in (value.values() if isinstance(value, dict) else value))
        return isinstance(value, int | str)

    assert only_integers(json.loads(text))
    back = skd.DropoutList.from_json(text)
    assert back == dropout_list and back.removed_macs == dropout_list.removed_macs
    planned.dropout_list = back
    assert planned.dropout_list.macs.tolist() == json.loads(text)["macs"] == dropout_list.macs.tolist()


def test_plan_reaches_its_target_and_leaves_the_supernet_alone(model: Any, batches: Any) -> None:
    supernet = skd.convert(model, batches)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    grown = skd.plan(supernet, iter(batches), target=0.6, rounds=4)
    assert len(supernet.dropout_list) == 1
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    full = skd.cost(supernet).macs
    assert grown.removed_macs <= 0.6 * full
    # The planner shares a module's MACs evenly over its width; the exact count differs by norms and biases.
    assert 0.38 < grown.macs[-1] / full < 0.6
    assert skd.plan(supernet, batches, target=0.6, rounds=4) == grown


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target": 0}, "target is 0"),
        ({"target": 1.5}, "target is 1.5"),
        ({"rounds": 0}, "rounds is 0"),
        ({"convention": "flops"}, "convention is 'flops'"),
    ],
)
def test_plan_rejects(model: Any, batches: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skd.plan(skd.SuperNet(model), batches, **changes)


def test_skip_passes_with_prefix_reuse_are_the_plain_ones(batches: Any) -> None:
    """Counts from shared prefixes and pooled tokens alone equal those of whole passes, for each pooling."""
    for kwargs in ({}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "map"}, {"reg_tokens": 2}):
        supernet = skd.SuperNet(tiny_vit(**kwargs))
        widths = supernet.widths()
        widths[2] = 0
        _, sensitivity = skd.importance(supernet, batches, widths=widths)
        for index, info in enumerate(supernet.infos):
            assert sensitivity[info.name] == plain_sensitivity(supernet, batches, widths, index), (kwargs, info.name)


@torch.no_grad()
def plain_sensitivity(supernet: skd.SuperNet, batches: Any, widths: list[int], index: int) -> float:
    skipped = [0 if i == index else width for i, width in enumerate(widths)]
    counts = []
    for row in (widths, skipped):
        supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [supernet.widths(), row])
        counts.append(sum(int((supernet(x, entry=1).argmax(-1) == y).sum()) for x, y in batches))
    return max(counts[0] - counts[1], 0.5) / max(counts[0], 1)


def test_importance_frees_what_it_holds_and_restores_the_network(model: Any, batches: Any) -> None:
    supernet = skd.SuperNet(model).train()
    skd.importance(supernet, batches)
    assert supernet.training and all(p.requires_grad and p.grad is None for p in supernet.parameters())


def test_importance_leaves_bad_batches_out(model: Any, batches: Any) -> None:
    supernet = skd.SuperNet(model)
    bad = (torch.full((4, 3, 32, 32), float("nan"), dtype=torch.float64), torch.zeros(4).long())
    with pytest.warns(UserWarning, match="1 were left out"):
        scores, sensitivity = skd.importance(supernet, [bad, *batches])
    expected = skd.importance(supernet, batches)
    assert sensitivity == expected[1]
    assert all(np.array_equal(scores[name], expected[0][name]) for name in scores)
    with pytest.raises(ValueError, match="none has finite statistics"):
        skd.importance(supernet, [bad])


def test_importance_rejects_widths(model: Any) -> None:
    supernet = skd.SuperNet(model)
    with pytest.raises(ValueError, match=r"0\.mlp has 99"):
        skd.importance(supernet, random_batches(), widths=[16, 99, 16, 72])
    with pytest.raises(ValueError, match="2 numbers; the network has 4"):
        skd.importance(supernet, random_batches(), widths=[16, 72])
