"""The planner "loss": what it measures, by hand; convex steps; its targets; labels, heads and ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import digit_data, digit_net, nested, random_batches, run_training, tiny_vit, training_config

import skd
from skd.moments import Predicting
from skd.planners.loss import SHAPES, Setting, _convex, _shaped, rises

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}


def test_a_rise_is_the_divergence_of_the_network_narrowed_there() -> None:
    """Against extracted sub-networks, whole passes each; others stay as in the last entry."""
    net = nested(skd.SuperNet(tiny_vit()), [16, 48, 16, 72])
    batches, present = random_batches(), [16, 48, 16, 72]
    found = rises(Setting(net, batches, None, "kl", net.step), present, [[8, 0], [24, 0], [8], [0]])
    for index, curve in enumerate(found):
        base = divergence(net, batches, present)
        for width, rise in curve:
            narrowed = [*present[:index], width, *present[index + 1 :]]
            assert rise == pytest.approx(divergence(net, batches, narrowed) - base, rel=1e-9, abs=1e-12)


@torch.no_grad()
def divergence(net: Any, batches: Any, widths: list[int]) -> float:
    """The divergence, per image, of the network at `widths` from the full one."""
    cut = skd.extract(nested(skd.SuperNet(net.model), widths), entry=1) if widths != net.widths() else net
    total, images = 0.0, 0
    for batch, _ in batches:
        p, q = net(batch).softmax(-1), cut(batch).softmax(-1)
        total += float((p * (p.log() - q.log())).sum())
        images += len(batch)
    return total / images


@pytest.mark.parametrize(
    ("curve", "corners"),
    [
        ([(8, 0.0), (6, 1.0), (4, 2.0), (0, 4.0)], [(8, 0.0), (0, 4.0)]),  # a line
        ([(8, 0.0), (6, 0.1), (4, 1.0), (0, 9.0)], [(8, 0.0), (6, 0.1), (4, 1.0), (0, 9.0)]),
        ([(8, 0.0), (6, 3.0), (4, 1.0), (0, 9.0)], [(8, 0.0), (4, 1.0), (0, 9.0)]),  # above the chord
        ([(8, 0.0), (4, -1.0), (0, 5.0)], [(8, 0.0), (4, 0.0), (0, 5.0)]),  # better than before: free
        ([(8, 0.0), (4, 2.0), (0, -0.5)], [(8, 0.0), (0, 0.0)]),  # all of it is free
        ([(8, 0.0)], [(8, 0.0)]),
    ],
)
def test_curves_are_made_convex(curve: Any, corners: Any) -> None:
    found = _convex(curve)
    widths = np.arange(9)
    for points in (found, corners):
        assert points[0] == (8, 0.0)
    np.testing.assert_allclose(
        np.interp(widths, *np.array(found)[::-1].T), np.interp(widths, *np.array(corners)[::-1].T), atol=1e-12
    )


@pytest.mark.parametrize("convention", ["full", "linear"])
def test_it_reaches_its_targets_by_small_steps(convention: str) -> None:
    net = digit_net()
    planned = skd.plan(net, digit_data()[2], target=0.5, rounds=4, convention=convention, planner="loss")
    macs = net.costs.macs(planned.widths, convention)
    assert 0.5 <= macs[-1] / macs[0] < 0.65  # the next step would be too large
    for index, info in enumerate(net.infos):
        steps = -np.diff(planned.widths[:, index])
        assert steps.max() <= info.group_size
    assert set(planned.sensitivity) == set(net.modules_in_order)
    assert planned == skd.plan(net, digit_data()[2], target=0.5, rounds=4, convention=convention, planner="loss")


def test_labels_do_not_matter_and_points_do() -> None:
    net, batches = digit_net(), list(digit_data()[2])
    planned = skd.plan(net, batches, target=0.5, rounds=2, planner="loss")
    unlabelled = [(images, None) for images, _ in batches]
    assert planned == skd.plan(net, unlabelled, target=0.5, rounds=2, planner="loss")
    assert planned != skd.plan(net, batches, target=0.5, rounds=2, planner="loss", points=1)
    for points in (0, 2.0, True):
        with pytest.raises(ValueError, match="points is"):
            skd.plan(net, batches, planner="loss", points=points)


def test_cross_entropy_is_that_of_the_labels() -> None:
    net, batches = skd.SuperNet(tiny_vit()), random_batches()
    widths = net.widths()
    (curve, *_) = rises(Setting(net, batches, None, "cross_entropy", net.step), widths, [[8], [], [], []])
    nested(net, [8, *widths[1:]])
    with torch.no_grad():
        full, cut = (
            sum(F.cross_entropy(net(x, entry=entry), y, reduction="sum") for x, y in batches) / 8 for entry in (0, 1)
        )
    assert curve[1][1] == pytest.approx(float(cut - full), rel=1e-9)
    unlabelled = [(images, None) for images, _ in batches]
    for other in (batches, unlabelled):
        kl, entropy = (
            rises(Setting(net, images, None, criterion, net.step), widths, [[8], [0], [0], [0]])
            for images, criterion in ((unlabelled, "kl"), (other, "cross_entropy"))
        )
        assert (entropy == kl) is (other is unlabelled)


def test_between_the_measured_widths_taylor_scores_shape_the_rise() -> None:
    info = skd.SuperNet(tiny_vit()).infos[1]  # 72 neurons in groups of 3
    scores = np.arange(72.0)[::-1]
    shaped = dict(_shaped(info, [(72, 0.0), (60, 1.0), (0, 9.0)], scores))
    assert list(shaped) == [*range(72, 0, -info.group_size), 0]
    assert shaped[66] == pytest.approx(scores[66:].sum() / scores[60:].sum())
    assert shaped[30] == pytest.approx(1 + 8 * scores[30:60].sum() / scores[:60].sum())
    assert (shaped[72], shaped[60], shaped[0]) == (0.0, 1.0, 9.0)
    flat = dict(_shaped(info, [(72, 0.0), (0, 72.0)], np.zeros(72)))
    assert flat[36] == 36.0
    batches = list(digit_data()[2])
    given = {"target": 0.5, "rounds": 2, "planner": "loss", "points": 1}
    linear, taylor = (skd.plan(digit_net(), batches, shape=shape, **given) for shape in SHAPES)
    assert linear != taylor


def test_what_kept_features_predict_costs_nothing() -> None:
    """With `compensated`, neurons that are copies of others go for free; without, they cost what others cost."""
    model = tiny_vit(global_pool="avg")
    with torch.no_grad():
        for rows in (model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.bias):
            rows[36:] = rows[:36]
    net, batches = skd.SuperNet(model), random_batches()
    rise = {}
    for step in (net.step, Predicting(net, skd.moments(net, batches), ridge=1e-9).step):
        *_, curve = rises(Setting(net, batches, None, "kl", step), net.widths(), [[], [], [], [36, 0]])
        rise[step.__self__.__class__] = dict(curve)
    assert rise[Predicting][36] < 1e-6 * rise[skd.SuperNet][36]
    assert rise[Predicting][0] > 1e-2 * rise[skd.SuperNet][0]  # its mean alone replaces it
    copies = skd.plan(net, batches, target=0.2, rounds=1, planner="loss", reach=1.0)
    assert copies.widths[12].tolist() == [*net.widths()[:3], 36]  # 36 copies in groups of three go first
    other = skd.plan(net, batches, target=0.2, rounds=1, planner="loss", reach=1.0, compensated=False)
    assert other.widths[1].tolist() != copies.widths[1].tolist()
    with pytest.raises(ValueError, match="compensated is 1"):
        skd.plan(net, batches, planner="loss", compensated=1)


@pytest.mark.parametrize("name", ["criterion", "shape"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is 'best'; it may be one of"):
        skd.plan(digit_net(), digit_data()[2], planner="loss", **{name: "best"})


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_vit(num_classes=0),
        lambda: tiny_vit(qk_norm=True, scale_mlp_norm=True),
        lambda: timm.create_model("beit_base_patch16_224", num_classes=5, **SMALL).double().eval(),
        lambda: timm.create_model("vit_small_patch16_dinov3", num_classes=5, **SMALL).double().eval(),
    ],
    ids=["headless", "all or nothing", "BEiT", "DINOv3"],
)
def test_other_networks(model: Any) -> None:
    net = skd.SuperNet(model())
    planned = skd.plan(net, random_batches(), target=0.4, rounds=2, planner="loss")
    assert len(planned) > 1
    net.dropout_list = planned  # refuses widths that a module may not have
    assert net(random_batches()[0][0], entry=len(planned) - 1).isfinite().all()


def test_batches_that_are_not_finite_are_left_out() -> None:
    net, batches = skd.SuperNet(tiny_vit()), random_batches(3)
    expected = skd.plan(net, batches[:2], target=0.4, rounds=1, planner="loss")
    batches[2][0][0, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="batches: 1 were left out"):
        assert skd.plan(net, batches, target=0.4, rounds=1, planner="loss") == expected
    with pytest.raises(ValueError, match="none has finite statistics"):
        skd.plan(net, batches[2:], target=0.4, rounds=1, planner="loss")


def test_training_grows_its_list_by_it() -> None:
    net = digit_net()
    history = run_training(net, training_config(planner="loss"))
    assert len(net.dropout_list) > 3
    assert history.epochs[0]["sensitivity"].keys() == set(net.modules_in_order)
