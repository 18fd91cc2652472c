"""The forward pass hands on the residual stream with its normed form: its results, and which layers it calls.

An empty hook on a norm makes that norm a layer that is called by itself. A copy in which all norms have such hooks is
the reference, with which results are compared bit for bit.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
from helpers import nested, perturb, random_batches, tiny_vit
from interpretation import run_interpreted
from timm.layers import LayerNorm, LayerNormFp32, RmsNorm
from timm.models.vision_transformer import ResPostBlock
from timm.models.vitamin import GeGluMlp

import skd
from skd.training.dropping import drop_paths
from skd.vit import residual

EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def of_timm(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **EVA, mlp_ratio=1.5, **changes).eval()
    perturb(model)
    return model


tiny = partial(tiny_vit, torch.float32)
MODELS: dict[str, Callable[[], Any]] = {
    "class token": tiny,
    "layer scale, average": partial(tiny, init_values=0.5, global_pool="avg"),
    "RMSNorm, norms of Q and K": partial(tiny, norm_layer=RmsNorm, qk_norm=True),
    "attention pool, headless": partial(tiny, global_pool="map", num_classes=0),
    "no final norm": partial(tiny, final_norm=False),
    "post-norm": partial(tiny, block_fn=ResPostBlock),
    "DINOv3": partial(of_timm, "vit_small_patch16_dinov3_qkvb", init_values=0.5),
    "rotary, class token": partial(of_timm, "vit_base_patch16_rope_224"),
    "EVA-02": partial(of_timm, "eva02_base_patch14_224"),
    "BEiT": partial(of_timm, "beit_base_patch16_224", init_values=0.5),
}
IMAGES = random_batches(dtype=torch.float32)[0][0]
every_model = pytest.mark.parametrize("name", MODELS)


def with_entries(name: str) -> skd.SuperNet:
    """The full network, all of it narrower, its first and last module skipped, and everything skipped."""
    net = skd.SuperNet(MODELS[name]())
    narrow = [info.full_width if info.binary else info.full_width - 1 for info in net.infos]
    return nested(net, narrow, [0, *narrow[1:3], 0], [0] * 4)


def by_layers(net: skd.SuperNet) -> skd.SuperNet:
    """A copy whose norms are watched, so that every layer is called."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm | RmsNorm):
            module.register_forward_hook(lambda *_: None)
    return net


def results(net: skd.SuperNet, entry: Any, context: Any = None) -> list[torch.Tensor]:
    """The output and all gradients."""
    net.zero_grad()
    with nullcontext() if context is None else context:
        output = net(IMAGES, entry=entry)
    output.float().pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    return [output.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each call of residual_norm whether it adds a branch."""
    calls: list[bool] = []
    original = residual.residual_norm

    def spy(x: torch.Tensor, branch: torch.Tensor | None, *rest: Any, **options: Any) -> Any:
        calls.append(branch is not None)
        return original(x, branch, *rest, **options)

    monkeypatch.setattr(residual, "residual_norm", spy)
    yield calls


@every_model
@pytest.mark.parametrize("on_device", [False, True])
def test_it_is_what_the_layers_compute_to_the_bit(name: str, on_device: bool) -> None:
    """But for gradients through RMSNorm: it is several operations, and its gradients are added in another order."""
    net = with_entries(name)
    layers, exact = by_layers(net), {} if "RMSNorm" in name else {"rtol": 0, "atol": 0}
    for entry in range(len(net.dropout_list)):
        given = torch.tensor(entry) if on_device else entry
        found, expected = results(net, given), results(layers, given)
        assert torch.equal(found[0], expected[0])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **exact)


@every_model
def test_under_autocast_it_is_what_the_layers_compute(name: str) -> None:
    """The normed form has the dtype of the next product; the last one, which may have other readers, float32.

    Where plain attention asks for the class token alone, its tokens are a part of a tensor in half precision, for
    which the library adds the bias apart.
    """
    net = with_entries(name)
    autocast, layers = torch.autocast("cpu", torch.bfloat16), by_layers(net)
    for entry in range(len(net.dropout_list)):
        found, expected = results(net, entry, autocast), results(layers, entry, autocast)
        assert found[0].dtype == expected[0].dtype
        assert torch.equal(found[0], expected[0]) or name in ("class token", "no final norm")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * max(float(other.abs().max()), 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_an_mlp_begins_with_reads_what_its_linear_layers_read(dtype: torch.dtype) -> None:
    """The rounded form, under autocast; layer by layer it would read float32."""
    net, seen = skd.SuperNet(tiny(mlp_layer=GeGluMlp)), list[torch.dtype]()
    layers = by_layers(net)
    for one in (net, layers):
        one.model.blocks[0].mlp.norm.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found, expected = net(IMAGES), layers(IMAGES)
    assert seen == [dtype, torch.float32]
    torch.testing.assert_close(found, expected, **({"rtol": 0.05, "atol": 0.02} if dtype != torch.float32 else {}))


def test_sums_and_norms_are_one_operation(sums: list[bool]) -> None:
    """Four sums, each with the norm of what comes next, and the first norm by itself."""
    skd.SuperNet(tiny())(IMAGES)
    assert sums == [False, True, True, True, True]


@pytest.mark.parametrize("name", ["post-norm", "no final norm"])
def test_sums_before_no_norm_are_sums(name: str, sums: list[bool]) -> None:
    skd.SuperNet(MODELS[name]())(IMAGES)
    assert sums == ([] if name == "post-norm" else [False, True, True, True])


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((16, 0, 16, 0), [False, True, True]),
        ((0, 72, 16, 0), [False, True, True]),
        ((0, 0, 16, 0), [False, True]),
        # Of the last block's input only the class token is read: norming all tokens for that would be a waste.
        ((16, 0, 0, 72), [False, True]),
        ((16, 0, 0, 0), [False]),
        ((0, 0, 0, 0), []),
    ],
)
def test_nothing_is_normed_for_what_is_skipped(
    widths: tuple[int, ...], expected: list[bool], sums: list[bool]
) -> None:
    net = nested(skd.SuperNet(tiny()), widths)
    net(IMAGES, entry=1)
    assert sums == expected


def test_timms_own_forward_goes_the_same_way_within_a_block(sums: list[bool]) -> None:
    net = skd.SuperNet(tiny())
    torch.testing.assert_close(net.model(IMAGES), tiny()(IMAGES))
    assert sums == [True, True]


# Who is called --------------------------------------------------------------------------------------

LAYERS = ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "norm", "blocks.0.ls1", "blocks.1.drop_path2")
KINDS: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "forward": lambda layer, note: layer.register_forward_hook(note),
    "before": lambda layer, note: layer.register_forward_pre_hook(note),
    "backward": lambda layer, note: layer.register_full_backward_hook(note),
    "before backward": lambda layer, note: layer.register_full_backward_pre_hook(note),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_layer_are_called_and_the_others_stay_fused(layer: str, kind: str, sums: list[bool]) -> None:
    net, calls = skd.SuperNet(tiny(init_values=0.5)), []
    expected = results(net, 0)
    sums.clear()
    handle = KINDS[kind](net.model.get_submodule(layer), lambda *_: calls.append(1))
    found = results(net, 0)
    assert len(calls) == 1 and len(sums) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    handle.remove()
    results(net, 0)
    assert len(calls) == 1 and len(sums) == 4 + 5


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forward_that_somebody_has_replaced_is_called(layer: str) -> None:
    net = skd.SuperNet(tiny(init_values=0.5))
    expected, part = net(IMAGES), net.model.get_submodule(layer)
    own = part.forward
    part.forward = lambda x: own(2 * x) if "norm" not in layer else own(x) + 1
    assert (net(IMAGES) - expected).abs().max() > 1e-3


def test_hooks_of_a_block_see_the_residual_stream(sums: list[bool]) -> None:
    """Tensors (B, N, C) in and out, those of timm's block, and what a hook returns takes the output's place."""
    model, seen, expected = tiny(global_pool="avg"), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: expected.append((inputs[0], output)))
    model(IMAGES)
    net = skd.SuperNet(tiny(global_pool="avg"))
    before = net(IMAGES)
    for block in net.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    sums.clear()
    assert torch.equal(net(IMAGES), before)
    assert sums == [True, True]  # within the blocks
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    net.model.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert (net(IMAGES) - before).abs().max() > 1e-3


def test_a_wrapped_block_takes_and_gives_tensors(sums: list[bool]) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            assert type(x) is torch.Tensor
            return 1.0 * self.inner(x, *rest)

    net = skd.SuperNet(tiny())
    expected = net(IMAGES)
    net.model.blocks[0] = Wrapper(net.model.blocks[0])
    sums.clear()
    torch.testing.assert_close(net(IMAGES), expected)
    assert sums == [True, True, True]


# Layers that are called, since they are something else ----------------------------------------------


class Doubled(LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def fast() -> torch.nn.Module:
    norm = LayerNorm(48)
    norm._fast_norm = True
    return norm


@pytest.mark.parametrize(
    ("norm", "known"),
    [
        (torch.nn.LayerNorm(48), True),
        (torch.nn.LayerNorm(48, bias=False), True),
        (torch.nn.LayerNorm(48, elementwise_affine=False), True),
        (torch.nn.RMSNorm(48, eps=1e-6), True),
        (RmsNorm(48), True),
        (torch.nn.RMSNorm(48), False),  # its eps depends on the dtype
        (torch.nn.LayerNorm((17, 48)), False),
        (LayerNormFp32(48), False),
        (Doubled(48), False),
        (fast(), False),
        (torch.nn.Identity(), False),
        (torch.nn.LayerNorm(48).double(), False),
    ],
)
def test_which_norms_are_computed_with_the_sum(norm: torch.nn.Module, known: bool, sums: list[bool]) -> None:
    model = tiny()
    model.blocks[0].norm2 = norm
    found = skd.SuperNet(model) if known or type(norm) is not torch.nn.LayerNorm else None
    described = residual.Norm.of(norm)
    assert (described is not None and described.takes(IMAGES)) == known
    if found is not None:
        torch.testing.assert_close(found(IMAGES), model(IMAGES))
        assert len(sums) == (5 if known else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_stream_in_half_precision_keeps_its_dtype(dtype: torch.dtype, sums: list[bool]) -> None:
    net = skd.SuperNet(tiny_vit(dtype))
    assert net(IMAGES.to(dtype)).dtype == dtype
    assert len(sums) == (5 if dtype == torch.float64 else 0)


def test_timms_own_stochastic_depth_draws_its_masks(sums: list[bool]) -> None:
    """In training it is called, so that the same random numbers are drawn in the same places; else it is nothing."""
    net = skd.SuperNet(tiny(drop_path_rate=0.5, global_pool="avg", fc_norm=False))
    net(IMAGES)
    assert len(sums) == 5
    found = []
    for one in (net.train(), by_layers(net).train()):
        torch.manual_seed(1)
        found.append(one(IMAGES))
    assert torch.equal(*found)


@pytest.mark.parametrize("on_device", [False, True])
def test_counted_masks_are_factors_of_the_sum(on_device: bool, sums: list[bool]) -> None:
    net = skd.SuperNet(tiny(init_values=0.5)).train()
    layers, found = by_layers(net), []
    for one in (net, layers):
        with drop_paths(one, 0.9, seed=3) as paths:
            assert paths is not None
            paths.set(paths.masks(5, len(IMAGES)))
            found.append(results(one, torch.tensor(0) if on_device else 0))
    assert len(sums) == 5
    assert not torch.equal(found[0][0], net.eval()(IMAGES))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Around the forward pass -----------------------------------------------------------------------------


@every_model
def test_blocks_that_are_computed_again(name: str, sums: list[bool]) -> None:
    """A block takes a stream and gives one; its sums run twice, and every gradient is the same."""
    net = with_entries(name)
    for entry in range(len(net.dropout_list)):
        net.grad_checkpointing = False
        sums.clear()
        expected = results(net, entry)
        once = len(sums)
        net.grad_checkpointing = True
        sums.clear()
        found = results(net, entry)
        assert len(sums) == 2 * once - (once > 0)  # the first norm is before the blocks
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_copies_and_pickles() -> None:
    net = with_entries("layer scale, average")
    expected = net(IMAGES, entry=1)
    assert torch.equal(copy.deepcopy(net)(IMAGES, entry=1), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(IMAGES, entry=1), expected)


def test_gradients_of_each_image_by_torch_func() -> None:
    net = skd.SuperNet(tiny_vit(init_values=0.5))
    parameters, images = dict(net.named_parameters()), IMAGES.double()

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    net(images).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name].sum(0), parameter.grad)


@pytest.mark.parametrize("recomputes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_graph_holds_the_whole_pass(recomputes: bool) -> None:
    net = with_entries("layer scale, average")
    net.grad_checkpointing = recomputes
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for entry in range(3):
        given = torch.tensor(entry)
        expected = results(net, given)
        net.zero_grad()
        compiled(IMAGES, entry=given).pow(2).sum().backward()
        for parameter, want in zip(net.parameters(), expected[1:], strict=True):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5)


def test_with_the_kernels_it_is_what_the_reference_computes() -> None:
    run_interpreted("../interpreted_network.py")


@pytest.mark.slow
def test_with_the_kernels_more_networks_compute_the_same() -> None:
    run_interpreted("../interpreted_network.py", slow=True)
