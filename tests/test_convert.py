"""convert: function preserved, knowledge in front, options, and what it rejects."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_batches, tiny_vit
from internals import principal_axes
from torch import nn

import skd
from skd.convert import WpacStatistics


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_function_is_preserved_and_the_input_untouched(dtype: torch.dtype, tolerance: float) -> None:
    model, batches = tiny_vit(dtype), random_batches(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    supernet = skd.convert(model, batches)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert flags == [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in supernet.modules())
    with torch.no_grad():
        assert relative(supernet(batches[0][0]), model(batches[0][0])) < tolerance
    assert len(supernet.dropout_list) == 1


def test_neurons_come_out_sorted(model: Any, batches: Any) -> None:
    """Converting again finds nothing left to reorder."""
    plain = skd.extract(skd.convert(model, batches), entry=0)
    again = skd.convert(plain, batches)
    for index in range(2):
        assert torch.equal(again.model.blocks[index].mlp.fc1.weight, plain.blocks[index].mlp.fc1.weight)
        assert not torch.equal(again.model.blocks[index].mlp.fc1.weight, model.blocks[index].mlp.fc1.weight)


def test_half_of_a_converted_network_is_closer_to_the_whole(model: Any, batches: Any) -> None:
    images = batches[0][0]
    errors = []
    for supernet in (skd.convert(model, batches), skd.SuperNet(copy.deepcopy(model))):
        full = supernet.widths()
        supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [full, [w // 2 for w in full]])
        errors.append(relative(supernet(images, entry=1), model(images)))
    assert errors[0] < 0.8 * errors[1]


def test_dataset_centering_does_not_depend_on_the_batches(model: Any) -> None:
    images, labels = (torch.cat(part) for part in zip(*random_batches(3, 8), strict=True))
    by = lambda size: list(zip(images.split(size), labels.split(size), strict=True))  # noqa: E731
    one, many = skd.convert(model, by(24)), skd.convert(model, by(5))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    one, many = (skd.convert(model, by(size), centering="batch") for size in (24, 5))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_predicted_labels(model: Any, batches: Any) -> None:
    own = [(images, model(images).argmax(-1)) for images, _ in batches]
    expected = skd.convert(model, own).state_dict()
    for found in (
        skd.convert(model, [(images, None) for images, _ in batches]),
        skd.convert(model, batches, labels="predicted"),
        skd.convert(model, [(images, labels + 500) for images, labels in batches], labels="predicted"),
        skd.convert(model, [(images, ["a cat"]) for images, _ in batches], labels="predicted"),
    ):
        assert all(torch.equal(found.state_dict()[key], expected[key]) for key in expected)


def test_one_pass_over_an_iterator_is_enough(model: Any, batches: Any) -> None:
    seen = []
    progress = lambda items: (seen.append(1) or item for item in items)  # noqa: E731
    supernet = skd.convert(model, iter(batches), progress=progress)
    assert len(seen) == len(batches)
    assert torch.equal(supernet.model.head.weight, model.head.weight)


def test_principal_axes_are_sorted_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT
    axes = principal_axes(covariance)
    torch.testing.assert_close(axes.mT @ axes, torch.eye(6, dtype=torch.float64).expand(3, 6, 6))
    diagonal = axes.mT @ covariance @ axes
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    assert (values[:, :-1] >= values[:, 1:]).all()
    torch.testing.assert_close(diagonal, torch.diag_embed(values), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "batches has no batch"),
        ([torch.zeros(2, 3, 32, 32)], r"batches\[0\] is a Tensor"),
        ([(torch.zeros(2, 3, 16, 16), torch.zeros(2).long())], r"batches\[0\]: images has size"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(3).long())], r"batches\[0\]: labels is \(3,\)"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], "labels is"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 5]))], r"labels has 0\.\.5; the head has classes 0\.\.4"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([-1, 0]))], r"labels has -1\.\.0"),
        ([(torch.full((2, 3, 32, 32), float("nan")), torch.zeros(2).long())], "none has finite statistics"),
    ],
)
def test_bad_batches(model: Any, batches: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        skd.convert(model, batches)
    with pytest.raises(ValueError, match="centering is 'mean'"):
        skd.convert(model, batches, centering="mean")
    with pytest.raises(ValueError, match="labels is 'mine'"):
        skd.convert(model, batches, labels="mine")


def test_a_bad_batch_is_left_out_and_counted(model: Any, batches: Any) -> None:
    bad = (torch.full((4, 3, 32, 32), float("nan"), dtype=torch.float64), torch.zeros(4).long())
    for centering in ("dataset", "batch"):
        with pytest.warns(UserWarning, match="1 were left out"):
            found = skd.convert(model, [bad, *batches], centering=centering)
        expected = skd.convert(model, batches, centering=centering)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_sums_that_overflow_are_left_out_too() -> None:
    """Large features with small gradients: their product is not large, the squares of the former are."""
    x, grad = torch.full((5, 3, 3, 1, 4), 1e22), torch.full((5, 3, 3, 1, 4), 1e-22)
    x += 1e21 * torch.randn(x.shape)
    (info, *_) = skd.SuperNet(tiny_vit()).infos
    statistics = WpacStatistics()
    statistics.add(info, x, grad)
    finite = bool(statistics._batch[info.name].weighted_outer.isfinite().all())
    statistics.end_batch()
    assert statistics.skipped == (not finite)


def test_bad_models(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a timm VisionTransformer"):
        skd.convert(nn.Linear(2, 2), batches)
    with pytest.raises(ValueError, match="activation ReLU"):
        skd.convert(tiny_vit(act_layer=nn.ReLU), batches)
    with pytest.raises(ValueError, match="attn_drop_rate=0"):
        skd.convert(tiny_vit(attn_drop_rate=0.1), batches)


def test_an_unknown_model_name_suggests_near_ones() -> None:
    with pytest.raises(ValueError, match=r"near names: .*deit_tiny_patch16_224"):
        skd.create_model("deit_tiny_patch16_242")


def test_a_headless_model_is_judged_by_its_features() -> None:
    model, batches = tiny_vit(num_classes=0), random_batches(3, 6)
    supernet = skd.convert(model, batches)
    with torch.no_grad():
        assert relative(supernet(batches[0][0]), model(batches[0][0])) < 1e-12
    scores, sensitivity = skd.importance(supernet, batches)
    assert skd.evaluate(supernet, batches) == 100.0  # every image is its own nearest neighbour in the full network
    assert all(0 < value <= 1 for value in sensitivity.values())
    assert all(np.isfinite(array).all() for array in scores.values())
