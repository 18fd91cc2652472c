"""The table of supported architectures, made from the code: what skd says of every name.

PYTHONPATH=. python tests/make_architecture_table.py           print it
PYTHONPATH=. python tests/make_architecture_table.py --write docs/ARCHITECTURES.md
    put it between the file's two marker lines
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
from architectures import names, tiny
from equivalence import by_heads
from internals import ModuleInfo, modules_of
from timm.layers import HybridEmbed, LayerScale, RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from benchmarks.result import rewrite

BEGIN, END = "<!-- architectures:begin -->", "<!-- architectures:end -->"

# The first pattern found in a name decides its family.
FAMILIES = (
    ("DINOv3", r"_dinov3"),
    ("LingBot", r"_lingbot$"),
    ("Sapiens2", r"_sapiens2$"),
    ("Perception Encoder", r"_pe_(core|lang|spatial)_"),
    ("EVA-02", r"^eva02_"),
    ("EVA", r"^eva_giant_"),
    ("ViT with rotary positions", r"_rope_"),
    ("BEiT, BEiT v2", r"^beit(v2)?_"),
    ("DeiT III", r"^deit3_"),
    ("DeiT distilled", r"^deit_.*distilled"),
    ("DeiT", r"^deit_"),
    ("AIMv2", r"^aimv2_"),
    ("BEiT-3", r"^beit3_"),
    ("EVA, fine-tuned as plain ViT", r"^eva_"),
    ("FlexiViT", r"^flexivit_"),
    ("DINOv2", r"_dinov2$"),
    ("TIPSv2", r"_tipsv2$"),
    ("C-RADIO v3, v4", r"_radio_"),
    ("SigLIP, SigLIP 2", r"_siglip_"),
    ("CLIP", r"_clip_"),
    ("InternViT", r"_intern"),
    ("Hybrid: convolutions, then ViT", r"_r\d*_s\d|_resnet|_mci_"),
    ("ViTamin", r"^vitamin_"),
    ("timm's test models", r"^test_"),
    ("ViT, post-norm", r"_rpn_"),
    ("ViT with registers", r"_reg\d_"),
    ("ViT without class token", r"_gap_"),
    ("ViT (original, AugReg, MIIL)", r"^vit_"),
)


def is_there(layer: Any) -> bool:
    return layer is not None and not isinstance(layer, nn.Identity)


def no_bias(model: Any) -> bool:
    """Of the projections to queries, keys and values; some models have it in pieces, or in three layers."""
    attn = model.blocks[0].attn
    layer = attn.qkv if attn.qkv is not None else attn.q_proj
    return layer.bias is None and getattr(attn, "q_bias", None) is None


NOTES = {
    "LayerScale": lambda model: (
        isinstance(getattr(model.blocks[0], "ls1", None), LayerScale)
        or getattr(model.blocks[0], "gamma_1", None) is not None
    ),
    "post-norm": lambda model: isinstance(model.blocks[0], ResPostBlock | EvaBlockPostNorm),
    "norm before the blocks": lambda model: is_there(getattr(model, "norm_pre", None)),
    "RMSNorm": lambda model: isinstance(model.blocks[0].norm1, RmsNorm),
    "norm on the attention's output": lambda model: is_there(getattr(model.blocks[0].attn, "norm", None)),
    "norm inside the MLP": lambda model: modules_of(model)[1].binary,
    "norms of Q and K": lambda model: is_there(getattr(model.blocks[0].attn, "q_norm", None)),
    "angles of each head": lambda model: getattr(model, "rope_mixed", False),
    "some blocks share keys and values": lambda model: any(
        getattr(block.attn, "num_kv_heads", model.blocks[0].attn.num_heads) < block.attn.num_heads
        for block in model.blocks
    ),
    "a bias for each pair of positions": lambda model: hasattr(model.blocks[0].attn, "relative_position_bias_table"),
    "no qkv bias": no_bias,
    "two heads": lambda model: isinstance(model, VisionTransformerDistilled),
    "registers": lambda model: getattr(model, "num_reg_tokens", model.num_prefix_tokens - 1) > 0,
    "attention pool": lambda model: getattr(model, "attn_pool", None) is not None,
    "average pool": lambda model: model.global_pool == "avg",
    "hybrid embedding": lambda model: isinstance(model.patch_embed, HybridEmbed),
    "headless": lambda model: model.num_classes == 0,
}
ACTIVATIONS = {"gelu": "GELU", "gelu_tanh": "tanh GELU", "quick_gelu": "quick GELU", "silu": "SiLU"}


def family(name: str) -> str:
    return next(label for label, pattern in FAMILIES if re.search(pattern, name))


def conversion(infos: tuple[ModuleInfo, ...]) -> tuple[str, ...]:
    """The columns V, Q and K, MLP, attention widths, MLP widths."""
    attn, mlp = infos[:2]
    order = "kept" if mlp.binary else "sorted, gate and value together" if mlp.gated else "sorted"
    heads = by_heads(attn)
    whole = [info.binary for info in infos[::2]]
    sizes = "every head" if heads else "every group"
    return (
        "rotated" if getattr(attn, "rotates_v", False) else "kept",
        "rotated" if getattr(attn, "rotates_qk", False) else "kept",
        order,
        "0 or full" if all(whole) else f"{sizes}; some blocks 0 or full" if any(whole) else sizes,
        "0 or full" if mlp.binary else "every group",
    )


def notes(models: Iterable[tuple[Any, tuple[ModuleInfo, ...]]]) -> str:
    """What the models of a row share, and what only some of them have."""
    found: defaultdict[str, int] = defaultdict(int)
    count = 0
    for model, infos in models:
        count += 1
        activation = ACTIVATIONS[infos[1].act] if infos[1].act != "gelu" else None
        for note in [activation, *(note for note, has in NOTES.items() if has(model))]:
            if note:
                found[note] += 1
    shared = [note for note, hits in found.items() if hits == count]
    others = [note for note in found if note not in shared]
    parts = [", ".join(shared), f"some: {', '.join(others)}" if others else ""]
    return "; ".join(part for part in parts if part)


def supported_and_refused() -> tuple[dict[tuple[str, ...], list[Any]], dict[tuple[str, str], list[str]]]:
    """Rows of each table: (family, columns...) -> (name, model, infos), and (class, where) -> names."""
    supported, refused = defaultdict(list), defaultdict(list)
    for name in names():
        model = tiny(name)
        try:
            infos = modules_of(model)
        except ValueError as error:
            where, feature = re.match(r"blocks\.0(\S*) is a (\w+)", str(error)).groups()
            place = {"": "block", ".attn": "attention", ".mlp": "MLP"}[where]
            refused[feature, place].append(name)
        else:
            supported[family(name), *conversion(infos)].append((name, model, infos))
    return dict(supported), dict(refused)


def table() -> str:
    """The two Markdown tables with their captions."""
    supported, refused = supported_and_refused()
    good, bad = (sum(map(len, rows.values())) for rows in (supported, refused))
    lines = [
        f"timm {timm.__version__} builds {good + bad} names as a VisionTransformer, an Eva or a Beit; "
        f"{good} of them convert.",
        "A group is 8 coordinates of every head by default, or about 1/32 of the MLP's neurons. Where an attention",
        "is cut by heads, they are sorted and nothing is rotated within them.",
        "",
        "| family | names | example | V | Q, K | MLP neurons | attention widths | MLP widths | notes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = [label for label, _ in FAMILIES]
    for key, rows in sorted(supported.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]))):
        label, *columns = key
        note = notes((model, infos) for _, model, infos in rows)
        lines.append(f"| {' | '.join([label, str(len(rows)), f'`{rows[0][0]}`', *columns, note])} |")
    lines += [
        "",
        f"The other {bad} names, and every model of another class (Swin, NaFlexVit), are refused with a ValueError",
        "that names the feature or the class:",
        "",
        "| feature | where | names | example |",
        "|---|---|---|---|",
    ]
    for (feature, place), refused_names in sorted(refused.items(), key=lambda item: -len(item[1])):
        lines.append(f"| `{feature}` | {place} | {len(refused_names)} | `{refused_names[0]}` |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the table of supported architectures.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the table between FILE's markers")
    path = parser.parse_args().write
    if path is None:
        print(table())
        return
    rewrite(path, table(), BEGIN, END)


if __name__ == "__main__":
    main()
