"""Extracted models in the form of the previous version, with layers of size 0 in the place of skipped modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import skd

# The rebuilding of a saved model, as the README of the version before had it.
EARLIER_SNIPPET = """
import json, timm, torch
from safetensors import safe_open

file = safe_open(path, "pt")
header, state = json.loads(file.metadata()["skd"]), {key: file.get_tensor(key) for key in file.keys()}
name, args = header["architecture"], header["model_args"]
model = timm.create_model(name, **args) if name else getattr(timm.models, header["model_class"])(**args)
for name, layer in list(model.named_modules()):
    layer.eps = header["norm_eps"] or getattr(layer, "eps", None)
    if isinstance(layer, torch.nn.Linear):  # takes the rows and columns that were kept
        model.set_submodule(name, torch.nn.Linear(*state[name + ".weight"].shape[::-1], bias=name + ".bias" in state))
    elif "blocks." in name and layer.state_dict() and not any(key.startswith(name + ".") for key in state):
        model.set_submodule(name, torch.nn.Identity())  # the norm of a module that was skipped
for block, (k, _) in zip(model.blocks, header["widths"]):
    block.attn.head_dim, block.attn.attn_dim, block.attn.scale = k, k * block.attn.num_heads, max(k, 1) ** -0.5
model.load_state_dict(state)
"""


def sized_zero(sub: Any, folder: Path) -> Any:
    """`sub` in the form of the previous version, with layers of size 0."""
    skd.save(sub, folder / "sub.safetensors")
    names = {"path": folder / "sub.safetensors"}
    exec(EARLIER_SNIPPET, names)
    return names["model"].eval()
