"""Models as users have them: a name with a source, wrong arguments, wrappers, any image size, any head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import random_batches, tiny_vit
from internals import image_size, unwrapped
from timm.models import save_for_hf
from torch import nn

import skd
from skd.data import data_config

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def test_a_folder_of_timms_is_a_model(tmp_path: Path) -> None:
    model = timm.create_model(NAME, **ARGS).eval()
    save_for_hf(model, tmp_path / "hub", model_args=ARGS)
    found = skd.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))
    supernet = skd.convert(found, random_batches(dtype=torch.float32))
    skd.save(supernet, tmp_path / "supernet.safetensors")
    assert skd.load(tmp_path / "supernet.safetensors").model.pretrained_cfg["architecture"] == NAME
    with pytest.raises(ValueError, match=r"model name is 'local-dir:.*there is no folder"):
        skd.create_model(f"local-dir:{tmp_path}")


def test_weights_at_fault_are_not_laid_to_the_arguments(tmp_path: Path) -> None:
    save_for_hf(timm.create_model(NAME, **ARGS), tmp_path, model_args=ARGS)
    for file in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
        file.unlink()
    with pytest.raises(ValueError, match=r"^model local-dir:\S+ cannot be built: No suitable"):
        skd.create_model(f"local-dir:{tmp_path}", pretrained=True, depth=2)
    with pytest.raises(ValueError, match=r"^model vit_base_patch16_xp_224 cannot be built: .*[Pp]retrained"):
        skd.create_model("vit_base_patch16_xp_224", pretrained=True, depth=1)


def test_names_of_a_hub_reach_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def create(name: str, **kwargs: Any) -> Any:
        asked.append(name)
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(OSError, match=r"^model hf-hub:someone/vit cannot be had: no network$"):
        skd.create_model("hf-hub:someone/vit", pretrained=True)
    assert asked == ["hf-hub:someone/vit"]


def test_a_name_without_its_source_is_told_of_both() -> None:
    with pytest.raises(ValueError, match=r"'hf-hub:someone/vit', in a folder: 'local-dir:someone/vit'"):
        skd.create_model("someone/vit")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"embed_dim": 100}, r"with embed_dim=100: dim should be divisible"),
        ({"act_layer": "foo"}, r"with act_layer='foo': KeyError: 'foo'"),
        ({"weight_init": "foo"}, r"with weight_init='foo': AssertionError"),
        ({"patch_size": 0}, r"with patch_size=0: integer division"),
        ({"foo": 1}, r"with foo=1: .*unexpected keyword"),
        ({"checkpoint_path": "no.pth"}, r"^checkpoint_path is 'no.pth'; there is no such file"),
    ],
)
def test_the_wrong_argument_is_named(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        skd.create_model(NAME, **{**ARGS, **wrong})
    assert "\n" not in str(caught.value)


class Forward(nn.Module):
    """A user's own wrapper, whose forward may do anything."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def distributed(module: nn.Module) -> Any:
    """A model in DistributedDataParallel, without its constructor, which needs a process group."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, distributed, lambda m: distributed(torch.compile(m))]
)
def test_wrapped_models_are_unwrapped(wrap: Any, tmp_path: Path) -> None:
    model, batches = tiny_vit(), random_batches()
    wrapped, supernet = wrap(model), skd.convert(model, batches)
    assert unwrapped(wrapped) is model and unwrapped(model) is model
    found = skd.convert(wrapped, batches)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), supernet.parameters(), strict=True))
    assert skd.cost(wrapped) == skd.cost(model)
    assert data_config(wrapped) == data_config(model)
    assert skd.evaluate(wrapped, batches) == skd.evaluate(model, batches)
    assert skd.SuperNet(wrapped).widths() == supernet.widths()
    skd.save(wrapped, tmp_path / "model.safetensors")
    net = wrap(supernet)
    net_list = skd.plan(net, batches, rounds=1, target=0.5)
    assert net_list == skd.plan(supernet, batches, rounds=1, target=0.5)
    assert skd.importance(net, batches)[1] == skd.importance(supernet, batches)[1]
    assert skd.cost(skd.extract(net, entry=0)) == skd.cost(model)


def test_other_wrappers_are_named() -> None:
    with pytest.raises(ValueError, match=r"model is a test_models\.Forward"):
        skd.convert(Forward(tiny_vit()), random_batches())


@pytest.mark.parametrize(
    "options", [{"img_size": 60}, {"img_size": (60, 44)}, {"img_size": 60, "dynamic_img_pad": True}]
)
def test_any_dynamic_image_size(options: dict[str, Any], tmp_path: Path) -> None:
    """timm's model of 60 pixels in patches of 16 takes 48 or 64, but not 60 (unless it pads)."""
    model = tiny_vit(torch.float32, **{"patch_size": 16, "dynamic_img_size": True, **options})
    height, width = image_size(model)
    with torch.no_grad():
        model(torch.zeros(1, 3, height, width))
    assert data_config(model)["input_size"] == (3, height, width)
    supernet = skd.convert(model, random_batches(dtype=torch.float32, pixels=64))
    assert skd.cost(supernet) == skd.cost(model)
    skd.save(supernet, tmp_path / "supernet.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = skd.load(tmp_path / "supernet.safetensors")(images)
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=1e-4)


def test_the_image_size_of_others_is_what_they_were_built_for() -> None:
    assert image_size(tiny_vit(img_size=(30, 44))) == (30, 44)


def ill_conditioned() -> Any:
    """Logits that are small differences of large products, as a least-squares head on few images gives them."""
    model = tiny_vit(torch.float32)
    with torch.no_grad():
        images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        features = model.forward_head(model.forward_features(images), pre_logits=True)[0]
        weight = 1e5 * torch.randn(5, len(features), generator=torch.Generator().manual_seed(1))
        weight -= (weight @ features)[:, None] * features / features.square().sum()
        model.head.weight.copy_(weight)
        model.head.bias.fill_(1.0)
    return model


def test_rounding_of_a_large_head_is_no_other_forward() -> None:
    model = ill_conditioned()
    supernet = skd.convert(model, random_batches(dtype=torch.float32))
    exact = skd.convert(model.double(), random_batches())
    for found, expected in zip(supernet.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double().abs(), expected.abs(), atol=1e-2, rtol=1e-2)


def test_another_forward_is_found_whatever_the_head() -> None:
    for model in (ill_conditioned(), tiny_vit(torch.float32)):
        model.register_forward_hook(lambda module, inputs, output: output * 1.01)
        with pytest.raises(ValueError, match="a forward of its own and hooks are not supported"):
            skd.convert(model, random_batches(dtype=torch.float32))


def test_no_negative_number_of_classes() -> None:
    with pytest.raises(ValueError, match="num_classes=-1; it must be at least 0"):
        skd.cost(tiny_vit(num_classes=-1))


def test_extracting_from_what_was_never_planned_says_so(model: Any, batches: Any) -> None:
    with pytest.raises(
        ValueError, match=r"macs is 0\.5, but this super-network was never planned.*skd plan or skd train"
    ):
        skd.extract(skd.convert(model, batches), macs=0.5)


def test_a_target_out_of_reach_is_said(model: Any, batches: Any) -> None:
    supernet = skd.convert(model, batches)
    with pytest.warns(UserWarning, match=r"target is 0\.95, which cannot be had.*has 0\.\d+ of the MACs \(linear\)"):
        planned = skd.plan(supernet, batches, rounds=1, target=0.95, convention="linear")
    assert not planned.widths[-1].any()


def test_a_target_within_reach_needs_no_word(model: Any, batches: Any, recwarn: pytest.WarningsRecorder) -> None:
    skd.plan(skd.convert(model, batches), batches, rounds=1, target=0.7)
    assert not [warning for warning in recwarn if "target" in str(warning.message)]
