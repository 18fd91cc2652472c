"""Where METHOD departs from the published implementation on purpose: one small test for each departure."""

import numpy as np
import pytest
import torch
from golden_data import (
    FULL,
    HEADS,
    MODULES,
    TOKENS,
    arrays,
    batches,
    build,
    document,
    original,
    relative,
    transformed,
)
from internals import modules_of, planning_prices
from torch import nn

import skd
import skd_kernels
from skd.convert import WpacStatistics, collect

IMAGES = 160  # the five batches of 32 of the published passes


class Nothing(nn.Module):
    """A branch that adds nothing."""

    def forward(self, x, **_):
        return torch.zeros_like(x)


class Input(nn.Module):
    """A branch that adds its input, the normalised stream."""

    def forward(self, x, **_):
        return x


def proxy(size, count=IMAGES):
    """The proxy images in batches of `size`; the last may be smaller."""
    images, labels = batches(1, count)[0]
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="module")
def supernet():
    return skd.SuperNet(build(transformed()))


@pytest.fixture(scope="module")
def measured(supernet):
    """(scores, sensitivity) at the full network."""
    return skd.importance(supernet, proxy(32))


@torch.no_grad()
def correct(branch=None, name=None, labels=None):
    """Correct predictions in each batch of 32 of the timm model, the branch of a module replaced."""
    model = build(transformed())
    if name is not None:
        block, kind = name.split(".")
        setattr(model.blocks[int(block)], kind, branch)
    images, true = batches(1, IMAGES)[0]
    hits = model(images).argmax(1) == (true if labels is None else labels)
    return hits.view(-1, 32).sum(1).numpy()


def test_skipping_a_module_adds_nothing(measured):
    total = correct().sum()
    for name in MODULES:
        expected = max(total - correct(Nothing(), name).sum(), 0.5) / total
        assert measured[1][name] == expected


def test_published_skipping_added_the_normalised_input():
    """The published table is that of x + LN(x), not of x."""
    table = np.array(document("piad")["A_plain"]["epochs"][0]["acc_table"]) * 32 / 100
    nothing = [correct(Nothing(), name) for name in MODULES]
    layer_norm = [correct(Input(), name) for name in MODULES]
    assert np.array_equal(table[:, 0], correct())
    assert np.array_equal(table[:, 1:].T, layer_norm)
    differ = [(theirs != ours).any() for theirs, ours in zip(table[:, 1:].T, nothing, strict=True)]
    assert sum(differ) >= 5, "the last MLP may agree by chance: nothing but a norm and the head follows"


def test_importance_does_not_depend_on_the_batches(supernet, measured):
    scores, sensitivity = skd.importance(supernet, proxy(7))
    assert sensitivity == measured[1]
    for name in MODULES:
        assert (measured[0][name] > 0).all()
        assert relative(scores[name], measured[0][name]) < 1e-12


def test_sensitivity_with_no_correct_prediction(supernet):
    """Published: 0/0."""
    relabelled = [(images, supernet(images).argmin(1)) for images, _ in proxy(32)]
    _, sensitivity = skd.importance(supernet, relabelled)
    assert sensitivity == dict.fromkeys(MODULES, 0.5)


def test_sensitivity_is_never_negative(supernet):
    """With the labels that the network predicts without a module, skipping it only helps."""
    images = batches(1, IMAGES)[0][0]
    without = build(transformed())
    without.blocks[1].mlp = Nothing()
    labels = without(images).argmax(1)
    total = correct(labels=labels).sum()
    assert 0 < total < IMAGES
    scores, sensitivity = skd.importance(supernet, [(images, labels)])
    assert sensitivity["1.mlp"] == 0.5 / total
    widths = dict(zip(MODULES, FULL, strict=True))
    one = dict.fromkeys(MODULES, 1)
    operations = skd.rank_operations(scores, sensitivity, one, one, widths)
    assert ("1.mlp", 0) in [(operation.module, operation.width) for operation in operations]


@pytest.mark.parametrize("sensitivity", [-1.0, 0.0, 5e-5, 1e-4])
def test_sensitivity_has_a_floor(sensitivity):
    (operation,) = skd.rank_operations(
        {"0.mlp": [3.0]}, {"0.mlp": sensitivity}, {"0.mlp": 1}, {"0.mlp": 1}, {"0.mlp": 1}
    )
    assert operation.score == 1e-4


def test_sensitivity_above_the_floor_counts():
    arguments = {"0.mlp": [3.0]}, {"0.mlp": 2e-4}, {"0.mlp": 1}, {"0.mlp": 1}, {"0.mlp": 1}
    assert skd.rank_operations(*arguments)[0].score == 2e-4
    assert skd.rank_operations(*arguments, floor=0.5)[0].score == 0.5


def test_scores_of_zero_sum_are_uniform():
    """Published: NaN, and no operation. Uniform scores allow every group, whatever the rounding of their sums."""
    rest = {"0.mlp": 0.3}, {"0.mlp": 2}, {"0.mlp": 6}, {"0.mlp": 192}
    operations = skd.rank_operations({"0.mlp": np.zeros(192)}, *rest)
    assert operations == skd.rank_operations({"0.mlp": np.ones(192)}, *rest)
    assert [operation.width for operation in operations] == list(range(186, -1, -6))


def test_planning_counts_the_attention_products(supernet):
    """Published: the `linear` convention, which leaves Q K^T and A V out."""
    prices = {c: planning_prices(supernet, c) for c in ("full", "linear")}
    for name in MODULES:
        products = 2 * TOKENS**2 * HEADS if name.endswith("attn") else 0
        assert prices["full"][name] - prices["linear"][name] == products
    data = proxy(32, 64)
    planned = skd.plan(supernet, data, rounds=1)
    assert planned == skd.plan(supernet, data, rounds=1, convention="full")
    removed = sum((full - planned.widths[-1, i]) * prices["full"][MODULES[i]] for i, full in enumerate(FULL))
    assert planned.removed_macs == pytest.approx(removed, rel=1e-12)
    assert planned.removed_macs <= 0.875 * skd.cost(supernet).macs


def covariances(centering, size):
    """[(3, H, D, D)] of each attention, from 64 images."""
    model, statistics = build(original()), WpacStatistics(centering)
    infos = modules_of(model)
    collect(model, infos, proxy(size, 64), statistics.add, statistics.end_batch)
    return [statistics.covariance(info) for info in infos if info.kind == "attn"]


def test_dataset_centering_does_not_depend_on_the_batches():
    whole = covariances("dataset", 64)
    for size in (7, 32):
        for block, covariance in enumerate(covariances("dataset", size)):
            assert relative(covariance, whole[block]) < 1e-10


def test_batch_centering_does():
    """Kept for the published numbers; with a single batch it is the same."""
    whole = covariances("dataset", 64)
    for block in range(3):
        assert relative(covariances("batch", 64)[block], whole[block]) < 1e-10
        assert relative(covariances("batch", 16)[block], whole[block]) > 1e-4
        published = arrays("wpac")[f"A/block{block}/v_cov"]
        assert relative(covariances("batch", 16)[block][2], published) < 1e-8


@pytest.mark.parametrize("size", [0.01, 300.0])
def test_squared_score_of_half_precision(size):
    """Published: the square is taken in fp16, where it underflows (or overflows)."""
    generator = torch.Generator().manual_seed(0)
    x = (size * (1 + torch.rand(64, 8, generator=generator))).half()
    grad = (size * (1 + torch.rand(64, 8, generator=generator))).half()
    naive = (x * grad).square()
    assert (naive < 1e-6).all() or naive.isinf().all()
    exact = (x.double() * grad.double()).square().sum(0)
    assert relative(skd_kernels.taylor_scores(x, grad, power=2), exact) < 1e-6
