"""save and load: round trips, self-description, and files that are not what they should be."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from earlier import sized_zero
from helpers import nested, perturb, random_batches, tiny_vit
from internals import construction
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import SwiGLU, SwiGLUPacked
from torch import nn

import skd


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["skd"])


def rewrite(path: Path, change: Any) -> None:
    """Save the file again with a changed header or changed tensors."""
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["skd"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"skd": json.dumps(header)})


def named(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **{**args, **kwargs}).double().eval()
    perturb(model)
    return model


MODELS = {
    "direct": tiny_vit,
    "direct, every option": partial(
        tiny_vit,
        norm_layer=partial(nn.LayerNorm, eps=1e-3),
        mlp_layer=SwiGLUPacked,
        mlp_ratio=144 / 48,
        act_layer="silu",
        global_pool="avg",
        init_values=0.1,
        reg_tokens=2,
        qkv_bias=False,
        no_embed_class=True,
    ),
    "direct, rms norm": partial(
        tiny_vit, norm_layer="rmsnorm", mlp_layer=SwiGLU, global_pool="map", class_token=False, act_layer="quick_gelu"
    ),
    "direct, binary": partial(tiny_vit, qk_norm=True, scale_mlp_norm=True, pre_norm=True, num_classes=0),
    "timm": partial(named, "deit_tiny_patch16_224"),
    "timm, distilled": partial(named, "deit_tiny_distilled_patch16_224"),
    "timm, clip": partial(named, "vit_base_patch16_clip_224"),
    "timm, a class as argument": partial(named, "vit_base_patch16_224", norm_layer=partial(nn.LayerNorm, eps=1e-2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trips(name: str, tmp_path: Path) -> None:
    model, batches, path = MODELS[name](), random_batches(), tmp_path / "net.safetensors"
    supernet = skd.convert(model, batches)
    supernet.dropout_list = skd.plan(supernet, batches, rounds=2)
    images, last = batches[0][0], len(supernet.dropout_list) - 1
    skd.save(supernet, path)
    again = skd.load(path)
    assert isinstance(again, skd.SuperNet) and again.dropout_list == supernet.dropout_list
    assert again.dropout_list.removed_macs == supernet.dropout_list.removed_macs
    for entry in (last // 2, last):
        expected = supernet(images, entry=entry)
        assert torch.equal(again(images, entry=entry), expected)
        skd.save(skd.extract(supernet, entry=entry), path)
        sub = skd.load(path)
        torch.testing.assert_close(sub(images), expected, rtol=1e-10, atol=1e-12)
        skd.save(sub, path)  # and once more from what was loaded
        assert skd.cost(skd.load(path)) == skd.cost(supernet, entry=entry)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_new_head_and_class_names_are_kept(planned: skd.SuperNet, tmp_path: Path) -> None:
    sub = skd.extract(planned, macs=0.5)
    sub.reset_classifier(3)
    sub.pretrained_cfg = {"label_names": ["cat", "dog", "owl"], "mean": (0.1, 0.2, 0.3), "input_size": (3, 32, 32)}
    skd.save(sub, tmp_path / "sub.safetensors")
    header = header_of(tmp_path / "sub.safetensors")
    assert header["label_names"] == ["cat", "dog", "owl"]
    assert header["data"]["mean"] == [0.1, 0.2, 0.3] and header["data"]["input_size"] == [3, 32, 32]
    again = skd.load(tmp_path / "sub.safetensors")
    assert again.head.out_features == 3
    data = timm.data.resolve_model_data_config(again)
    assert tuple(data["mean"]) == (0.1, 0.2, 0.3)
    assert header["model_args"]["num_classes"] == 3


def test_timm_models_are_named(tmp_path: Path) -> None:
    model = named("deit_tiny_patch16_224")
    skd.save(model, tmp_path / "a.safetensors")
    header = header_of(tmp_path / "a.safetensors")
    assert header["architecture"] == "deit_tiny_patch16_224" and header["kind"] == "model"
    assert header["model_args"] == json.loads(json.dumps(timm.models.get_model_args(model)))
    assert header["data"]["crop_pct"] == 0.9 and header["data"]["interpolation"] == "bicubic"


@pytest.fixture
def saved(planned: skd.SuperNet, tmp_path: Path) -> Path:
    skd.save(skd.extract(planned, macs=0.5), tmp_path / "sub.safetensors")
    return tmp_path / "sub.safetensors"


def test_truncated_padded_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", whole + b"\0" * 64, b"not a model", b"\xff" * 64):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated, padded or no safetensors file"):
            skd.load(saved)
    save_file({"a": torch.zeros(3)}, saved)
    with pytest.raises(ValueError, match="skd did not write it"):
        skd.load(saved)
    save_file({"a": torch.zeros(3)}, saved, metadata={"skd": "{}"})
    with pytest.raises(ValueError, match="damaged header"):
        skd.load(saved)
    with pytest.raises(ValueError, match="there is no such file"):
        skd.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h, t: h.update(format=99), "has format 99"),
        (lambda h, t: h.update(architecture="deit_tiny_patch16_242"), "near names"),
        (lambda h, t: h.update(model_class="Swin"), "model_class is 'Swin'"),
        (lambda h, t: h["model_args"].update(embed_dim=10**6 * 3), "do not fit"),  # must not allocate terabytes
        (lambda h, t: h["model_args"].update(bogus=1), "bogus"),
        (lambda h, t: h.pop("widths"), "widths"),
        (lambda h, t: h.update(widths=[[99, 99], [99, 99]]), "cannot be rebuilt"),
        (lambda h, t: t.pop("head.weight"), "head.weight is missing"),
        (lambda h, t: t.update(extra=torch.zeros(1)), "it should be absent"),
        (lambda h, t: t.update({"head.bias": torch.zeros(7)}), r"head.bias is \(7,\), it should be \(5,\)"),
    ],
)
def test_headers_and_tensors_that_do_not_fit(saved: Path, change: Any, match: str) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=match):
        skd.load(saved)


def test_save_rejects_and_leaves_nothing_behind(planned: skd.SuperNet, saved: Path, tmp_path: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="existing folder"):
        skd.save(planned, tmp_path / "missing" / "a.safetensors")
    with pytest.raises(ValueError, match="existing folder"):
        skd.save(planned, tmp_path)
    with pytest.raises(ValueError, match="must be a timm VisionTransformer"):
        skd.save(nn.Linear(1, 1), saved)  # type: ignore[arg-type]
    model = tiny_vit()
    model.head = nn.Sequential(model.head, nn.Tanh())  # no constructor argument gives this
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        skd.save(model, saved)
    assert saved.read_bytes() == before and sorted(tmp_path.iterdir()) == [saved]


def test_a_model_that_is_not_what_its_arguments_build_is_refused(saved: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    model.blocks[1].mlp.act = nn.SiLU()  # same keys and shapes, another function
    with pytest.raises(ValueError, match="logits differ"):
        skd.save(model, tmp_path / "b.safetensors")
    assert sorted(tmp_path.iterdir()) == [saved]


def test_bfloat16_weights_keep_their_dtype(tmp_path: Path) -> None:
    model = tiny_vit(torch.bfloat16)
    skd.save(model, tmp_path / "b.safetensors")
    again = skd.load(tmp_path / "b.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert next(again.parameters()).dtype == torch.bfloat16


# What the version before wrote of a network with skipped modules: layers of size 0 stood in their place.
EARLIER = Path(__file__).parent / "files"
EARLIER_LOGITS = {  # of that version, for two images
    "skipped_model": [[0.304331, 1.049356, 0.099910], [1.252694, 2.305787, -0.073498]],
    "skipped_supernet": [[-0.381560, 3.086114, -0.386348], [-0.381560, 3.086114, -0.386348]],
}


@pytest.mark.parametrize("name", EARLIER_LOGITS)
def test_files_of_an_earlier_version(name: str, tmp_path: Path) -> None:
    """They load with the same function, and what is written of them again has the same tensors."""
    images = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    loaded = skd.load(EARLIER / f"{name}.safetensors")
    supernet = isinstance(loaded, skd.SuperNet)
    found = loaded(images, entry=2) if supernet else loaded(images)
    torch.testing.assert_close(found, torch.tensor(EARLIER_LOGITS[name]), rtol=1e-5, atol=1e-5)
    model = skd.extract(loaded, entry=2) if supernet else loaded
    assert isinstance(model.blocks[2].mlp, torch.fx.GraphModule)
    assert not [key for key, tensor in model.state_dict().items() if not tensor.numel()]
    skd.save(loaded, tmp_path / "again.safetensors")
    with (
        safe_open(EARLIER / f"{name}.safetensors", "pt") as old,
        safe_open(tmp_path / "again.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        assert all(torch.equal(old.get_tensor(key), new.get_tensor(key)) for key in old.keys())  # noqa: SIM118


@pytest.mark.parametrize("widths", [[0, 24, 8, 0], [8, 0, 0, 24], [0, 0, 0, 0]])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_models_of_an_earlier_version(widths: list[int], tmp_path: Path) -> None:
    """Layers of size 0 are understood in a model too: priced, saved, and cut to the present form."""
    supernet = skd.SuperNet(named("deit3_small_patch16_224").float())
    images = random_batches(dtype=torch.float32)[0][0]
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [supernet.widths(), widths])
    sub = skd.extract(supernet, entry=1)
    earlier = sized_zero(sub, tmp_path)
    assert any(not tensor.numel() for tensor in earlier.state_dict().values())
    torch.testing.assert_close(earlier(images), sub(images))
    assert skd.cost(earlier) == skd.cost(sub)
    skd.save(earlier, tmp_path / "earlier.safetensors")
    again = skd.SuperNet(earlier)
    for model in (skd.load(tmp_path / "earlier.safetensors"), skd.extract(again, entry=0)):
        assert model.state_dict().keys() == sub.state_dict().keys()
        assert torch.equal(model(images), sub(images))
    for entry in (0, torch.tensor(0)):
        torch.testing.assert_close(again(images, entry=entry), sub(images))
    # Either form's state fits a super-network made of the other.
    again.load_state_dict(skd.SuperNet(sub).state_dict())
    skd.SuperNet(sub).load_state_dict(again.state_dict())


def test_a_cut_model_that_does_not_know_how_it_was_built() -> None:
    """Its arguments are read off the modules that are left; with none left saving is refused, and nothing else."""
    for widths in ([0, 72, 16, 0], [0, 0, 0, 0]):
        model = tiny_vit(torch.float32, init_values=0.1)
        sub = skd.extract(nested(skd.SuperNet(model), widths), entry=1)
        del sub._model_args  # as if the code of docs/FILES.md had rebuilt it
        images = random_batches(dtype=torch.float32)[0][0]
        again = skd.SuperNet(sub)
        torch.testing.assert_close(again(images), sub(images))
        if any(widths):
            args = construction(sub)["model_args"]
            assert (args["num_heads"], args["mlp_ratio"], args["init_values"]) == (3, 1.5, 1e-5)
        else:
            with pytest.raises(ValueError, match="skips every attention and does not know how it was built"):
                construction(again.model)


def test_a_device_on_which_nothing_can_be_loaded(tmp_path: Path) -> None:
    """Of a file that is there: the device is what is wrong."""
    skd.save(tiny_vit(), tmp_path / "m.safetensors")
    for device, told in (
        ("meta", "device is 'meta', which cannot be used here: its tensors have no data"),
        (torch.device("meta"), "device is 'meta'"),
        ("tpu", "device is 'tpu'"),
        ("mps", "device is 'mps', which cannot be used here"),
        ("cpu:1", "there is one cpu"),
        ("cuda:99", "device is 'cuda:99'"),
    ):
        with pytest.raises(ValueError, match=told):
            skd.load(tmp_path / "m.safetensors", device=device)
