"""Features of VisionTransformer one by one, in names of timm's registry or not: exact, or refused by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from architectures import CLASSES, batches, build, images, randomise, tiny
from equivalence import TOLERANCE, check, relative
from internals import modules_of
from timm.layers import Attention, GluMlp, Mlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch.nn.utils.parametrizations import weight_norm

import skd


class OtherAttention(Attention):
    """A subclass may compute anything."""


GATE_FIRST = partial(GluMlp, gate_last=False)

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qkv_bias=False": {"qkv_bias": False},
    "proj_bias=False": {"proj_bias": False},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "wide image": {"img_size": (16, 32)},
    "wide patch": {"img_size": (16, 32), "patch_size": (8, 16)},
    "in_chans=1": {"in_chans": 1},
    "headless": {"num_classes": 0},
    "one class": {"num_classes": 1},
    "registers": {"reg_tokens": 3},
    "registers, no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no position": {"pos_embed": "none"},
    "pool avg": {"global_pool": "avg"},
    "pool avgmax": {"global_pool": "avgmax"},
    "pool max": {"global_pool": "max"},
    "pool map": {"global_pool": "map"},
    "pool map, registers": {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
    "pool prr": {"global_pool": "prr"},
    "pool prr, no class token": {"global_pool": "prr", "class_token": False},
    "no pool, headless": {"global_pool": "", "num_classes": 0},
    "qk_norm": {"qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "every inner norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "LayerScale": {"init_values": 1e-5},
    "drop_path_rate": {"drop_path_rate": 0.3},
    "dropout outside of blocks": {"drop_rate": 0.2, "pos_drop_rate": 0.2, "patch_drop_rate": 0.5},
    "dynamic_img_size": {"dynamic_img_size": True},
    "pre_norm": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "fc_norm": {"fc_norm": True},
    "RmsNorm": {"norm_layer": RmsNorm, "embed_norm_layer": RmsNorm},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": torch.nn.SiLU},
    "SwiGLU, inner norm": {"mlp_layer": SwiGLU, "act_layer": torch.nn.SiLU, "scale_mlp_norm": True},
    "SwiGLUPacked": {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 5},
    "SwiGLUPacked, inner norm": {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "scale_mlp_norm": True},
    "GluMlp with GELU": {"mlp_layer": GATE_FIRST, "act_layer": torch.nn.GELU},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "silu": {"act_layer": "silu"},
    "ResPostBlock": {"block_fn": ResPostBlock},
    "ResPostBlock, small norms": {"block_fn": ResPostBlock, "init_values": 1e-5, "qkv_bias": False},
    "ResPostBlock, inner norms": {"block_fn": ResPostBlock, "qk_norm": True, "scale_mlp_norm": True},
    "head of 6": {"embed_dim": 24, "num_heads": 4},
    "head of 9": {"embed_dim": 36, "num_heads": 4},
    "head of 36": {"num_heads": 1},
    "MLP of 540, groups of 24": {"mlp_ratio": 15},
    "MLP of 19": {"mlp_ratio": 0.53},
    "one block": {"depth": 1},
    "three blocks": {"depth": 3},
}

# (arguments, what the message must say)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attn_drop_rate": ({"attn_drop_rate": 0.1}, r"blocks\.0\.attn has dropout.*attn_drop_rate=0"),
    "proj_drop_rate": ({"proj_drop_rate": 0.1}, r"blocks\.0\.attn has dropout.*proj_drop_rate=0"),
    "ReLU": ({"act_layer": "relu"}, r"blocks\.0\.mlp has activation ReLU.*GELU"),
    "gate_last": ({"mlp_layer": GluMlp}, r"blocks\.0\.mlp is a GluMlp with gate_last=True"),
    "use_conv": ({"mlp_layer": partial(Mlp, use_conv=True)}, r"blocks\.0\.mlp\.fc1 is a Conv2d"),
    "attention subclass": ({"attn_layer": OtherAttention}, r"blocks\.0\.attn is a OtherAttention"),
    "DiffAttention": ({"attn_layer": "diff"}, r"blocks\.0\.attn is a DiffAttention"),
    "ParallelThingsBlock": ({"block_fn": ParallelThingsBlock}, r"blocks\.0 is a ParallelThingsBlock"),
    "ParallelScalingBlock": ({"block_fn": ParallelScalingBlock}, r"blocks\.0 is a ParallelScalingBlock"),
    "DiffParallelScalingBlock": ({"block_fn": DiffParallelScalingBlock}, r"blocks\.0 is a DiffParallelScalingBlock"),
    "logits per token": ({"global_pool": ""}, "global_pool"),
}
OTHER_MODELS = {
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "naflexvit_base_patch16_gap": "NaFlexVit",
    "resnet18": "ResNet",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str) -> None:
    check(build(**FEATURES[feature]))


@pytest.mark.parametrize("feature", REFUSED)
def test_refused_feature(feature: str) -> None:
    arguments, message = REFUSED[feature]
    model = build(**arguments)
    with pytest.raises(ValueError, match=message):
        skd.convert(model, batches(model))


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_refused_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=rf"timm\.models\.\w+\.{OTHER_MODELS[name]};.*VisionTransformer"):
        skd.convert(model, [])


def with_attention(**kwargs: Any) -> Any:
    """A model whose attention layers are built by hand."""
    model = build()
    for block in model.blocks:
        block.attn = Attention(36, num_heads=2, norm_layer=RmsNorm, **kwargs)
    return randomise(model.double().eval(), 1)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("inner", [{}, {"qk_norm": True}, {"scale_norm": True}])
def test_gated_attention(inner: dict[str, bool], qkv_bias: bool) -> None:
    model = with_attention(gated=True, qkv_bias=qkv_bias, **inner)
    check(model)
    attentions = [info for info in modules_of(model) if info.kind == "attn"]
    assert all(info.binary and not info.rotates_v and not info.rotates_qk for info in attentions)


@pytest.mark.parametrize("width", [8, 21])
def test_head_width_of_its_own(width: int) -> None:
    check(with_attention(attn_head_dim=width, qkv_bias=True))


def test_distilled() -> None:
    model = VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=36, depth=2, num_heads=2, num_classes=CLASSES
    )
    check(randomise(model.double().eval(), 2))


def test_extracted_model_converts_again() -> None:
    model = build()
    supernet = skd.convert(model, batches(model))
    half = [supernet.widths(), [8, 72, 8, 72]]
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, half)
    check(skd.extract(supernet, entry=1))


def test_layer_that_is_not_plain_is_refused() -> None:
    """Weights that are computed (weight norm, adapters, quantised layers) cannot be rewritten in place."""
    model = build()
    weight_norm(model.blocks[0].attn.qkv)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv"):
        skd.convert(model, batches(model))


@torch.no_grad()
def test_dynamic_image_size() -> None:
    """Any size that the model takes, at every entry."""
    model = build(dynamic_img_size=True)
    supernet = skd.convert(model, batches(model))
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [[18, 144, 18, 144], [8, 0, 0, 31]])
    x = images(model, 2, size=(24, 32))
    assert relative(supernet(x), model(x)) <= TOLERANCE
    assert relative(skd.extract(supernet, entry=1)(x), supernet(x, entry=1)) <= TOLERANCE


@torch.no_grad()
def test_attention_without_fused_kernel() -> None:
    """timm's own softmax code reads another scale than PyTorch's kernel does: both must be right."""
    model = build()
    supernet = skd.convert(model, batches(model))
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, [[18, 144, 18, 144], [8, 90, 0, 31]])
    extracted = skd.extract(supernet, entry=1)
    for block in extracted.blocks:
        block.attn.fused_attn = False
    x = images(model, 2)
    assert relative(extracted(x), supernet(x, entry=1)) <= TOLERANCE


def test_training_mode_is_kept_and_statistics_are_not() -> None:
    """A model given in training mode is measured in evaluation mode: its BatchNorm learns nothing."""
    model = tiny("vit_small_resnet26d_224").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    supernet = skd.convert(model, batches(model))
    statistics = [name for name in before if "running" in name or "tracked" in name]
    assert statistics and model.training and supernet.training
    for state in (model.state_dict(), supernet.state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in statistics)
    assert relative(supernet.eval()(images(model, 2)), model.eval()(images(model, 2))) <= TOLERANCE
