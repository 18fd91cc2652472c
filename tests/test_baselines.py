"""The orders WPAC is compared with: they keep the function, and each is sorted by its own score."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import nested, random_batches, tiny_vit
from timm.layers import SwiGLU, SwiGLUPacked

import skd
from skd.demo.baselines import METHODS, coordinate_scores, reordered

SCORED = ("magnitude", "taylor", "hessian")
VARIANTS = {
    "plain": {},
    "packed gate": {"mlp_layer": SwiGLUPacked, "mlp_ratio": 3.0},
    "two-layer gate": {"mlp_layer": SwiGLU},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no bias": {"qkv_bias": False},
}


def leading(scores: torch.Tensor) -> list[torch.Tensor]:
    """The scores that decide an order: of V and of Q + K per head, or of each neuron."""
    return [scores] if scores.ndim == 1 else [scores[2], scores[0] + scores[1]]


def is_sorted(scores: torch.Tensor) -> bool:
    return bool((scores.diff(dim=-1) <= 1e-9 * scores.abs().max()).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_function_is_preserved(method: str, variant: str, batches: Any) -> None:
    model = tiny_vit(**VARIANTS[variant])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = batches[0][0]
    supernet = reordered(model, batches, method, seed=3)
    expected = model(images)
    assert (supernet(images) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    moved = [key for key, value in supernet.state_dict().items() if not torch.equal(value, before[key])]
    assert bool(moved) == (variant != "scale_norm"), "every coordinate is mixed there, so nothing may move"


@pytest.mark.parametrize("method", METHODS)
def test_skipped_modules_have_no_order(method: str, model: Any, batches: Any) -> None:
    sub = skd.extract(nested(skd.SuperNet(model), [0, 24, 8, 0]), entry=1)
    supernet = reordered(sub, batches, method)
    torch.testing.assert_close(supernet(batches[0][0]), sub(batches[0][0]), rtol=1e-10, atol=1e-12)
    assert supernet.widths() == [0, 24, 8, 0]


@pytest.mark.parametrize("method", SCORED)
def test_coordinates_are_sorted_by_their_score(method: str, model: Any, batches: Any) -> None:
    supernet = reordered(model, batches, method)
    plain = skd.extract(supernet, entry=0)
    before, after = coordinate_scores(model, batches, method), coordinate_scores(plain, batches, method)
    for name in before:
        for old, new in zip(leading(before[name]), leading(after[name]), strict=True):
            assert is_sorted(new) and not is_sorted(old)
            torch.testing.assert_close(old.sort(-1).values, new.sort(-1).values)


def test_gated_neurons_are_sorted_by_both_rows(batches: Any) -> None:
    for variant in ("packed gate", "two-layer gate"):
        plain = skd.extract(reordered(tiny_vit(**VARIANTS[variant]), batches, "magnitude"), entry=0)
        mlp = plain.blocks[0].mlp
        rows = mlp.fc1.weight.chunk(2) if hasattr(mlp, "fc1") else (mlp.fc1_g.weight, mlp.fc1_x.weight)
        assert is_sorted(torch.cat(rows, 1).norm(dim=1))


def test_scores_are_their_formulas(model: Any, batches: Any) -> None:
    """Against a second way to get features and gradients: autograd, one batch after the other."""
    expected = {"taylor": 0.0, "hessian": 0.0}, {"taylor": 0.0, "hessian": 0.0}
    block = model.blocks[1]
    for images, labels in batches:
        seen: list[torch.Tensor] = []
        keep = partial(lambda kept, module, inputs, output: kept.append(output), seen)
        hooks = [module.register_forward_hook(keep) for module in (block.attn.qkv, block.mlp.act)]
        cost = model(images).gather(1, labels[:, None]).sum()
        for hook in hooks:
            hook.remove()
        for sums, x, g in zip(expected, seen, torch.autograd.grad(cost, seen), strict=True):
            product = (x * g).detach().flatten(0, 1)
            sums["taylor"] = sums["taylor"] + product.abs().sum(0)
            sums["hessian"] = sums["hessian"] + 0.5 * product.square().sum(0)
    for method in ("taylor", "hessian"):
        scores = coordinate_scores(model, batches, method)
        torch.testing.assert_close(scores["1.attn"].flatten(), expected[0][method])
        torch.testing.assert_close(scores["1.mlp"], expected[1][method])
    norms = coordinate_scores(model, batches, "magnitude")
    torch.testing.assert_close(norms["1.attn"][1, 2, 5], block.attn.qkv.weight[48 + 2 * 16 + 5].norm())
    torch.testing.assert_close(norms["1.mlp"][7], block.mlp.fc1.weight[7].norm())


def test_a_bad_batch_is_left_out(model: Any, batches: Any) -> None:
    bad = (torch.full((4, 3, 32, 32), float("nan"), dtype=torch.float64), torch.zeros(4).long())
    with pytest.warns(UserWarning, match="1 were left out"):
        scores = coordinate_scores(model, [bad, *batches], "taylor")
    expected = coordinate_scores(model, batches, "taylor")
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="none has finite statistics"):
        coordinate_scores(model, [bad], "taylor")


def test_random_depends_on_the_seed_alone(model: Any, batches: Any) -> None:
    def weights(seed: int, given: Any) -> torch.Tensor:
        return reordered(model, given, "random", seed=seed).model.blocks[0].mlp.fc1.weight

    assert torch.equal(weights(1, batches), weights(1, random_batches(1)))
    assert not torch.equal(weights(1, batches), weights(2, batches))


def test_wpac_is_convert(model: Any, batches: Any) -> None:
    ours, theirs = reordered(model, batches, "wpac").state_dict(), skd.convert(model, batches).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", ["wpca", "WPAC", ""])
def test_unknown_method(method: str, model: Any, batches: Any) -> None:
    with pytest.raises(ValueError, match="method is"):
        reordered(model, batches, method)
    with pytest.raises(ValueError, match="method is"):
        coordinate_scores(model, batches, method)
