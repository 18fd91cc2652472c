"""Weights of a user's own files: timm's filters, checkpoints of several state dicts, new heads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import tiny_vit
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

import skd
from skd.vit.weights import load_weights, new_head

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def named(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**ARGS, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def same(one: Any, other: Any) -> bool:
    found, expected = one.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_state_dict(tmp_path: Path, prefix: str, suffix: str) -> None:
    model, fresh, file = named(), named(seed=1), tmp_path / f"w{suffix}"
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    assert load_weights(fresh, file) == ""
    assert same(fresh, model)


def test_which_weights_of_a_training_run(tmp_path: Path) -> None:
    """timm's script saves its arguments too; the average is what it evaluates."""
    model, average, fresh, file = named(), named(seed=2), named(seed=1), tmp_path / "last.pth.tar"
    both = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save({**both, "args": argparse.Namespace(lr=1.0), "epoch": 3}, file)
    for take, key, expected in (
        (None, "state_dict_ema", average),
        ("ema", "state_dict_ema", average),
        ("model", "state_dict", model),
    ):
        assert load_weights(fresh, file, take=take) == key
        assert same(fresh, expected)
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, file)
    assert load_weights(fresh, file) == "model_ema" and same(fresh, average)
    torch.save({"model": model.state_dict(), "model_ema": None}, file)
    assert load_weights(fresh, file) == "model" and same(fresh, model)
    with pytest.raises(ValueError, match=r"no state_dict_ema or model_ema; it has model$"):
        load_weights(fresh, file, take="ema")


@pytest.mark.parametrize("changes", [{"img_size": 64}, {"patch_size": 16}, {"img_size": (32, 64)}])
def test_another_image_or_patch_size(tmp_path: Path, changes: dict[str, Any]) -> None:
    """As timm's own filter resamples it; the other weights are those of the file."""
    model, other, file = named(), named(seed=1, **changes), tmp_path / "w.pth"
    torch.save(model.state_dict(), file)
    load_weights(other, file)
    expected = checkpoint_filter_fn(model.state_dict(), other)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


def test_metas_dinov2(tmp_path: Path) -> None:
    """Its mask token has no place in timm's model, and its registers and packed gates have other names."""
    model = named("vit_giant_patch14_reg4_dinov2", num_classes=0)
    other, file = named("vit_giant_patch14_reg4_dinov2", seed=1, num_classes=0), tmp_path / "dinov2.pth"
    renamed = {"reg_token": "register_tokens"}
    state = {
        renamed.get(key, key).replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): tensor
        for key, tensor in model.state_dict().items()
    }
    state["pos_embed"] = torch.cat(
        [torch.zeros(1, 1, 48), state["pos_embed"]], 1
    )  # Meta's has one for the class token
    state["cls_token"] = state["cls_token"] - state["pos_embed"][:, :1]
    torch.save({**state, "mask_token": torch.zeros(1, 48)}, file)
    load_weights(other, file)
    assert same(other, model)


def test_deit3s_names_of_its_layer_scale(tmp_path: Path) -> None:
    model, other = named("deit3_small_patch16_224"), named("deit3_small_patch16_224", seed=1)
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
        for key, t in model.state_dict().items()
    }
    torch.save(state, tmp_path / "w.pth")
    load_weights(other, tmp_path / "w.pth")
    assert same(other, model)


def test_flexivit_is_resampled_as_timm_does(tmp_path: Path) -> None:
    model, other = named("flexivit_small"), named("flexivit_small", seed=1, img_size=64)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_weights(other, tmp_path / "w.pth")
    expected = checkpoint_filter_fn(model.state_dict(), other, interpolation="bilinear", antialias=False)
    assert torch.equal(other.pos_embed, expected["pos_embed"])


def test_a_file_that_is_none_of_these(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    with pytest.raises(ValueError, match="there is no such file"):
        load_weights(named(), file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="it holds a list"):
        load_weights(named(), file)
    torch.save(named(), file)
    with pytest.raises(ValueError, match=r"save model\.state_dict\(\) alone"):
        load_weights(named(), file)
    torch.save(named(embed_dim=24).state_dict(), file)
    with pytest.raises(ValueError, match="size mismatch") as caught:
        load_weights(named(), file)
    assert "\n" not in str(caught.value)
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="no choice of weights such as 'model'"):
        load_weights(named(), tmp_path / "w.npz", take="model")


@pytest.mark.parametrize("classes", [0, 3, 5])
def test_any_head(tmp_path: Path, classes: int) -> None:
    model, other = named(num_classes=classes), named(seed=1)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    if classes != 5:
        with pytest.raises(ValueError, match=r"head\.weight"):
            load_weights(named(seed=1), tmp_path / "w.pth")
    load_weights(other, tmp_path / "w.pth", any_head=True)
    assert same(other, model) and other.num_classes == classes


@pytest.mark.parametrize(
    "make",
    [
        tiny_vit,
        named,
        lambda: named("deit_tiny_distilled_patch16_224"),
        lambda: named(num_classes=0),
        lambda: skd.extract(skd.SuperNet(tiny_vit()), entry=0),
        lambda: skd.SuperNet(named()).model,
    ],
)
def test_a_new_head(tmp_path: Path, make: Any) -> None:
    """Everything else stays, a file of it rebuilds it, and one seed gives one head, no generator touched."""
    model = make()
    model.pretrained_cfg = (
        {**model.pretrained_cfg, "label_names": list("abcde")} if hasattr(model, "pretrained_cfg") else {}
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.startswith("head")}
    state = torch.get_rng_state()
    new_head(model, 3, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert model.num_classes == 3 and model.head.weight.shape[0] == 3
    assert model.pretrained_cfg["label_names"] is None
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    first = model.head.weight.clone()
    new_head(model, 3, seed=4)
    assert torch.equal(first, model.head.weight)
    new_head(model, 3, seed=5)
    assert not torch.equal(first, model.head.weight)
    if not isinstance(model.blocks[0], skd.supernet.SuperBlock):
        skd.save(model, tmp_path / "model.safetensors")
        assert skd.load(tmp_path / "model.safetensors").num_classes == 3
    with pytest.raises(ValueError, match="num_classes is 0"):
        new_head(model, 0)
