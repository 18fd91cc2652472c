"""plan(keep=, exclude=): what no planner narrows, what that does to the target, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import digit_data, digit_net, random_batches, run_training, tiny_vit, training_config

import skd
from skd.planners import loss, names


@pytest.mark.parametrize("planner", names())
def test_every_planner_keeps_to_them(planner: str) -> None:
    """Down to the limits and no further; the others go below, and the unreachable target is said."""
    net, batches = digit_net(), digit_data()[2]
    with pytest.warns(UserWarning, match="at the smallest widths that keep and exclude allow, still has"):
        planned = skd.plan(
            net, batches, target=0.95, rounds=3, planner=planner, keep={"0.mlp": 5}, exclude=["1.attn"]
        )
    smallest = planned.entry(len(planned) - 1)
    assert smallest == {"0.attn": 0, "0.mlp": 5, "1.attn": net.infos[2].full_width, "1.mlp": 0}
    assert (np.diff(planned.widths, axis=0).sum(1) < 0).all()  # no entry twice
    net.dropout_list = planned
    removed = planned.removed_macs / sum(
        price * (full - width)
        for price, full, width in zip(
            net.costs.planned_per_unit("full"), planned.widths[0], planned.widths[-1], strict=True
        )
    )
    assert removed == pytest.approx(1)


def test_a_module_that_is_all_or_nothing_keeps_all() -> None:
    net = skd.SuperNet(tiny_vit(qk_norm=True))
    planned = skd.plan(net, random_batches(), target=0.5, rounds=2, keep={"0.attn": 1})
    assert set(planned.widths[:, 0]) == {16}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"keep": {"9.mlp": 1}}, "keep has '9.mlp'"),
        ({"exclude": ["head"]}, "exclude has 'head'"),
        ({"exclude": "0.mlp"}, "exclude '0.mlp'"),
        ({"exclude": None}, "exclude None"),
        ({"exclude": [["0.mlp"]]}, "list names"),
        ({"keep": []}, "keep is"),
        ({"keep": ["0.mlp"]}, "keep is"),
        ({"keep": {"0.mlp": 99}}, r"keep has 99 for 0.mlp; it must be a width in 0..24"),
        ({"keep": {"0.mlp": 0.5}}, "keep has 0.5"),
    ],
)
def test_mistakes(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skd.plan(digit_net(), digit_data()[2], rounds=1, **given)


def test_a_planner_that_does_not_keep_to_them_is_refused() -> None:
    """In any round, though the list that it makes does not know the limits."""

    def own(net: Any, batches: Any, target: float, /, *, current: Any, convention: str, group: Any) -> Any:
        nothing = current.widths[-1].copy()
        nothing[len(current) % 4] = 0
        return skd.DropoutList(current.modules, [*current.widths, nothing])

    with pytest.raises(ValueError, match=r"narrows 0.mlp to 0; it must keep"):
        skd.plan(digit_net(), digit_data()[2], planner=own, rounds=1, keep={"0.mlp": 5})
    with pytest.raises(ValueError, match=r"narrows 1.mlp to 0; it must keep"):
        skd.plan(digit_net(), digit_data()[2], planner=own, rounds=3, exclude=["1.mlp"])


def test_they_hold_in_files_and_in_a_training_that_goes_on_from_the_plan(tmp_path: Path) -> None:
    net = digit_net()
    net.dropout_list = skd.plan(net, digit_data()[2], target=0.3, rounds=1, exclude=["1.attn"], keep={"0.mlp": 5})
    skd.save(net, tmp_path / "net.safetensors")
    net = skd.load(tmp_path / "net.safetensors")
    planned = net.dropout_list
    assert planned.least == {"0.mlp": 5, "1.attn": net.infos[2].full_width}
    run_training(net, training_config(target=0.9, checkpoint_steps=0))
    narrowest = net.dropout_list.entry(len(net.dropout_list) - 1)
    assert len(net.dropout_list) > len(planned)
    assert narrowest["1.attn"] == net.infos[2].full_width and narrowest["0.mlp"] >= 5


@pytest.mark.parametrize("least", [{"9.mlp": 1}, {"0.mlp": -1}, {"0.mlp": 10**6}, {"0.mlp": 0.5}, [1]])
def test_limits_of_another_network_are_refused(least: Any) -> None:
    document = json.loads(digit_net().dropout_list.to_json()) | {"least": least}
    with pytest.raises(ValueError, match="text is not a dropout list"):
        skd.DropoutList.from_json(json.dumps(document))
    with pytest.raises(ValueError, match="least"):
        skd.DropoutList(["0.mlp"], [[24]], least=least)


def test_losses_are_measured_at_widths_that_a_module_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is nearly worthless once it is gone, but may not go, is not narrowed for that."""
    net, asked = digit_net(), []

    def given(setting: Any, widths: Any, below: Any) -> Any:
        asked.append(below)
        rise = [lambda width: 0.01 if width == 0 else 1.0, *[lambda width: 0.1] * 3]
        rise[0], rise[1] = rise[1], rise[0]
        return [
            [(present, 0.0), *((width, own(width)) for width in narrower)]
            for present, narrower, own in zip(widths, below, rise, strict=True)
        ]

    monkeypatch.setattr(loss, "rises", given)
    full = net.infos[1].full_width
    planned = skd.plan(
        net, digit_data()[2], target=0.3, rounds=1, compensated=False, keep={"0.mlp": 5}, exclude=["1.attn"]
    )
    assert all(min(below[1], default=5) == 5 and below[2] == [] for below in asked)
    assert planned.entry(len(planned) - 1)["0.mlp"] == full and len(asked) > 1


def test_a_target_below_every_step_is_said() -> None:
    with pytest.warns(UserWarning, match="target is 0.001, and the first step .* removes more") as found:
        assert len(skd.plan(digit_net(), digit_data()[2], target=0.001, rounds=1)) == 1
    assert found[0].filename == __file__, "as if it came from the caller"
