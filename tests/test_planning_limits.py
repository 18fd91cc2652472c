"""plan(keep=, exclude=): what no planner narrows, what that does to the target, and mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import digit_data, digit_net, random_batches, tiny_vit

import skd
from skd.planners import names


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
        ({"keep": ["0.mlp"]}, "keep is"),
        ({"keep": {"0.mlp": 99}}, r"keep has 99 for 0.mlp; it must be a width in 0..24"),
        ({"keep": {"0.mlp": 0.5}}, "keep has 0.5"),
    ],
)
def test_mistakes(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skd.plan(digit_net(), digit_data()[2], rounds=1, **given)


def test_a_planner_that_does_not_keep_to_them_is_refused() -> None:
    def own(net: Any, batches: Any, target: float, /, *, current: Any, convention: str, group: Any) -> Any:
        rows = [*current.widths.tolist(), [0] * len(current.modules)]
        return skd.DropoutList(current.modules, rows)

    with pytest.raises(ValueError, match=r"narrows 0.mlp to 0; it must keep"):
        skd.plan(digit_net(), digit_data()[2], planner=own, keep={"0.mlp": 5})
