"""A whole forward and backward pass on the Triton kernels, interpreted; test_residual_stream.py runs this in its own
process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curves import curve
from helpers import digit_net, nested
from timm.layers import RmsNorm

import skd_kernels
from skd.training.dropping import drop_paths
from skd.vit import residual

# Four tokens, 16 channels: the interpreter is slow.
MODELS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "class token": ({"global_pool": "token", "class_token": True}, [8, 20, 16, 13]),
    "layer scale, RMSNorm": ({"init_values": 0.5, "norm_layer": RmsNorm, "fc_norm": False}, [0, 20, 8, 0]),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, narrow = MODELS[name]
    net = nested(digit_net(**changes).train(), narrow)
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 7])
    calls: list[str] = []
    original = residual.residual_norm

    def spy(*arguments: Any, **options: Any) -> Any:
        names = ("x", "branch", "weight", "bias")
        calls.append(skd_kernels.explain("residual_norm", *arguments[: len(names)], **options).chosen)
        return original(*arguments, **options)

    monkeypatch.setattr(residual, "residual_norm", spy)
    found = []
    for implementation in ("reference", "triton"):
        net.zero_grad()
        with drop_paths(net, 0.3, seed=1) as paths, skd_kernels.use(implementation):
            assert paths is not None
            paths.set(paths.masks(2, len(images)))
            loss = torch.nn.functional.cross_entropy(net(images, entry=torch.tensor(1)), labels)
            loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    assert calls == ["reference"] * 5 + ["triton"] * 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_kernels_train_as_slices_do() -> None:
    """The same draws, entries of every kind among them: whole steps, with the optimizer's updates in between."""
    options: dict[str, Any] = {"steps": 14, "images": 2, "amp_dtype": "float32"}
    found, expected = (curve(name, seed=0, **options) for name in ("triton", "slices"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
