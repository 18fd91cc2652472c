"""skd.cost against published constants, METHOD 4's formula, and modules that were really counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import random_batches, tiny_vit
from internals import planning_prices
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import skd
from skd.support.curve import entries_within

# Published whole-model MACs and the planner's per-module MACs (linear convention), N = 197.
PUBLISHED = {
    "deit_tiny_patch16_224": (192, 1_083_551_656, 29_200_128, 58_438_080, 5_717_416),
    "deit_small_patch16_224": (384, 4_258_618_216, 116_497_920, 233_071_488, 22_050_664),
    "deit_base_patch16_224": (768, 16_883_299_048, 465_386_496, 930_924_288, 86_567_656),
}


def meta_supernet(name: str) -> skd.SuperNet:
    with torch.device("meta"):
        return skd.SuperNet(timm.create_model(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_constants(name: str) -> None:
    _, total, attention, mlp, params = PUBLISHED[name]
    supernet = meta_supernet(name)
    assert skd.cost(supernet, convention="linear") == skd.Cost(total, params)
    assert skd.cost(supernet.model, convention="linear") == skd.Cost(total, params)
    shares = planning_prices(supernet, "linear")
    assert shares["3.attn"] * 64 == pytest.approx(attention, rel=1e-12)
    assert shares["3.mlp"] * supernet.widths()[1] == pytest.approx(mlp, rel=1e-12)


def formula(widths: np.ndarray, d: int, heads: int, quadratic: bool) -> np.ndarray:
    """METHOD 4 for DeiT at 224 px, patch 16, 1,000 classes."""
    tokens, patches, patch, classes = 197, 196, 16, 1000
    k, m = widths[..., 0::2], widths[..., 1::2]
    a = heads * k
    attention = tokens * (4 * d * a + 3 * a + d) + tokens * d + quadratic * 2 * tokens**2 * heads * k
    mlp = tokens * (2 * d * m + 3 * m + d) + tokens * d
    base = patches * (3 * patch**2 * d + d) + tokens * d + d * classes + classes
    return base + ((k > 0) * attention).sum(-1) + ((m > 0) * mlp).sum(-1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_width_is_the_formula(name: str) -> None:
    supernet, d = meta_supernet(name), PUBLISHED[name][0]
    full = np.array(supernet.widths())
    generator = np.random.default_rng(0)
    random = generator.integers(0, full + 1, size=(200, len(full)))
    sweep = np.repeat(full[None], 4 * d + 65, axis=0)
    sweep[:65, 4] = np.arange(65)  # every width of one attention, then of one MLP
    sweep[65:, 5] = np.arange(4 * d)
    for widths in (random, sweep, np.zeros((1, len(full)), int)):
        for convention, quadratic in (("linear", False), ("full", True)):
            expected = formula(widths, d, d // 64, quadratic)
            assert np.array_equal(supernet.costs.macs(widths, convention), expected)


def test_full_macs_hold_every_matrix_product(planned: skd.SuperNet, batches: Any) -> None:
    """PyTorch's own counter sees the products alone; `full` has the bias adds, norms and activations on top.

    Attention is written out for it: that of PyTorch 2.11 does not count the fused kernel of a CPU.
    """
    image = batches[0][0][:1]
    for entry in (0, len(planned.dropout_list) // 2, len(planned.dropout_list) - 1):
        written_out = sdpa_kernel(SDPBackend.MATH)
        with written_out, FlopCounterMode(display=False) as counter, torch.no_grad():
            skd.extract(planned, entry=entry)(image)
        products, total = counter.get_total_flops() // 2, skd.cost(planned, entry=entry).macs
        assert products < total < 1.06 * products


def test_parameters_are_counted_for_every_entry(planned: skd.SuperNet) -> None:
    for entry in range(0, len(planned.dropout_list), 5):
        sub = skd.extract(planned, entry=entry)
        assert skd.cost(planned, entry=entry).params == sum(p.numel() for p in sub.parameters())


def test_prices_follow_changes_by_hand(planned: skd.SuperNet) -> None:
    """timm's own ways to give a model another head or another size of images."""
    last = len(planned.dropout_list) - 1
    before = [skd.cost(planned, entry=last), skd.cost(planned)]
    planned.model.reset_classifier(1000)
    planned.model.set_input_size(img_size=64)
    assert list(entries_within(planned, [float(planned.dropout_list.macs[-1] / planned.dropout_list.macs[0])])) != []
    for entry, old in zip((last, 0), before, strict=True):
        cut = skd.extract(planned, entry=entry)
        assert skd.cost(cut) == skd.cost(planned, entry=entry) != old
        assert skd.cost(skd.extract(planned, macs=skd.cost(cut).macs)) == skd.cost(cut)
        assert planned.dropout_list.macs[entry] == skd.cost(cut).macs


def test_cost_rejects(planned: skd.SuperNet) -> None:
    with pytest.raises(ValueError, match="convention is 'flops'"):
        skd.cost(planned, convention="flops")
    with pytest.raises(ValueError, match="entry is 999"):
        skd.cost(planned, entry=999)
    with pytest.raises(ValueError, match="only a SuperNet"):
        skd.cost(planned.model, entry=1)
    with pytest.raises(ValueError, match="timm VisionTransformer"):
        skd.cost(torch.nn.Linear(1, 1))


def test_counting_leaves_the_model_as_it_was() -> None:
    model = tiny_vit().train()
    before = [type(module) for module in model.modules()]
    skd.cost(model)
    assert model.training and [type(module) for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


POOLED = {
    "patches": lambda: tiny_vit(global_pool="map"),
    "prefix too": lambda: tiny_vit(global_pool="map", pool_include_prefix=True, reg_tokens=2),
    "Eva": lambda: timm.create_model("vit_pe_core_base_patch16_224", **EVA).double().eval(),
}
EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize("name", POOLED)
def test_the_products_of_an_attention_pool_are_counted(name: str) -> None:
    """Without attention in the blocks `full` exceeds `linear` by the products of the pool, as PyTorch counts them."""
    supernet = skd.SuperNet(POOLED[name]())
    widths = supernet.widths()
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [widths, [0, *widths[1:2]] * 2])
    model = skd.extract(supernet, entry=1)
    model.requires_grad_(False).attn_pool.fused_attn = False  # products that the counter sees
    with FlopCounterMode(display=False) as counter:
        model(random_batches()[0][0][:1])
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" in str(op)) // 2
    assert products > 0
    assert skd.cost(model).macs - skd.cost(model, convention="linear").macs == products
