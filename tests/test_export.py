"""Extracted models leave: every entry, down to nothing left, exports, quantizes, prunes, pickles and trains.

Without onnx, onnxruntime, onnxscript or torchao the tests that need them are skipped.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nested, random_batches, tiny_vit
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn.utils import prune

import skd

# Of `tiny_vit`'s attention (16) and MLP (72), block by block.
ENTRIES = {
    "full": [16, 72, 16, 72],
    "narrow": [8, 24, 16, 5],
    "MLP skipped": [16, 0, 8, 24],
    "attention skipped": [0, 24, 8, 24],
    "block skipped": [0, 0, 8, 24],
    "both, crosswise": [8, 0, 0, 24],
    "nothing left": [0, 0, 0, 0],
}
MODELS = {
    "plain": tiny_vit,
    "post-norm": partial(tiny_vit, block_fn=ResPostBlock, init_values=0.1),
    "LayerScale, drop path": partial(tiny_vit, init_values=0.1, drop_path_rate=0.3),
    "norms inside": partial(tiny_vit, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
}
every_entry = pytest.mark.parametrize("entry", ENTRIES)
every_model = pytest.mark.parametrize("name", MODELS)
IMAGES = random_batches(dtype=torch.float32)[0][0]


def extracted(entry: str, name: str = "plain", dtype: torch.dtype = torch.float32) -> Any:
    """`tiny_vit` cut to the widths of `entry`; modules that are all or nothing stay whole where they would narrow."""
    supernet = skd.SuperNet(MODELS[name](dtype))
    widths = [
        info.full_width if width and info.binary else width
        for info, width in zip(supernet.infos, ENTRIES[entry], strict=True)
    ]
    return skd.extract(nested(supernet, widths), entry=1)


@torch.no_grad()
def difference(found: torch.Tensor, model: Any, images: torch.Tensor = IMAGES) -> float:
    return float((found - model(images)).abs().max())


@every_model
@every_entry
@torch.no_grad()
def test_a_skipped_module_adds_exactly_nothing(entry: str, name: str) -> None:
    """A block without modules hands on the same bits; whatever is left can be initialised again by timm."""
    sub = extracted(entry, name, torch.float64)
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    for block, (attn, mlp) in zip(sub.blocks, zip(*[iter(ENTRIES[entry])] * 2, strict=True), strict=True):
        assert isinstance(block.attn, torch.fx.GraphModule) == (attn == 0)
        assert isinstance(block.mlp, torch.fx.GraphModule) == (mlp == 0)
        if attn == mlp == 0:
            assert torch.equal(block.train()(x), x)  # drop path has nothing to drop
        if name == "post-norm":
            assert block.init_values == (0.1 if attn and mlp else None)
    sub.init_weights("")
    assert not any(isinstance(m, nn.Linear) and not m.weight.numel() for m in sub.modules())


@every_entry
def test_torch_export(entry: str) -> None:
    """Static and dynamic batch, written and read."""
    sub = extracted(entry)
    batch = torch.export.Dim("batch", min=1, max=64)
    for shapes, images in ((None, IMAGES), (({0: batch},), IMAGES[:3])):
        file = io.BytesIO()
        torch.export.save(torch.export.export(sub, (IMAGES,), dynamic_shapes=shapes), file)
        file.seek(0)
        program = torch.export.load(file).module()
        assert difference(program(images), sub, images) < 1e-5


@every_entry
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_int8_of_pytorch(entry: str) -> None:
    """Dynamic int8: near the model, and the same number every time."""
    sub = extracted(entry)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(sub), {nn.Linear}, dtype=torch.qint8)
    found = [quantized(IMAGES) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert difference(found[0], sub) < 0.2


@every_entry
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_int8_of_torchao(entry: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    sub = extracted(entry)
    found = []
    for _ in range(2):
        quantized = copy.deepcopy(sub)
        quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
        found.append(quantized(IMAGES))
    assert torch.equal(found[0], found[1])
    assert difference(found[0], sub) < 0.2


# Each takes seconds. A static batch and most entries differ in nothing that the exporter has to know.
USUAL = {"narrow", "both, crosswise", "nothing left"}
ONNX = [pytest.param(entry, True, marks=[] if entry in USUAL else pytest.mark.slow) for entry in ENTRIES] + [
    pytest.param("block skipped", False, marks=pytest.mark.slow),
    pytest.param("both, crosswise", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("entry", "dynamic"), ONNX)
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.filterwarnings("ignore")
def test_onnx(entry: str, dynamic: bool, dynamo: bool, tmp_path: Path) -> None:
    """ONNX Runtime computes what the model does, of another batch size too where the file allows it."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    sub, path = extracted(entry), str(tmp_path / "sub.onnx")
    names: dict[str, Any] = {"input_names": ["images"], "verbose": False}
    if dynamic and dynamo:
        names["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1, max=64)},)
    elif dynamic:
        names["dynamic_axes"] = {"images": {0: "batch"}}
    torch.onnx.export(sub, (IMAGES,), path, dynamo=dynamo, **names)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (IMAGES, IMAGES[:3]) if dynamic else (IMAGES,):
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert difference(found, sub, images) < 1e-4


@every_entry
def test_pruning(entry: str) -> None:
    """Every layer has weights to prune."""
    sub = extracted(entry)
    layers = [layer for layer in sub.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=0.25)
    assert all(0.2 < float((layer.weight == 0).float().mean()) < 0.3 for layer in layers)
    assert sub(IMAGES).isfinite().all()


def test_a_pickled_model_needs_no_skd(tmp_path: Path) -> None:
    """torch.save here, torch.load in a process that has never heard of skd."""
    subs = {name: extracted("both, crosswise", name) for name in MODELS}
    torch.save(subs, tmp_path / "subs.pt")
    known = {name: (sub(IMAGES).detach(), list(sub.state_dict())) for name, sub in subs.items()}
    torch.save((IMAGES, known), tmp_path / "expected.pt")
    check = (
        "import sys, torch\nsubs = torch.load('subs.pt', weights_only=False)\n"
        "images, known = torch.load('expected.pt')\n"
        "assert not any(name.split('.')[0] in ('skd', 'skd_kernels') for name in sys.modules)\n"
        "for name, (expected, keys) in known.items():\n"
        "    sub = subs[name]\n"
        "    assert list(sub.state_dict()) == keys and not any(module.training for module in sub.modules())\n"
        "    torch.testing.assert_close(sub(images), expected)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, check=True)


@every_model
def test_a_copy_is_known_again(name: str, tmp_path: Path) -> None:
    """What was copied, or traced again by pickle, is priced, saved and converted as before."""
    sub = extracted("both, crosswise", name)
    expected = sub(IMAGES)
    for again in (copy.deepcopy(sub), pickle.loads(pickle.dumps(sub))):
        assert torch.equal(again(IMAGES), expected)
        assert skd.cost(again) == skd.cost(sub)
        skd.save(again, tmp_path / "sub.safetensors")
        assert torch.equal(skd.load(tmp_path / "sub.safetensors")(IMAGES), expected)
        torch.testing.assert_close(skd.SuperNet(again)(IMAGES, torch.tensor(0)), expected)


@every_model
@every_entry
def test_it_trains(entry: str, name: str) -> None:
    """Every parameter has a gradient, with and without checkpointing; with a mask where timm passes one."""
    sub = extracted(entry, name).train()
    for checkpointing in (False, True):
        sub.set_grad_checkpointing(checkpointing)
        sub.zero_grad()
        sub(IMAGES).square().sum().backward()
        assert all(parameter.grad is not None for parameter in sub.parameters())
    sub.eval()
    masked = sub(IMAGES, attn_mask=torch.zeros(17, 17))
    torch.testing.assert_close(masked, sub(IMAGES))


@pytest.mark.parametrize("entry", ["block skipped", "both, crosswise", "nothing left"])
@torch.no_grad()
def test_compiled_and_in_half_precision(entry: str) -> None:
    """One graph without a break; other dtypes come out as they go in; autocast."""
    sub = extracted(entry)
    compiled = torch.compile(sub, backend="aot_eager", fullgraph=True)
    assert difference(compiled(IMAGES), sub) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(sub(IMAGES).float(), sub) < 0.1
    half = copy.deepcopy(sub).to(torch.bfloat16)
    found = half(IMAGES.bfloat16())
    assert found.dtype == torch.bfloat16 and difference(found.float(), sub) < 0.1


def test_a_graph_of_other_code_is_refused() -> None:
    """Only a function that returns zeros is a skipped module: a traced attention is not."""
    model = tiny_vit(torch.float32)
    model.blocks[0].mlp = torch.fx.symbolic_trace(model.blocks[0].mlp)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp is a"):
        skd.cost(model)

    def one_more(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) + 1

    model.blocks[0].mlp = torch.fx.symbolic_trace(one_more)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp"):
        skd.cost(model)
