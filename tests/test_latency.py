"""Latency as a budget: the table, its predictions and flags, what it chooses, and how it is measured.

Nothing is timed: tables are made by hand, and a clock that counts multiplications stands in for the real one. They
are a sum over modules that are linear in the width, so that a table must predict them exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import digit_net, nested, noted, tiny_vit, with_twenty_one_entries
from test_readme import snippet
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import skd
from benchmarks import latency as measurement
from benchmarks.result import Info, split
from skd.benchmark import benchmark
from skd.export import read_manifest
from skd.latency import Architecture, Curve, agreement
from skd.latency_measuring import _grid, _shapes, fit, thinned
from skd.support.clocks import Conditions, Timing, dtype_named, in_turn, threads_of

PAGE = Path(__file__).parents[1] / "docs" / "LATENCY.md"
HERE = Conditions("cpu", "a processor", "float32", 1, 1, "2.14", "1.0.31", "0.1.0", "2026-11-28")


def table_of(net: skd.SuperNet, **changes: Any) -> skd.LatencyTable:
    """Attention takes 1 ms at half its width and 3 at all of it, an MLP 2 and 5; 4 ms more, and twice that plus 1."""
    attention, mlp = net.infos[0].full_width, net.infos[1].full_width
    curves = (
        Curve(net.modules_in_order[::2], (0, attention // 2, attention), (0.0, 1.0, 3.0), (0.0, 0.1, 0.1)),
        Curve(net.modules_in_order[1::2], (0, mlp // 2, mlp), (0.0, 2.0, 5.0), (0.0, 0.1, 0.1)),
    )
    table = skd.LatencyTable(Architecture.of(net), HERE, 15, curves, skipped_ms=4.0, scale=2.0, offset_ms=1.0)
    return replace(table, **changes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small tensors gain nothing from threads, which wait for each other on a busy machine."""
    with threads_of(1):
        yield


@pytest.fixture
def counted() -> Iterator[Any]:
    """A clock by which a million multiplications of linear layers and convolutions take a second."""
    seconds = [0.0]

    def count(layer: Any, inputs: Any, output: Any) -> None:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            seconds[0] += output.numel() * layer.weight[0].numel() / 1e6

    hook = register_module_forward_hook(count)
    yield lambda: seconds[0]
    hook.remove()


# The table


def test_an_entry_is_the_sum_of_its_modules_on_the_scale_of_whole_networks() -> None:
    net = nested(digit_net(), [8, 6, 16, 24], [0, 0, 12, 0])
    table = table_of(net)
    full, half, smallest = 2 * (4 + 3 + 5 + 3 + 5) + 1, 2 * (4 + 1 + 1 + 3 + 5) + 1, 2 * (4 + 0 + 0 + 2 + 0) + 1
    assert table.predict(net).tolist() == [full, half, smallest]
    assert table.predict(net, 1).tolist() == [half] and table.predict(net, [2, 0]).tolist() == [smallest, full]
    with pytest.raises(ValueError, match="entry is 3"):
        table.predict(net, 3)
    for widths in ([8, 6, 16], [[8, 6, 16, 24, 0]], 8):
        with pytest.raises(
            ValueError, match=r"widths has shape .*; its last axis must have one for each of 4 modules"
        ):
            table.at(widths)


def test_a_table_is_of_one_architecture() -> None:
    net = digit_net()
    table = table_of(net)
    other = digit_net()
    other.model.pretrained_cfg["architecture"] = "another name"
    assert table.predict(other).tolist() == table.predict(net).tolist()
    for changed in (digit_net(depth=1), digit_net(num_classes=11), digit_net(img_size=16), digit_net(mlp_ratio=2)):
        with pytest.raises(ValueError, match=r"latency is a table of .* modules, .* this super-network is"):
            table.predict(changed)
    with pytest.raises(ValueError, match="it must be a SuperNet"):
        table.check(net.model)


def test_a_table_can_be_written_and_read(tmp_path: Path) -> None:
    net = digit_net()
    slow = Curve(net.modules_in_order[::2], (0, 8, 16), (0.0, 4.0, 3.0), (0.0, 0.2, 0.3))
    table = table_of(net, curves=(slow, table_of(net).curves[1]))
    table.save(tmp_path / "table.json")
    assert skd.LatencyTable.load(tmp_path / "table.json") == table
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["curves"][0]["flags"] == [{"width": 8, "ms": 4.0, "than": 16, "than_ms": 3.0}]
    assert written["conditions"]["batch_size"] == 1 and written["curves"][1]["flags"] == []
    with pytest.raises(ValueError, match="cannot be written"):
        table.save(tmp_path / "nowhere" / "table.json")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    net, file = digit_net(), tmp_path / "table.json"
    good = table_of(net).to_dict()
    for bad, told in (
        ({**good, "version": 9}, "its version is 9"),
        ({**good, "curves": good["curves"][:1]}, "every module of the architecture once"),
        ({**good, "scale": -1.0}, "scale above 0"),
        ({**good, "skipped_ms": math.nan}, "times must be finite"),
        ({**good, "curves": [{**good["curves"][0], "widths": [0, 16, 8]}]}, "must ascend from 0"),
        ({**good, "curves": [{**good["curves"][0], "ms": [0.0]}]}, "as many widths as times"),
        *(
            (
                {**good, name: [{"widths": [1], "ms": 1.0, "sum_ms": 1.0}]},
                f"{name} must have a width for each of the 4",
            )
            for name in ("whole", "checked")
        ),
        (
            {**good, "architecture": {**good["architecture"], "full_widths": [16]}},
            "full_widths must have a width for",
        ),
        ({"version": 1}, "KeyError"),
        ([], "TypeError"),
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=f"is not a table that skd latency wrote: .*{told}"):
            skd.LatencyTable.load(file)
    with pytest.raises(ValueError, match="No such file"):
        skd.LatencyTable.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("ms", "spread", "flagged"),
    [
        ((0.0, 1.0, 2.0, 3.0, 4.0), 0.1, []),
        ((0.0, 2.5, 2.0, 3.0, 4.0), 0.1, [(8, 16)]),  # slower than a wider one
        ((0.0, 2.5, 2.0, 3.0, 4.0), 0.3, []),  # but not beyond the spread of both
        ((0.0, 3.4, 3.3, 3.0, 4.0), 0.1, [(8, 24), (16, 24)]),  # the quickest of the wider ones is named
        ((0.0, 1.0, 2.6, 3.0, 4.0), 0.1, [(16, None)]),  # far above the line from 1 to 3
        ((0.0, 1.0, 2.6, 3.0, 4.0), 0.25, []),
        ((0.0, 1.0, 2.15, 3.0, 4.0), 0.0, []),  # above it, but by less than a tenth
        ((0.0, 1.6, 2.0, 3.0, 4.0), 0.0, []),  # the line from width 0 says nothing
    ],
)
def test_widths_that_a_device_does_not_like_are_flagged(ms: Any, spread: float, flagged: Any) -> None:
    curve = Curve(("0.mlp",), (0, 8, 16, 24, 32), ms, (0.0, *[spread] * 4))
    assert [(flag.width, flag.than) for flag in curve.flags] == flagged


def test_agreement() -> None:
    error, rank = agreement([1.1, 2.0, 2.7, 4.0], [1.0, 2.0, 3.0, 5.0])
    assert error == pytest.approx(0.1) and rank == pytest.approx(1)
    # Spearman's formula for ranks without ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
    assert agreement([2, 1, 3, 4], [1, 2, 3, 4])[1] == pytest.approx(1 - 6 * 2 / 60)
    tied = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3, 4])[0, 1]
    assert agreement([1, 1, 3, 9], [1, 2, 3, 4])[1] == pytest.approx(tied)
    assert math.isnan(agreement([1.0], [1.0])[1])


# As a budget


def test_the_first_entry_within_the_latency_is_taken(tmp_path: Path) -> None:
    net = with_twenty_one_entries()
    table = table_of(net)
    predicted = table.predict(net)
    for entry in (0, 7, 20):
        budget = float(predicted[entry])
        assert skd.cost(skd.extract(net, latency_ms=budget, latency=table)) == skd.cost(net, entry=entry)
        between = budget + 1e-6
        assert skd.cost(skd.extract(net, latency_ms=between, latency=table)) == skd.cost(net, entry=entry)
    (member,) = skd.export(net, tmp_path / "one", latency_ms=float(predicted[7]), latency=table)
    assert member["entry"] == 7 and member["latency_ms"] == predicted[7]
    skd.save(net, tmp_path / "net.safetensors")
    family = skd.Family(tmp_path / "net.safetensors")
    assert family.at(latency_ms=float(predicted[7]), latency=table).entry == 7
    with pytest.raises(ValueError, match="there is no table"):
        family.at(latency_ms=1.0)
    # A larger entry that is quicker goes before a smaller one that is slower.
    slow = replace(table.curves[0], ms=(0.0, 9.0, 3.0))
    jagged = replace(table, curves=(slow, table.curves[1]))
    assert jagged.predict(net)[0] < jagged.predict(net)[7]
    best = float(jagged.predict(net)[0])
    assert skd.cost(skd.extract(net, latency_ms=best, latency=jagged)) == skd.cost(net)


def test_the_manifest_of_a_family_has_latencies(tmp_path: Path) -> None:
    net = with_twenty_one_entries(torch.float32)
    table = table_of(net)
    members = skd.export(net, tmp_path / "out", shares=[1.0, 0.8], latency=table)
    assert members == read_manifest(tmp_path / "out")
    assert [member["latency_ms"] for member in members] == [
        table.predict(net, member["entry"])[0] for member in members
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"latency_ms": 5.0}, "latency_ms is 5.0, but there is no table"),
        ({"latency_ms": 5.0, "latency": "table.json"}, "latency is a str"),
        *(
            ({"latency_ms": bad}, f"latency_ms is {bad!r}; it must be a pos")
            for bad in (0, -1, math.inf, math.nan, "5", True)
        ),
        ({"latency_ms": 50.0, "macs": 0.5}, "exactly one of"),
        ({"latency_ms": 50.0, "entry": 0}, "exactly one of"),
        (
            {"latency_ms": 1.0},
            r"latency_ms is 1\.0; the fastest of this list is entry 2, predicted to take 9 ms on a proc",
        ),
    ],
)
def test_bad_latencies(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    net = nested(digit_net(), [8, 6, 16, 24], [0, 0, 0, 0])
    given = given if "no table" in told or "latency" in given else {**given, "latency": table_of(net)}
    for refuses in (lambda: skd.extract(net, **given), lambda: skd.export(net, tmp_path / "out", **given)):
        with pytest.raises(ValueError, match=told):
            refuses()
    assert not list(tmp_path.iterdir())


def test_a_table_of_another_network_or_without_use_is_refused(tmp_path: Path) -> None:
    net, other = digit_net(), table_of(digit_net(depth=1))
    for refuses in (
        lambda: skd.extract(net, latency_ms=50, latency=other),
        lambda: skd.export(net, tmp_path / "out", latency_ms=50, latency=other),
        lambda: skd.export(net, tmp_path / "out", entry=0, latency=other),
        lambda: skd.plan(net, [], latency_ms=50, latency=other),
    ):
        with pytest.raises(ValueError, match="latency is a table of"):
            refuses()
    with pytest.raises(ValueError, match="latency is given with entry"):
        skd.extract(net, entry=0, latency=table_of(net))
    with pytest.raises(ValueError, match="latency is a table, with a plain model"):
        skd.export(net.model, tmp_path / "out", latency=table_of(net))
    with pytest.raises(ValueError, match="the full network alone"):
        skd.extract(net, latency_ms=1.0, latency=table_of(net))


@pytest.mark.parametrize("planner", ["paper", "loss"])
def test_a_plan_ends_at_the_first_entry_within_the_latency(planner: str, batches: Any) -> None:
    net = skd.SuperNet(tiny_vit())
    table = table_of(net)
    full, least = float(table.predict(net)[0]), float(table.at([0, 0, 0, 0]))
    for share in (0.8, 0.3, 0.0):
        budget = least + share * (full - least)
        grown = skd.plan(net, batches, latency_ms=budget, latency=table, rounds=2, planner=planner)
        predicted = table.at(grown.widths)
        assert predicted[-1] <= budget < predicted[:-1].min() and len(grown) > 2
        assert grown.widths[0].tolist() == net.widths() and grown.macs is not None
        net.dropout_list = grown
        assert skd.cost(skd.extract(net, latency_ms=budget, latency=table)) == skd.cost(net, entry=len(grown) - 1)
        net.dropout_list = skd.DropoutList(net.modules_in_order, [net.widths()])


def test_a_list_that_is_cut_short_counts_what_it_removed() -> None:
    net = skd.SuperNet(tiny_vit())
    full, half = net.widths(), [net.widths()[0] // 2, *net.widths()[1:]]

    def at_once(supernet: Any, batches: Any, target: float, *, current: Any, convention: str, group: Any) -> Any:
        rows = [full, half, [0, 0, 0, 0]]
        return replace(skd.DropoutList(current.modules, rows, costs=current.costs), sensitivity={"0.attn": 1.0})

    table = table_of(net)
    budget = float(table.at(half))
    grown = skd.plan(net, [], latency_ms=budget, latency=table, rounds=1, planner=at_once, convention="linear")
    assert grown.widths.tolist() == [full, half] and grown.sensitivity is None
    sizes = net.costs.macs([full, half], "linear")
    assert grown.removed_macs == sizes[0] - sizes[1] != grown.macs[0] - grown.macs[1]


def test_a_plan_says_which_latency_it_cannot_reach(batches: Any) -> None:
    net = skd.SuperNet(tiny_vit())
    table = table_of(net)
    with pytest.warns(UserWarning, match=r"latency_ms is 8\.9, which cannot be had: .*no MLP left, .*take 9 ms on a"):
        grown = skd.plan(net, batches, latency_ms=8.9, latency=table, rounds=2)
    assert grown.widths[-1].tolist() == [0, 0, 0, 0]
    kept = {"keep": {"0.mlp": 36}, "exclude": ["1.attn"]}
    with pytest.warns(UserWarning, match=r"latency_ms is 10, .*that keep and exclude allow, .*take 19 ms"):
        grown = skd.plan(net, batches, latency_ms=10, latency=table, rounds=2, **kept)
    assert grown.widths[-1].tolist() == [0, 36, 16, 0]
    with pytest.warns(UserWarning, match="latency_ms is 41; the full network is predicted to take 41 ms"):
        assert len(skd.plan(net, batches, latency_ms=41, latency=table)) == 1
    for given, told in (
        ({"target": 0.5, "latency_ms": 20, "latency": table}, r"target is 0\.5 and latency_ms 20"),
        ({"latency_ms": 20}, "there is no table"),
        ({"latency": table}, "latency is given without latency_ms"),
        ({"latency_ms": -1, "latency": table}, "latency_ms is -1"),
    ):
        with pytest.raises(ValueError, match=told):
            skd.plan(net, batches, **given)


# Measuring


def test_calls_take_turns_and_their_medians_count() -> None:
    log, now = list[str](), [0.0]

    def call(name: str, *seconds: float) -> Any:
        left = iter([0.0, 0.0, *seconds])  # it is called twice before the first round

        def run() -> None:
            log.append(name)
            now[0] += next(left)

        return run

    calls = {"a": call("a", 1, 2, 9, 3, 4), "b": call("b", 5, 5, 5, 5, 5)}
    found = in_turn(calls, 5, torch.device("cpu"), timer=lambda: now[0])
    assert found == {"a": Timing(3000.0, 2000.0), "b": Timing(5000.0, 0.0)}
    rounds = [log[index : index + 2] for index in range(4, 14, 2)]
    assert log[:4] == ["a", "a", "b", "b"] and all(sorted(one) == ["a", "b"] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 2  # not always the same first
    assert Timing.of([2.0]) == Timing(2.0, 0.0)


def test_the_device_that_is_timed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[Any]()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *device: waited.append(device))
    in_turn({"a": list}, 1, torch.device("cuda:1"))
    assert waited == [(torch.device("cuda:1"),)] * 2
    skd.measure_latency(digit_net(depth=1), rounds=1, device="cpu")
    assert len(waited) == 2


@pytest.mark.parametrize("planned", [True, False])
def test_a_table_predicts_what_is_linear_in_the_widths_exactly(planned: bool, counted: Any) -> None:
    net = with_twenty_one_entries(torch.float32)
    rows, listed = net.dropout_list.widths, net.dropout_list
    if not planned:
        net.dropout_list = skd.DropoutList(net.modules_in_order, [net.widths()])
    table = skd.measure_latency(net, batch_size=2, rounds=1, check=[5, 20, 3, 5] if planned else [], timer=counted)
    if planned:
        # The smallest, 20, is one of those that the table is fitted to.
        assert [one.widths for one in table.checked] == [tuple(net.widths(5)), tuple(net.widths(3))]
        assert table.agreement == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert [curve.modules for curve in table.curves] == [("0.attn", "1.attn"), ("0.mlp", "1.mlp")]
    occurring = {0, 16, *rows[:, 0].tolist(), *rows[:, 2].tolist()}
    assert set(table.curves[0].widths) == (occurring if planned else {0, 8, 16})
    net.dropout_list = listed
    times, conditions = benchmark(net, [20, 5, 13], batch_size=2, rounds=1, latency=table, timer=counted)
    assert [row["entry"] for row in times] == [0, 20, 5, 13]
    assert max(abs(row["error"]) for row in times) < 1e-9 and times[0]["ms"] > times[1]["ms"] > 0
    assert times[1]["speedup"] == pytest.approx(times[0]["ms"] / times[1]["ms"]) and conditions == table.conditions
    assert table.scale == pytest.approx(1) and table.offset_ms == pytest.approx(0, abs=1e-9)
    assert len(table.whole) >= 3 and not table.flags


@pytest.mark.parametrize(
    ("name", "more", "shared"),
    [
        ("eva02_tiny_patch14_224", {}, "rope"),
        (
            "beit_base_patch16_224",
            {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
            "shared_rel_pos_bias",
        ),
        ("vit_tiny_patch16_224", {}, None),
    ],
)
def test_every_family_can_be_measured(
    name: str, more: dict[str, Any], shared: str | None, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What blocks share, such as rotary positions, reaches blocks that are timed alone; weights may be bfloat16."""
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **size, **more)
    net, kind, given = skd.SuperNet(model), type(model.blocks[0]), list[Any]()

    forward = kind.forward

    def noting(block: Any, *inputs: Any, **keywords: Any) -> Any:
        given.append(keywords.get(shared))
        return forward(block, *inputs, **keywords)

    monkeypatch.setattr(kind, "forward", noting)
    table = skd.measure_latency(net, dtype="bfloat16", rounds=1, timer=counted)
    assert len(given) > 50 and all((own is None) == (shared is None) for own in given)
    net = nested(net, [info.full_width if info.kind == "mlp" else 0 for info in net.infos])
    times, _ = benchmark(net, [1], dtype=torch.bfloat16, rounds=1, latency=table, timer=counted)
    assert max(abs(row["error"]) for row in times) < 1e-6 and table.conditions.dtype == "bfloat16"


def test_modules_are_timed_on_all_tokens() -> None:
    """Also where the super-network is in training mode, in which it drops patches."""
    net, seen = digit_net(depth=1, patch_drop_rate=0.5).train(), set[int]()

    def note(layer: Any, inputs: Any, output: Any) -> None:
        if isinstance(layer, Block):
            seen.add(output.shape[1])

    hook = register_module_forward_hook(note)
    try:
        skd.measure_latency(net, rounds=1)
    finally:
        hook.remove()
    assert len(seen) == 1 and all(module.training for module in net.modules())


def test_modules_of_one_shape_are_timed_once() -> None:
    net = with_twenty_one_entries()
    assert [len(modules) for modules in _shapes(net)] == [2, 2]
    cut = skd.SuperNet(skd.extract(net, entry=5))  # of blocks that differ
    assert [len(modules) for modules in _shapes(cut)] == [1, 1, 1, 1]
    skipped = skd.SuperNet(skd.extract(net, entry=20))
    table = skd.measure_latency(skipped, rounds=1)
    assert table.curves[0].widths == (0,) and table.at(skipped.widths()) > 0


def test_the_grid_has_round_widths_and_the_next_ones() -> None:
    assert _grid(64, 8) == [0, 8, 16, 24, 32, 40, 48, 56, 64]
    assert _grid(768, 8) == sorted({*range(0, 769, 64), *range(8, 768, 64)})
    assert _grid(12, 12) == [0, 12]
    assert thinned(range(100), 4) == [0, 33, 66, 99] and thinned([0, 3], 4) == [0, 3]


def test_the_fit_to_whole_networks() -> None:
    sums = np.array([10.0, 6.0, 2.0])
    assert fit(sums, 1.5 * sums + 4) == (pytest.approx(1.5), pytest.approx(4))
    assert fit(sums, np.array([1.0, 2.0, 3.0])) == (1 / 3, 0.0)  # no line falls
    assert fit(np.array([10.0, 9.9, 9.8]), np.array([20.0, 19.0, 21.0])) == (2.0, 0.0)  # too near to each other
    negative = np.array([10.0, 9.0, 8.0, 1.0]), np.array([10.0, 5.0, 0.1, 1000.0])
    scale, offset = np.polyfit(*negative, 1, w=1 / negative[1])
    assert scale > 0 > scale + offset and fit(*negative) == (pytest.approx(7 / 9), 0.0)


def test_compiled_networks_are_timed_beside_the_others(monkeypatch: pytest.MonkeyPatch, counted: Any) -> None:
    """Stands in for torch.compile: it makes a network run three times."""

    def three_times(network: Any, dynamic: bool) -> Any:
        return lambda images: [network(images) for _ in range(3)]

    monkeypatch.setattr(torch, "compile", three_times)
    rows, _ = benchmark(with_twenty_one_entries(), [4], dtype="float64", rounds=1, compiled=True, timer=counted)
    assert all(row["compiled_ms"] == pytest.approx(3 * row["ms"]) for row in rows)
    assert rows[1]["compiled_speedup"] == pytest.approx(rows[1]["speedup"])


def test_every_network_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts the graphs of a function, not of a network, and would leave the ninth network as it is."""
    backend, graphs = noted("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    net = digit_net(depth=1)
    net = nested(net, *([16, 24 - step] for step in range(1, 10)))
    benchmark(net, range(10), rounds=1, compiled=True)
    assert len(graphs) == 10
    torch.compiler.reset()


def test_settings_are_checked_and_given_back() -> None:
    net = digit_net()
    before = torch.get_num_threads()
    with threads_of(before + 1) as used:
        assert used == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before and dtype_named("torch.float16") is torch.float16
    table = skd.measure_latency(net, rounds=1, threads=1)
    for given, told in (
        ({"batch_size": 0}, "batch_size is 0; it must be an int of at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it may be one of"),
        ({"device": "nonsense"}, "device is 'nonsense'"),
        ({"check": 3}, "check is 3; it must be a list of entries"),
    ):
        with pytest.raises(ValueError, match=told):
            skd.measure_latency(net, **given)
    with pytest.raises(ValueError, match="batch_size is 2, but the table was measured with 1"):
        benchmark(net, [0], batch_size=2, threads=1, latency=table)
    with pytest.raises(ValueError, match="it must be a SuperNet"):
        skd.measure_latency(net.model)
    assert torch.get_num_threads() == before


# The page


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"skd": skd, "supernet": skd.SuperNet(tiny_vit(torch.float32)), "calibration": []}
    names["calibration"] = [(images.float(), labels) for images, labels in batches]
    exec(compile(snippet(PAGE.read_text(), "latency"), "LATENCY.md", "exec"), names)
    assert names["table"].predict(names["supernet"])[-1] <= names["budget"]
    assert skd.cost(names["fast"]) == skd.cost(names["supernet"], entry=len(names["supernet"].dropout_list) - 1)


def test_the_table_of_the_page_is_that_of_the_committed_result() -> None:
    document = Info(json.loads((PAGE.parents[1] / "benchmarks" / "results" / "latency-cpu.json").read_text()))
    command = "run: python -m benchmarks.latency --table RESULT --write docs/LATENCY.md"
    assert split(PAGE.read_text(), measurement.BEGIN, measurement.END)[1] == measurement.section(document), command
    for run in document.part("results").values():
        rows = [(row["latency_ms"], row["ms"]) for row in run["subnetworks"]]
        assert agreement(*zip(*rows, strict=True)) == (run["median_error"], run["rank_correlation"])
        table = skd.LatencyTable.from_dict(run["table"])
        assert table.agreement == (run["median_error"], run["rank_correlation"])
        assert len(rows) >= 12 and len(table.whole) == 4 and table.conditions.threads == 1


def test_the_measurement_compares_networks_that_the_table_was_not_fitted_to() -> None:
    net = with_twenty_one_entries(torch.float32)
    found = measurement.measured(net, 1, 8, 1)
    fitted = {whole["widths"] for whole in found["table"]["whole"]}
    assert [one["ms"] for one in found["subnetworks"]] == [one["ms"] for one in found["table"]["checked"]]
    entries = [row["entry"] for row in found["subnetworks"]]
    assert len(fitted) == 4 and not fitted & {tuple(net.widths(entry)) for entry in entries} and len(entries) >= 4
    assert measurement.table_of(Info({"batch 1": found})).count("\n") == len(entries) + 3


# The commands


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from skd.cli import main

    monkeypatch.chdir(tmp_path)
    net = with_twenty_one_entries(torch.float32)
    skd.save(net, "net.safetensors")
    place = ["--supernet", "net.safetensors", "--json", "out.json"]

    def document() -> Any:
        return json.loads(Path("out.json").read_text())

    settings = ["--rounds", "1", "--threads", "1", "--batch-size", "2"]
    assert main(["latency", *place, "--out", "real.json", "--entries", "9,5", "--check", *settings]) == 0
    assert "measured on " in capsys.readouterr().out
    real = skd.LatencyTable.load("real.json")
    assert [one.widths for one in real.checked] == [tuple(net.widths(entry)) for entry in (9, 5)]
    assert document()["table"] == json.loads(Path("real.json").read_text()) and real.conditions.batch_size == 2
    assert main(["benchmark", *place, "--latency-table", "real.json", "--entries", "9,20", "--rounds", "2"]) == 0
    found = document()
    said = capsys.readouterr().out
    assert "median error" in said and "the table was measured on" not in said
    assert found["conditions"]["batch_size"] == 2
    assert [row["entry"] for row in found["subnetworks"]] == [0, 9, 20] and found["rounds"] == 2
    pairs = [(row["latency_ms"], row["ms"]) for row in found["subnetworks"]]
    assert agreement(*zip(*pairs, strict=True)) == (found["median_error"], found["rank_correlation"])

    table = table_of(net)
    table.save("table.json")
    table_of(digit_net(depth=1)).save("other.json")
    assert main(["benchmark", *place, "--latency-table", "table.json", "--entries", "20", "--rounds", "1"]) == 0
    assert "the table was measured on a processor, 1 thread" in capsys.readouterr().out
    budget = float(table.predict(net)[9])
    within = ["--latency-ms", str(budget), "--latency-table", "table.json"]
    assert main(["latency", *place, "--latency-table", "table.json", "--entries", "9"]) == 0
    assert document()["subnetworks"][1]["latency_ms"] == budget
    assert main(["extract", *place, *within, "--out", "cut.safetensors"]) == 0
    assert document()["entry"] == 9 and document()["latency_ms"] == budget
    assert main(["export", *place, *within, "--out", "one"]) == 0
    assert document()["members"][0]["latency_ms"] == budget and "predicted to take" in capsys.readouterr().out
    assert main(["export", *place, "--all", "1,0.8", "--latency-table", "table.json", "--out", "all"]) == 0
    assert [member["latency_ms"] is not None for member in read_manifest("all")] == [True, True]
    mistakes: list[tuple[list[str], str]] = [
        (["extract", "--out", "x", "--latency-ms", "9"], "it needs --latency-table FILE"),
        (["extract", "--out", "x", "--latency-ms", "nan", *within[2:]], "latency_ms is nan"),
        (["extract", "--out", "x", "--latency-ms", "0.5", *within[2:]], "the fastest of this list is entry 20"),
        (["extract", "--out", "x", "--entry", "0", "--latency-table", "other.json"], "latency is a table of"),
        (["export", "--out", "x", "--entry", "0", "--latency-table", "net.safetensors"], "is not a table"),
        (["latency", "--latency-table", "table.json", "--check"], "--check is given with --latency-table"),
        (["latency", "--latency-table", "table.json", "--rounds", "3"], "--rounds is given with --latency-table"),
        (["benchmark", "--latency-table", "table.json", "--dtype", "float64"], "dtype is 'float64', but the table"),
        (["benchmark", "--entries", "21"], "entry is 21"),
        (["latency", "--out", "nowhere/t.json"], "--out is 'nowhere/t.json'"),
    ]
    for (command, *more), told in mistakes:
        assert main([command, "--supernet", "net.safetensors", *more]) == 2, told
        assert told in capsys.readouterr().err
    assert not Path("x").exists()
    monkeypatch.setattr(skd, "measure_latency", lambda *_, **__: table)
    assert main(["latency", *place, "--out", "fitted.json", "--entries", "20", "--check"]) == 0
    assert "nothing to check" in capsys.readouterr().out


def test_plan_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from skd.cli import main

    monkeypatch.chdir(tmp_path)
    net = digit_net()
    skd.save(net, "net.safetensors")
    table_of(net).save("table.json")
    common = [
        "plan",
        "--supernet",
        "net.safetensors",
        "--data",
        "digits",
        "--calibration-images",
        "16",
        "--workers",
        "0",
    ]
    common += ["--rounds", "2", "--out", "planned.safetensors", "--json", "out.json"]
    assert main([*common, "--latency-ms", "25", "--latency-table", "table.json"]) == 0
    rows = json.loads(Path("out.json").read_text())["subnetworks"]
    assert rows[0]["latency_ms"] == 41 and rows[-1]["latency_ms"] <= 25
    planned = skd.load("planned.safetensors")
    assert table_of(net).predict(planned)[-1] == rows[-1]["latency_ms"]
    table_of(digit_net(depth=1)).save("other.json")
    assert main([*common, "--latency-table", "other.json", "--out", "refused.safetensors"]) == 2
    assert "latency is a table of" in capsys.readouterr().err and not Path("refused.safetensors").exists()
    assert main([*common, "--latency-ms", "25"]) == 2 and "it needs --latency-table" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [3, -1, 1.5])
def test_what_is_no_entry_is_not_timed(entry: Any) -> None:
    with pytest.raises(ValueError, match=f"entry is {entry}"):
        benchmark(nested(digit_net(), [8, 6, 16, 24], [0, 0, 12, 0]), [1, entry])
