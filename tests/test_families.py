"""Transformers whose attention is cut by whole heads (Eva) or not at all (Beit) run, train, are saved and exported.

That each name of timm's registry converts and extracts exactly is in test_architectures.py.
"""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from helpers import QUIET, assert_close, nested, perturb, random_batches, training_config, weights
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention

import skd
from skd.demo.baselines import METHODS, coordinate_scores, reordered

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3_qkvb": {"mlp_ratio": 1.5},  # one layer for q, k and v, with biases in pieces
    "vit_small_patch16_dinov3": {"mlp_ratio": 1.5},
    "eva02_base_patch14_224": {"scale_mlp": False, "mlp_ratio": 1.5},  # three layers
    "vit_base_patch16_rope_224": {"mlp_ratio": 1.5, "num_reg_tokens": 1},  # token pooling
    "vit_base_patch16_sapiens2": {"num_kv_heads": (3, 1), "mlp_ratio": 1.5},  # shared keys and values in one block
    "vit_base_patch16_rope_mixed_224": {"mlp_ratio": 1.5},  # angles of each head
    "beit_base_patch16_224": {"mlp_ratio": 1.5},
}
BY_HEADS = [name for name in MODELS if "mixed" not in name and "beit" not in name]
every_model = pytest.mark.parametrize("name", MODELS)
by_heads = pytest.mark.parametrize("name", BY_HEADS)
# One of each kind of attention, for what takes long.
FEW = ("vit_small_patch16_dinov3_qkvb", "eva02_base_patch14_224", "beit_base_patch16_224")
# Neurons and whether an attention is whole, cut (where it can be) or skipped, block by block.
ENTRIES = [("cut", 40, "cut", 24), ("skipped", 40, "cut", 0), ("skipped", 0, "cut", 0), ("skipped", 0) * 2]


def small(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A perturbed two-block model with 3 heads of 16 and 72 neurons."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZE, **MODELS[name], init_values=0.5).to(dtype).eval()
    perturb(model)
    return model


def listed(supernet: skd.SuperNet) -> skd.SuperNet:
    """With the `ENTRIES` after the full network."""
    rows = []
    for entry in ENTRIES:
        widths = [{"cut": 2, "skipped": 0}.get(str(kept), kept) for kept in entry]
        pairs = zip(supernet.infos, widths, strict=True)
        rows.append([info.full_width if info.binary and width else width for info, width in pairs])
    return nested(supernet, *rows)


@every_model
def test_a_width_on_the_device_is_that_width(name: str) -> None:
    """Outputs, gradients and scores; what lies past the width has gradients of zero."""
    supernet = listed(skd.SuperNet(small(name)))
    images = random_batches()[0][0]
    for entry in range(1 + len(ENTRIES)):
        found = []
        for given in (entry, torch.tensor(entry)):
            net = copy.deepcopy(supernet)
            net.scores = buffers(net)
            output = net(images, entry=given)
            output.square().sum().backward()
            gradients = {key: parameter.grad for key, parameter in net.named_parameters()}
            assert all(gradient is not None for gradient in gradients.values())
            scores = [buffer for buffer in net.scores if buffer is not None]
            found.append((output, gradients, scores))
        (first, gradients, scores), (second, others, more) = found
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, others, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scores, more, rtol=1e-10, atol=1e-12)
        check_no_gradient_past(supernet, entry, gradients)


def buffers(net: skd.SuperNet) -> list[torch.Tensor | None]:
    return [None if info.binary else torch.zeros(info.score_shape, dtype=torch.float64) for info in net.infos]


def check_no_gradient_past(supernet: skd.SuperNet, entry: int, gradients: dict[str, torch.Tensor]) -> None:
    for info, width in zip(supernet.infos, supernet.widths(entry), strict=True):
        for key, (axis, numbers) in info.coordinates(supernet.model).items():
            past = gradients[f"model.{info.path}.{key}"].index_select(axis, (numbers >= width).nonzero()[:, 0])
            assert not past.any()


@by_heads
def test_scores_are_the_summed_products_at_the_projections(name: str) -> None:
    """Of timm's own network, by hooks of this test, and the heads are in their order after the conversion."""
    model, batches = small(name), random_batches()
    attentions = skd.SuperNet(model).infos[::2]
    expected = {info.name: score_by_hand(model, info, batches) for info in attentions if not info.binary}
    scores, _ = skd.importance(skd.SuperNet(model), batches)
    converted, _ = skd.importance(skd.convert(model, batches), batches)
    for info in attentions:
        if info.binary:
            assert np.array_equal(scores[info.name], np.ones(3))
            continue
        np.testing.assert_allclose(scores[info.name], expected[info.name], rtol=1e-9)
        np.testing.assert_allclose(converted[info.name], np.sort(expected[info.name])[::-1], rtol=1e-9)


def score_by_hand(model: Any, info: Any, batches: Any) -> np.ndarray:
    """Sum over images, tokens, q, k, v and a head's coordinates of |x g|, with what timm's layers give."""
    attn, linear = model.blocks[info.block].attn, torch.nn.functional.linear
    layers = [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj, attn.v_proj]
    seen: list[torch.Tensor] = []

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        output = linear(x, weight, bias)
        if any(weight is layer.weight for layer in layers):
            output.retain_grad()
            seen.append(output)
        return output

    with mock.patch("torch.nn.functional.linear", spy):
        for images, labels in batches:
            model(images).gather(1, labels[:, None]).sum().backward()
    products = [(output * output.grad).abs().flatten(0, 1).sum(0).detach() for output in seen]
    return torch.cat(products).unflatten(0, (-1, 3, 16)).sum((0, 2)).numpy()


@every_model
def test_a_file_holds_every_entry(name: str, tmp_path: Path) -> None:
    supernet = listed(skd.convert(small(name, torch.float32), random_batches(dtype=torch.float32)))
    images = random_batches(dtype=torch.float32)[0][0]
    skd.save(supernet, tmp_path / "supernet.safetensors")
    again = skd.load(tmp_path / "supernet.safetensors")
    for entry in range(1 + len(ENTRIES)):
        sub = skd.extract(supernet, entry=entry)
        skd.save(sub, tmp_path / "sub.safetensors")
        loaded = skd.load(tmp_path / "sub.safetensors")
        with torch.no_grad():
            assert torch.equal(loaded(images), sub(images))
            torch.testing.assert_close(again(images, entry=entry), sub(images), rtol=1e-5, atol=1e-5)
        assert skd.cost(loaded) == skd.cost(sub) == skd.cost(supernet, entry=entry)


def test_an_eva_attention_with_fewer_heads_becomes_timms_other_class() -> None:
    """K's part of the joint bias is zeros: it belongs to no parameter of EvaAttention, and is counted where it is."""
    supernet = listed(skd.SuperNet(small("vit_small_patch16_dinov3_qkvb")))
    whole, cut = skd.extract(supernet, entry=0), skd.extract(supernet, entry=1)
    assert {type(block.attn) for block in whole.blocks} == {EvaAttention}
    assert {type(block.attn) for block in cut.blocks} == {AttentionRope}
    q, k, v = cut.blocks[0].attn.qkv.bias.chunk(3)
    assert not k.any() and q.any() and v.any()
    again = skd.SuperNet(cut)
    torch.testing.assert_close(again(random_batches()[0][0]), cut(random_batches()[0][0]))


def test_one_built_by_hand_is_converted_but_not_saved(tmp_path: Path) -> None:
    model = Eva(**SIZE, mlp_ratio=1.5).double().eval()
    supernet = skd.convert(model, random_batches())
    with pytest.raises(ValueError, match=r"built without timm\.create_model"):
        skd.save(supernet, tmp_path / "supernet.safetensors")
    assert not list(tmp_path.iterdir())


@every_model
def test_timms_own_forward_runs_on_the_blocks_of_a_super_network(name: str) -> None:
    model, images = small(name), random_batches()[0][0]
    supernet = skd.SuperNet(model)
    torch.testing.assert_close(supernet.model(images), model(images), rtol=1e-12, atol=1e-12)
    if "beit" not in name:
        with pytest.raises(ValueError, match="attn_mask: the blocks of a super-network do not take it"):
            supernet.model(images, attn_mask=torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("changes", [{}, {"decay": "expected", "drop_path": 0.3, "grad_checkpointing": True}])
def test_training(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """It learns, grows its list, stops and goes on to the same weights."""
    data, settings = random_batches(4), training_config(batch_size=4, mixup=0.0, cutmix=0.0, **changes)

    def run(out: str, epochs: int, **more: Any) -> dict[str, torch.Tensor]:
        net = skd.convert(small(name), random_batches(1))
        config = settings.changed(epochs=epochs)
        skd.train(net, data, data, config, calibration=data[:1], console=QUIET, out=tmp_path / out, **more)
        assert len(net.dropout_list) > 3
        return weights(net)

    whole = run("whole", 3)
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert_close(run("whole", 3, resume="auto"), whole)


def test_recomputed_activations_change_nothing() -> None:
    """Also where the blocks share a trained bias of positions."""
    for name in ("vit_base_patch16_rope_mixed_224", "vit_small_patch16_dinov3"):
        supernet, found = listed(skd.SuperNet(small(name))), []
        for recompute in (False, True):
            supernet.grad_checkpointing = recompute
            supernet.zero_grad()
            supernet(random_batches()[0][0], entry=1).square().sum().backward()
            found.append({key: parameter.grad.clone() for key, parameter in supernet.named_parameters()})
        assert_close(found[1], found[0])


@by_heads
def test_one_compiled_graph_serves_every_entry(name: str) -> None:
    supernet = listed(skd.SuperNet(small(name, torch.float32)))
    images, graphs = random_batches(dtype=torch.float32)[0][0], []

    def counted(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(supernet, backend=counted, fullgraph=True)
    with torch.no_grad():
        for entry in range(1 + len(ENTRIES)):
            torch.testing.assert_close(
                compiled(images, entry=torch.tensor(entry)), supernet(images, entry=entry), rtol=1e-4, atol=1e-4
            )
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("eva02_base_patch14_224", 1),
        ("beit_base_patch16_224", 1),
        pytest.param("vit_small_patch16_dinov3_qkvb", 1, marks=pytest.mark.slow),
        *(pytest.param(name, entry, marks=pytest.mark.slow) for name in FEW for entry in (2, 4)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_cut_models_are_exported(name: str, entry: int, tmp_path: Path) -> None:
    """torch.export and ONNX, each run again with another number of images.

    Of PyTorch's exporters to ONNX the older cannot trace timm's Eva and the newer not its Beit, cut or not.
    """
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sub = skd.extract(listed(skd.SuperNet(small(name, torch.float32))), entry=entry)
    images, path = random_batches(dtype=torch.float32)[0][0], str(tmp_path / "sub.onnx")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    file = io.BytesIO()
    torch.export.save(torch.export.export(sub, (images,), dynamic_shapes=shapes), file)
    file.seek(0)
    program = torch.export.load(file).module()
    newer = {"dynamo": True, "dynamic_shapes": shapes}
    older = {"dynamo": False, "dynamic_axes": {"images": {0: "batch"}}}
    options = older if "beit" in name else newer
    torch.onnx.export(sub, (images,), path, input_names=["images"], verbose=False, **options)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for some in (images, images[:3]):
        expected = sub(some).detach()
        torch.testing.assert_close(program(some), expected, rtol=1e-5, atol=1e-5)
        found = torch.from_numpy(session.run(None, {"images": some.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_model
@pytest.mark.parametrize("method", METHODS)
def test_every_order_of_coordinates_keeps_the_function(name: str, method: str) -> None:
    model, batches = small(name), random_batches()
    ordered = reordered(model, batches, method)
    torch.testing.assert_close(ordered(batches[0][0]), model(batches[0][0]), rtol=1e-10, atol=1e-10)


def test_reading_a_model_leaves_functions_that_were_put_into_it() -> None:
    """An attention's own `forward`, as tools that patch models set it, is there again."""
    model = small("vit_small_patch16_dinov3_qkvb")
    attn = model.blocks[0].attn
    attn.forward = partial(type(attn).forward, attn)
    patched = attn.forward
    coordinate_scores(model, random_batches(), "taylor")
    assert attn.forward is patched
    del attn.forward
    coordinate_scores(model, random_batches(), "taylor")
    assert "forward" not in vars(attn)


def test_a_model_with_nothing_to_read_has_no_scores() -> None:
    nothing = skd.extract(listed(skd.SuperNet(small("beit_base_patch16_224"))), entry=len(ENTRIES))
    assert coordinate_scores(nothing, random_batches(), "taylor") == {}


def test_a_cut_attention_is_computed_as_the_whole_one() -> None:
    model = small("vit_small_patch16_dinov3_qkvb")
    for block in model.blocks:
        block.attn.fused_attn = False
    cut = skd.extract(listed(skd.SuperNet(model)), entry=1)
    assert not any(block.attn.fused_attn for block in cut.blocks)


def test_fewer_blocks_than_the_model_was_built_with() -> None:
    model = small("vit_base_patch16_rope_mixed_224")
    model.prune_intermediate_layers([0], prune_head=False)
    images = random_batches()[0][0]
    torch.testing.assert_close(skd.convert(model, random_batches())(images), model(images))


def test_tokens_that_the_head_does_not_read_ask_nothing_in_the_last_block() -> None:
    queries: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        queries.append(q.shape[2])
        return attend(q, *rest, **options)

    supernet = skd.SuperNet(small("vit_base_patch16_rope_224"))
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", spy):
        supernet(random_batches()[0][0])
    assert queries == [17 + 1, supernet.tokens_read]


@every_model
def test_another_image_size_is_set_before_cutting(name: str) -> None:
    """Prices follow, also to a grid of other sides with as many patches."""
    for size in ((64, 64), (16, 64)):
        supernet = listed(skd.SuperNet(small(name)))
        before = skd.cost(supernet)
        supernet.model.set_input_size(size)
        sub = skd.extract(supernet, entry=2)
        images = random_batches(pixels=64)[0][0][..., : size[0], :]
        torch.testing.assert_close(sub(images), supernet(images, entry=2))
        assert skd.cost(sub) == skd.cost(supernet, entry=2)
        assert (skd.cost(supernet).macs > before.macs) == (size == (64, 64))
