"""A whole forward and backward pass on the Triton kernels, interpreted; test_residual_stream.py runs this in its own
process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import nested, random_batches, tiny_vit
from timm.layers import RmsNorm

import skd
import skd_kernels
from skd.training.dropping import drop_paths
from skd.vit import residual

MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "layer scale, RMSNorm": {"init_values": 0.5, "norm_layer": RmsNorm, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entry", [0, 1, 2])
def test_loss_and_gradients(name: str, entry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = skd.SuperNet(tiny_vit(torch.float32, **MODELS[name])).train()
    net = nested(net, [8, 40, 16, 33], [0, 40, 8, 0])
    images, labels = random_batches(size=2, dtype=torch.float32)[0]
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
            loss = torch.nn.functional.cross_entropy(net(images, entry=torch.tensor(entry)), labels)
            loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    assert calls == ["reference"] * 5 + ["triton"] * 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
