"""The conversions beyond the paper: the function stays, and a cut does less harm to what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_batches, tiny_vit
from timm.layers import SwiGLU
from timm.models.eva import Eva

import skd
from skd.vit.conversions import SecondMoments, balanced_bases, elimination_order

CHOICES = [{"qk": "balanced"}, {"v": "output"}, {"neurons": "residual"}]
ALL = {"qk": "balanced", "v": "output", "neurons": "residual"}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def covariance(size: int, seed: int = 0) -> torch.Tensor:
    """A random one whose eigenvalues span six decades."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return axes * torch.logspace(3, -3, size, dtype=torch.float64) @ axes.mT


def eva(**changes: Any) -> Any:
    args = {"img_size": 16, "patch_size": 4, "in_chans": 3, "num_classes": 5, "embed_dim": 48, "depth": 2}
    torch.manual_seed(0)
    return Eva(**{**args, "num_heads": 3, "mlp_ratio": 2, **changes}).double().eval()


@pytest.mark.parametrize("choice", [*CHOICES, ALL], ids=lambda choice: "-".join(choice.values()))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_function_is_preserved(choice: dict[str, str], dtype: torch.dtype, tolerance: float) -> None:
    model, batches = tiny_vit(dtype), random_batches(dtype=dtype)
    supernet, plain = skd.convert(model, batches, **choice), skd.convert(model, batches)
    with torch.no_grad():
        assert relative(supernet(batches[0][0]), model(batches[0][0])) < tolerance
    own, other = supernet.state_dict(), plain.state_dict()
    changed = {key.split(".", 2)[2] for key in own if not torch.equal(own[key], other[key])}
    rows = {"qkv.weight", "qkv.bias"} if {"qk", "v"} & choice.keys() else set()
    proj = {"proj.weight"} if "v" in choice else set()
    mlp = {"fc1.weight", "fc1.bias", "fc2.weight"} if "neurons" in choice else set()
    assert changed == {f"attn.{name}" for name in rows | proj} | {f"mlp.{name}" for name in mlp}


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_vit(qk_norm=True, mlp_layer=SwiGLU, init_values=0.5, global_pool="avg", qkv_bias=False),
        lambda: tiny_vit(num_classes=0, no_embed_class=True),
        eva,
    ],
    ids=["qk_norm", "headless", "eva"],
)
def test_where_a_module_cannot_take_one_it_keeps_the_papers(model: Any) -> None:
    model, images = model(), random_batches(2, 6)
    images = [
        (pixels[..., : model.patch_embed.img_size[0], : model.patch_embed.img_size[0]], y) for pixels, y in images
    ]
    supernet = skd.convert(model, images, **ALL)
    with torch.no_grad():
        assert relative(supernet(images[0][0]), model(images[0][0])) < 1e-12


def test_balanced_bases_undo_each_other_and_keep_the_best_products() -> None:
    """No other coordinates have products of rank r with a smaller error: that of a truncated singular value sum."""
    left, right = covariance(12, 1), covariance(12, 2)
    a, b = balanced_bases(left, right)
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(a @ b.mT, eye, rtol=0, atol=1e-9)
    root = lambda matrix: torch.linalg.cholesky(matrix)  # noqa: E731
    singular = torch.linalg.svdvals(root(left).mT @ root(right))
    joint = torch.linalg.eigh(left / left.trace() + right / right.trace())[1].flip(-1)
    for rank in (1, 3, 6):
        error = lambda p: (root(left).mT @ (eye - p) @ root(right)).norm()  # noqa: E731
        best = singular[rank:].norm()
        torch.testing.assert_close(error(a[:, :rank] @ b[:, :rank].mT), best, rtol=1e-3, atol=0)
        assert error(joint[:, :rank] @ joint[:, :rank].mT) > 1.01 * best


def test_balanced_bases_of_nothing_are_no_change() -> None:
    """A head that is all zeros, as after pruning by hand, must not make infinite weights."""
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    a, b = balanced_bases(nothing, covariance(4))
    torch.testing.assert_close(a @ b.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert max(a.abs().max(), b.abs().max()) < 1e4


def greedy(covariance: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """The order by trying every neuron: ridge regression of all that is gone on all that is left, from scratch."""
    size = len(covariance)
    ridged = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    left, gone = list(range(size)), list[int]()
    while left:

        def lost(neuron: int) -> float:
            kept = [other for other in left if other != neuron]
            out = [*gone, neuron]
            missing = ridged[out][:, out]
            if kept:
                across = ridged[out][:, kept]
                missing = missing - across @ torch.linalg.solve(ridged[kept][:, kept], across.mT)
            return float((weight[:, out] @ missing @ weight[:, out].mT).trace())

        worst = min(left, key=lost)
        left.remove(worst)
        gone.append(worst)
    return gone[::-1]


@pytest.mark.parametrize("size", [7, 70])
def test_neurons_are_eliminated_one_by_one(size: int) -> None:
    """Also past a block of them, where the inverse has been updated as a whole."""
    spread = covariance(size)
    weight = torch.randn(5, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert elimination_order(spread, weight).tolist() == greedy(spread, weight)


def test_of_two_equal_neurons_one_goes_and_the_other_stays() -> None:
    """By importance both would stay, though one can do the work of both."""
    spread = torch.diag(torch.tensor([1.0, 1.0, 0.9, 0.8], dtype=torch.float64))
    spread[0, 1] = spread[1, 0] = 1.0
    order = elimination_order(spread, torch.eye(4, dtype=torch.float64))
    assert sorted(order[:3].tolist()) in ([0, 2, 3], [1, 2, 3]) and order[0] in (0, 1)


def test_second_moments_add_up() -> None:
    features = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    both = SecondMoments.of(features[:, :20]).plus(SecondMoments.of(features[:, 20:]))
    for one, other in zip(both, SecondMoments.of(features), strict=True):
        torch.testing.assert_close(one, other)
    expected = torch.stack([torch.cov(group.mT, correction=0) for group in features])
    torch.testing.assert_close(both.covariance(), expected)


def test_they_do_not_depend_on_the_batches(model: Any) -> None:
    images, labels = (torch.cat(part) for part in zip(*random_batches(3, 8), strict=True))
    by = lambda size: list(zip(images.split(size), labels.split(size), strict=True))  # noqa: E731
    one, many = skd.convert(model, by(24), **ALL), skd.convert(model, by(5), **ALL)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["qk", "v", "neurons"])
def test_bad_choices(name: str, model: Any, batches: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'best'; it may be one of"):
        skd.convert(model, batches, **{name: "best"})
