"""WPAC (METHOD 1) against the published arithmetic in float64."""

import numpy as np
import pytest
import torch
from golden_data import (
    DEPTH,
    HEADS,
    MODULES,
    TOKENS,
    arrays,
    batches,
    build,
    forced,
    original,
    relative,
    transformed,
)
from internals import modules_of

import skd
import skd_kernels
from skd.convert import WpacStatistics, collect

EXACT = 1e-8
IMAGES, SEEN = 16, 64  # per batch; in the four batches of the statistics
HALF = skd.DropoutList(MODULES, [(16, 192) * DEPTH, (8, 192) * DEPTH])
BLOCKS = range(DEPTH)


def golden(key):
    return arrays("wpac")[f"A/{key}"]


def gathered(count):
    """(statistics of the first batches, the last features and gradients by module)."""
    model, statistics, taps = build(original()), WpacStatistics("batch"), {}

    def consume(info, feature, grad):
        statistics.add(info, feature, grad)
        taps[info.name] = feature, grad

    collect(model, modules_of(model), batches(count, IMAGES), consume, statistics.end_batch)
    return statistics, taps


@pytest.fixture(scope="module")
def first():
    return gathered(1)


@pytest.fixture(scope="module")
def statistics():
    return gathered(4)[0]


@pytest.fixture(scope="module")
def infos():
    return {info.name: info for info in modules_of(build(original()))}


@pytest.fixture(scope="module")
def converted():
    return skd.convert(build(original()), batches(4, IMAGES), centering="batch")


@pytest.fixture(scope="module")
def images():
    return batches(1, 96)[0][0]


def test_token_weights(first):
    feature, grad = first[1]["0.attn"]
    # One token per group: then the weight of a group is that token's.
    groups = (1, IMAGES * TOKENS * 3 * HEADS, 16)
    weight = skd_kernels.token_moments(feature.reshape(groups), grad.reshape(groups)).weight
    expected = golden("block0/batch0_token_weights")
    assert relative(weight.reshape(expected.shape), expected) < EXACT


@pytest.mark.parametrize("block", BLOCKS)
def test_covariance_of_one_batch(first, block):
    feature, grad = first[1][f"{block}.attn"]
    covariance = skd_kernels.weighted_covariance(feature.flatten(2, 3), grad.flatten(2, 3))
    q, k, v = covariance.unflatten(0, (3, HEADS))
    assert relative(v, golden(f"block{block}/v_cov_first_batch")) < EXACT
    assert relative(q + k, golden(f"block{block}/qk_cov_first_batch")) < EXACT


@pytest.mark.parametrize("block", BLOCKS)
def test_covariance_of_four_batches(statistics, infos, block):
    q, k, v = statistics.covariance(infos[f"{block}.attn"])
    assert relative(v, golden(f"block{block}/v_cov")) < EXACT
    assert relative(q + k, golden(f"block{block}/qk_cov")) < EXACT


@pytest.mark.parametrize("block", BLOCKS)
def test_importance_of_neurons(first, statistics, block):
    # Published: half the square, its mean over images and tokens, summed over batches.
    per_batch = 0.5 / (IMAGES * TOKENS)
    name = f"{block}.mlp"
    np.testing.assert_allclose(
        first[0].importance[name] * per_batch, golden(f"block{block}/mlp_imp_first_batch"), rtol=EXACT
    )
    np.testing.assert_allclose(statistics.importance[name] * per_batch, golden(f"block{block}/mlp_imp"), rtol=EXACT)


@pytest.mark.parametrize("block", BLOCKS)
def test_order_of_neurons(statistics, infos, block):
    order = statistics.transform(infos[f"{block}.mlp"])
    assert order.tolist() == golden(f"block{block}/mlp_perm").tolist()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("part", ["v", "qk"])
def test_principal_axes(statistics, infos, block, part):
    info = infos[f"{block}.attn"]
    q, k, v = statistics.covariance(info)
    covariance = (v if part == "v" else q + k) / (SEEN - 1)
    axes = getattr(statistics.transform(info), part[0])  # q and k have the same
    values = (axes.mT @ covariance @ axes).diagonal(dim1=-2, dim2=-1)
    expected_values, expected_axes = golden(f"block{block}/{part}_eigvals"), golden(f"block{block}/{part}_W")
    np.testing.assert_allclose(values, expected_values, rtol=EXACT)
    assert relative(axes.abs(), np.abs(expected_axes)) < EXACT
    rebuilt = np.einsum("hij,hj,hkj->hik", expected_axes, expected_values, expected_axes)
    assert relative(axes * values[:, None] @ axes.mT, rebuilt) < EXACT


def signs(actual, expected):
    """(3, H, D) signs that take the rows of `actual` qkv weights to those of `expected`."""
    products = (actual * expected).sum(-1).reshape(3, HEADS, 16)
    return products.sign()


@pytest.mark.parametrize("block", BLOCKS)
def test_transformed_attention_up_to_signs(converted, block):
    prefix = f"blocks.{block}.attn."
    ours = {key.removeprefix(prefix): value for key, value in converted.state_dict().items()}
    published = {key.removeprefix(prefix): torch.as_tensor(value) for key, value in transformed().items()}
    flip = signs(ours["qkv.weight"], published["qkv.weight"])
    assert torch.equal(flip[0], flip[1]), "q and k must turn together"
    rows, columns = flip.reshape(-1), flip[2].reshape(-1)
    assert relative(ours["qkv.weight"] * rows[:, None], published["qkv.weight"]) < EXACT
    assert relative(ours["qkv.bias"] * rows, published["qkv.bias"]) < EXACT
    assert relative(ours["proj.weight"] * columns, published["proj.weight"]) < EXACT


def test_all_other_weights_are_exactly_the_published_ones(converted):
    for key, expected in transformed().items():
        if ".attn.qkv." in key or ".attn.proj.weight" in key:
            continue
        assert torch.equal(converted.state_dict()[key], torch.as_tensor(expected).double()), key


def test_logits_before_and_after(converted, images):
    with torch.no_grad():
        assert relative(build(original())(images), golden("logits_original")) < EXACT
        assert relative(converted(images), golden("logits_transformed")) < EXACT
        assert relative(build(transformed())(images), golden("logits_transformed")) < EXACT


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_logits_with_half_of_every_head(converted, images, implementation):
    untouched = skd.SuperNet(build(original()))
    with torch.no_grad(), forced(implementation):
        for supernet, key in ((converted, "transformed"), (untouched, "original")):
            supernet.dropout_list = HALF
            assert relative(supernet(images, entry=1), golden(f"logits_{key}_trunc50")) < EXACT
            assert relative(supernet(images, entry=0), golden(f"logits_{key}")) < EXACT
