"""A whole forward and backward pass on the Triton kernels, interpreted; test_residual_stream.py runs this in its own
process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from curves import curve
from helpers import digit_net, nested
from timm.layers import RmsNorm

import skd
import skd_kernels
from skd.training.dropping import drop_paths
from skd.vit import residual
from skd_kernels.gpu.launch import watch

# Four tokens, 16 channels: the interpreter is slow.
MODELS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "class token": ({"global_pool": "token", "class_token": True}, [8, 20, 16, 13]),
    "layer scale, RMSNorm": ({"init_values": 0.5, "norm_layer": RmsNorm, "fc_norm": False}, [0, 20, 8, 0]),
    "no output bias": ({"proj_bias": False, "fc_norm": False}, [8, 0, 0, 13]),
    "norms of Q and K": ({"qk_norm": True, "fc_norm": False}, [0, 20, 16, 0]),
}
# Modules that are computed by their own layers, and add their bias themselves.
WHOLE = {"norms of Q and K": ("0.attn", "1.attn")}
IMAGES, LABELS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7])


def network(name: str) -> skd.SuperNet:
    changes, narrow = MODELS[name]
    return nested(digit_net(**changes).train(), narrow)


def last_layer(net: skd.SuperNet, info: Any) -> Any:
    layer = info.of(net.model)
    return layer.proj if info.kind == "attn" else layer.fc2


def step(net: torch.nn.Module, entry: Any) -> list[torch.Tensor]:
    """The loss and the gradients of all parameters."""
    net.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(IMAGES, entry=entry), LABELS)
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    return [loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options of each call of residual_norm, with what it gets and the implementation that runs."""
    found: list[dict[str, Any]] = []
    original = residual.residual_norm

    def spy(*arguments: Any, **options: Any) -> Any:
        names = ("x", "branch", "weight", "bias")
        chosen = skd_kernels.explain("residual_norm", *arguments[: len(names)], **options).chosen
        found.append({**dict(zip(names, arguments, strict=True)), **options, "chosen": chosen})
        return original(*arguments, **options)

    monkeypatch.setattr(residual, "residual_norm", spy)
    yield found


@pytest.mark.parametrize(
    ("name", "on_device"),
    [
        *((name, True) for name in MODELS),
        ("class token", False),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in list(MODELS)[1:]),
    ],
)
def test_loss_and_gradients(name: str, on_device: bool, calls: list[dict[str, Any]]) -> None:
    """Kernels add output biases with the sums; then none reads a gradient only to add up its columns."""
    net, found, launched = network(name), [], list[str]()
    entry = torch.tensor(1) if on_device else 1
    for implementation in ("reference", "triton"):
        with drop_paths(net, 0.3, seed=1) as paths, skd_kernels.use(implementation):
            assert paths is not None
            paths.set(paths.masks(2, len(IMAGES)))
            with watch(lambda name, _: launched.append(name)):
                found.append(step(net, entry))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "residual_norm_gradient_kernel" in launched and "column_sums_kernel" not in launched
    middle = len(calls) // 2
    assert [call["chosen"] for call in calls] == ["reference"] * middle + ["triton"] * middle
    assert not any("branch_bias" in call or "branch_width" in call for call in calls[:middle])
    sums = iter(call for call in calls[middle:] if call["branch"] is not None)
    for info, width in zip(net.infos, net.widths(1), strict=True):
        bias = last_layer(net, info).bias
        assert bias is None or bool(bias.grad.any()) == (width > 0), info.name
        if width or on_device:
            call, expected = next(sums), None if info.name in WHOLE.get(name, ()) else bias
            assert call.get("branch_bias") is expected is info.output_bias(net.model.blocks[info.block])
            told = call.get("branch_width")
            assert (told is None) if expected is None or not on_device else int(told) == width
    assert not list(sums)


def test_the_last_block_works_on_the_class_token_alone(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its attention's queries on: the sum, the norm, the MLP, the sum and norm after it, and their gradients."""
    net, tokens, rows = network("class token"), list[int](), list[int]()
    original = skd_kernels.masked_mlp

    def mlp(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        tokens.append(x.shape[1])
        return original(x, *rest, **options)

    def look(name: str, arguments: dict[str, Any]) -> None:
        if name == "residual_norm_gradient_kernel":
            rows.append(arguments["rows"])

    monkeypatch.setattr("skd.vit.mlp.masked_mlp", mlp)
    with skd_kernels.use("triton"), watch(look):
        step(net, torch.tensor(1))
    assert [(*call["x"].shape[:2],) for call in calls] == [(2, 5)] * 3 + [(2, 1)] * 2
    assert tokens == [5, 1] and rows == [2, 2, 10, 10, 10]


def test_one_compiled_graph_serves_every_width() -> None:
    net = nested(digit_net(depth=1, init_values=0.5, norm_layer=RmsNorm, fc_norm=False).train(), [0, 13])
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with skd_kernels.use("triton"):
        for entry in range(2):
            expected = step(net, torch.tensor(entry))
            with torch.compiler.set_stance("fail_on_recompile" if entry else "default"):
                found = step(compiled, torch.tensor(entry))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_kernels_train_as_slices_do() -> None:
    """The same draws, entries of every kind among them: whole steps, with the optimizer's updates in between."""
    options: dict[str, Any] = {"steps": 4, "images": 2, "amp_dtype": "float32"}
    found, expected = (curve(name, seed=0, **options) for name in ("triton", "slices"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
