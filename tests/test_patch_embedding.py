"""The patch embedding as one product: it equals timm's convolution, and is used only where the two are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import perturb
from timm.layers import LayerNorm, PatchEmbed

from skd.vit.patches import embed_patches, is_one_product, product_of_patches

FITTING: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm, no bias": {"norm_layer": LayerNorm, "bias": False},
    "oblong": {"img_size": (16, 24), "patch_size": (4, 8)},
    "any size": {"strict_img_size": False},
    "no size": {"img_size": None},
    "whole patches, padded otherwise": {"dynamic_img_pad": True},
    "rows and columns": {"output_fmt": "NHWC"},
    "one row": {"output_fmt": "NLC"},
}


def made(**changes: Any) -> Any:
    torch.manual_seed(0)
    layer = PatchEmbed(**{"img_size": (16, 24), "patch_size": 8, "in_chans": 3, "embed_dim": 10, **changes}).double()
    perturb(layer)
    return layer


def images(height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", FITTING.values(), ids=FITTING)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_product_is_the_convolution(changes: dict[str, Any], layout: torch.memory_format) -> None:
    layer, found = made(**changes), []
    assert is_one_product(layer, images())
    for compute in (layer, lambda x: product_of_patches(layer, x)):
        x = images().to(memory_format=layout).requires_grad_()
        output = compute(x)
        grads = torch.autograd.grad(output.pow(3).sum(), [x, *layer.parameters()])
        found.append((output, *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_under_autocast_both_round_what_they_read() -> None:
    layer = made().float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = product_of_patches(layer, images().float()), layer(images().float())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


OTHERS: dict[str, Any] = {
    "another size than the layer insists on": (made(), (32, 24)),
    "part of a patch": (made(strict_img_size=False), (20, 24)),
    "a padded part": (made(dynamic_img_pad=True, strict_img_size=False), (20, 24)),
    "channels first": (made(flatten=False), (16, 24)),
    "channels first in a row": (made(output_fmt="NCL"), (16, 24)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_timms_layer_does_otherwise_is_left_to_it(name: str) -> None:
    layer, size = OTHERS[name]
    assert not is_one_product(layer, images(*size))


@pytest.mark.parametrize(
    "changes",
    [
        {"stride": 4},
        {"padding": 1},
        {"dilation": 2, "kernel_size": 4, "padding": 0},
        {"groups": 2, "in_channels": 4},
        {"kernel_size": 4, "stride": 4},
    ],
    ids=str,
)
def test_another_convolution_is_left_alone(changes: dict[str, Any]) -> None:
    layer = made()
    layer.proj = torch.nn.Conv2d(**{"in_channels": 3, "out_channels": 10, "kernel_size": 8, "stride": 8} | changes)
    assert not is_one_product(layer, images())


def test_layers_that_somebody_watches_are_called() -> None:
    for name in ("", "proj"):
        layer = made()
        handle = layer.get_submodule(name).register_forward_hook(lambda *_: None)
        assert not is_one_product(layer, images())
        handle.remove()
        assert is_one_product(layer, images())
    assert not is_one_product(torch.nn.Sequential(layer), images())


def test_a_cpu_keeps_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = made(), []
    monkeypatch.setattr("skd.vit.patches.product_of_patches", lambda *_: calls.append("product"))
    torch.testing.assert_close(embed_patches(layer, images()), layer(images()), rtol=0, atol=0)
    assert not calls
