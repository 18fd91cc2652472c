"""A network with another width in every block, built again from this folder by timm, torch and safetensors alone.

from model import load

network = load("FOLDER")  # in evaluation mode, on the CPU
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import ResPostBlock
from torch import nn

# Arguments that are classes, by the names that config.json has for them.
CLASSES = {"ResPostBlock": ResPostBlock, "SwiGLU": timm.layers.SwiGLU, "SwiGLUPacked": timm.layers.SwiGLUPacked}


def load(folder: str | Path) -> Any:
    """The network that config.json and model.safetensors in `folder` hold."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    state, network = load_file(Path(folder) / "model.safetensors"), config["network"]
    model = build(network)
    for block, (k, _) in zip(model.blocks, network["widths"], strict=True):
        if network["model_class"] == "Eva" and 0 < k < block.attn.num_heads:
            block.attn = fewer_heads(block.attn, k)
    for name, layer in list(model.named_modules()):
        lost = layer.state_dict() and not any(key.startswith(f"{name}.") for key in state)
        if isinstance(layer, nn.Linear) and f"{name}.weight" in state:  # the rows and columns that were kept
            rows, columns = state[f"{name}.weight"].shape
            model.set_submodule(name, nn.Linear(columns, rows, bias=f"{name}.bias" in state))
        elif lost and name.startswith("blocks.") and name.count(".") > 1:
            model.set_submodule(name, nn.Identity())  # of a module that was skipped
    for block, (k, m) in zip(model.blocks, network["widths"], strict=True):
        if k and type(block.attn) is timm.layers.Attention:  # k coordinates of every head
            block.attn.head_dim, block.attn.attn_dim, block.attn.scale = k, k * block.attn.num_heads, k**-0.5
        for name, scale in [("attn", "gamma_1")] * (k == 0) + [("mlp", "gamma_2")] * (m == 0):
            setattr(block, name, torch.fx.symbolic_trace(skipped))
            if block._parameters.pop(scale, None) is not None:
                setattr(block, scale, 1.0)
    model.to(next(iter(state.values())).dtype).load_state_dict(state)
    model.pretrained_cfg = config["pretrained_cfg"]
    return model.eval()


def build(network: dict[str, Any]) -> Any:
    """The network at its full widths."""
    named = {key: CLASSES.get(str(value), value) for key, value in network["model_args"].items()}
    if network["architecture"] is not None:
        return timm.create_model(network["architecture"], **named)
    model = getattr(timm.models, network["model_class"])(**named)
    for layer in model.modules():
        if network["norm_eps"] is not None and hasattr(layer, "eps"):
            layer.eps = network["norm_eps"]
    return model


def fewer_heads(attn: Any, heads: int) -> Any:
    """timm's EvaAttention cannot have fewer heads than its width allows; its AttentionRope can."""
    same = {name: getattr(attn, name) for name in ("num_prefix_tokens", "rotate_half")}
    same |= {"qkv_fused": attn.qkv is not None, "gated": attn.gate is not None, "attn_head_dim": attn.head_dim}
    cut = timm.layers.AttentionRope(attn.proj.out_features, heads, **same)
    cut.q_norm, cut.k_norm = attn.q_norm, attn.k_norm
    return cut


def skipped(
    x: torch.Tensor, rope: Any = None, attn_mask: Any = None, is_causal: Any = False, shared_rel_pos_bias: Any = None
) -> torch.Tensor:
    """What stands in place of a module that was skipped; it takes what timm's blocks give."""
    return torch.zeros_like(x)
