"""README.md of a repository on a hub: what the network is, its sizes, and how each is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCardData

from skd import __version__
from skd.export.manifest import Member
from skd.support.curve import Row

_METHOD = (
    "Cut out of a Stratified Knowledge-Density super-network ([arXiv 2511.11683](https://arxiv.org/abs/2511.11683)) "
    "by skd {version}: one Vision Transformer whose weights are sorted by how much they know, so that each size is a "
    "slice of it."
)
_PLAIN = "A Vision Transformer, exported by skd {version}."
_TRANSFORM = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
# How each layout is loaded from a repository {repo}, where it is the file or the folder {path}.
_LOAD = {
    "timm": f"""import timm
from huggingface_hub import snapshot_download

model = timm.create_model("local-dir:" + snapshot_download("{{repo}}") + "/{{path}}", pretrained=True).eval()
{_TRANSFORM}
""",
    "model.py": f"""import sys

import timm
from huggingface_hub import snapshot_download

folder = snapshot_download("{{repo}}") + "/{{path}}"
sys.path.insert(0, folder)
from model import load  # model.py in the repository: it needs timm alone

model = load(folder)
{_TRANSFORM}
""",
    "onnx": """import onnxruntime
from huggingface_hub import hf_hub_download

session = onnxruntime.InferenceSession(hf_hub_download("{repo}", "{path}"))
preprocessing = session.get_modelmeta().custom_metadata_map["preprocessing"]  # JSON
(logits,) = session.run(None, {{"images": images}})  # any number of images, float32
""",
    "pt2": """import torch
from huggingface_hub import hf_hub_download

about = {{"preprocessing": "", "label_names": ""}}  # JSON
model = torch.export.load(hf_hub_download("{repo}", "{path}"), extra_files=about).module()
logits = model(images)  # any number of images
""",
}
_HUB = f"""import timm

model = timm.create_model("hf-hub:{{repo}}", pretrained=True).eval()
{_TRANSFORM}
"""


def card(
    repo: str,
    members: Mapping[str, Member],
    curve: Sequence[Row],
    architecture: str | None,
    license: str | None,
    classes: int,
) -> str:
    """The page.

    Args:
        repo: the name of the repository, "USER/NAME".
        members: what is in it, by the path of the file or folder; "" for a folder that is the repository itself.
        curve: sizes of the super-network that they were cut out of; empty for a plain model.
        architecture: timm's name of the full network, or None.
        license: of the weights, as the hub calls it, or None.
        classes: how many the network has; 0: its outputs are features.
    """
    layouts = {member["layout"] for member in members.values()}
    at_root = set(members) == {""} and layouts == {"timm"}
    task = "image-classification" if classes else "image-feature-extraction"
    cut = any(member["entry"] is not None for member in members.values())
    data = ModelCardData(
        license=license,
        library_name="timm" if at_root else None,
        pipeline_tag=task,
        tags=[task, "skd", *(["timm"] if layouts <= {"timm", "model.py"} else [])],
    )
    parts = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {repo.split('/')[-1]}",
        "",
        (_METHOD if cut else _PLAIN).format(version=__version__),
        "",
    ]
    whole = "The full network is" if cut else "Its architecture comes from"
    parts += [f"{whole} timm's `{architecture}`.", ""] if architecture else []
    parts += ["## What is here", "", *_table({path or "this folder": member for path, member in members.items()}), ""]
    parts += ["## How to load it", "", *_loading(repo, members, at_root, classes)]
    if curve:
        parts += ["## The curve", "", "Sizes of the super-network, the largest sub-network within each budget.", ""]
        parts += [*_table({f"{row['macs_fraction']:.1%} of the MACs": row for row in curve}), ""]
    return "\n".join(parts)


def _table(rows: Mapping[str, Member] | Mapping[str, Row]) -> list[str]:
    """A table of sizes in Markdown."""
    lines = [
        "| | entry | MACs (with Q K^T and A V) | MACs (without) | parameters | top-1 (%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        entry, top1 = row["entry"], row.get("top1")
        cells = [name, "-" if entry is None else str(entry)]
        cells += [f"{row['macs']:,}", f"{row['macs_linear']:,}", f"{row['params']:,}"]
        lines.append(f"| {' | '.join([*cells, 'not given' if top1 is None else f'{top1:.2f}'])} |")
    return lines


def _loading(repo: str, members: Mapping[str, Member], at_root: bool, classes: int) -> list[str]:
    """How one member of each layout is loaded."""
    if at_root:
        also = f'transformers too: `AutoModelForImageClassification.from_pretrained("{repo}")` gives a TimmWrapper.'
        return [*_fenced(_HUB.format(repo=repo)), *([also, ""] if classes else [])]
    lines = []
    for path, layout in {member["layout"]: (path, member["layout"]) for path, member in members.items()}.values():
        lines += _fenced(_LOAD[layout].format(repo=repo, path=path or "."))
    return lines


def _fenced(code: str) -> list[str]:
    return ["```python", code.rstrip(), "```", ""]
