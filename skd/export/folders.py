"""A folder for timm: config.json, model.safetensors and, where timm cannot build the network, a model.py that can."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save_file

from skd.export.comparison import compare
from skd.files import TOLERANCE, Header, header_of
from skd.support.outputs import usual_mode, write_json
from skd.vit import TimmModel, standalone
from skd.vit.construction import Construction
from skd.vit.registered import registered, write_registered

ONLY_MODEL_PY = "this folder is loaded by its model.py"  # timm says that it knows no such architecture


class Config(TypedDict):
    """config.json beside a model.py; the fields that timm has too mean the same.

    Attributes:
        network: how the network at its full widths is built, and the widths of each block.
    """

    architecture: str
    num_classes: int
    num_features: int
    label_names: list[str] | None
    pretrained_cfg: dict[str, object]
    network: dict[str, object]


def write(model: TimmModel, folder: Path) -> str:
    """Write `model` into the new `folder`.

    Returns:
        "timm" if ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, else "model.py".
    """
    header = header_of(model)
    folder.mkdir(parents=True)
    native = registered(model, header, header["widths"])
    if native is None:
        _write_self_contained(model, header, folder)
    else:
        write_registered(native, folder, header["data"], header["label_names"])
    usual_mode(folder / "model.safetensors")
    return "model.py" if native is None else "timm"


def _write_self_contained(model: TimmModel, header: Header, folder: Path) -> None:
    network = {key: header[key] for key in (*Construction.__annotations__, "widths", "versions")}  # type: ignore[literal-required]
    cfg = header["data"] | {"num_classes": model.num_classes, "label_names": header["label_names"]}
    config: Config = {
        "architecture": ONLY_MODEL_PY,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": header["label_names"],
        "pretrained_cfg": cfg,
        "network": network,
    }
    write_json(folder / "config.json", config)
    tensors: dict[str, torch.Tensor] = model.state_dict()
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors"
    )
    source = Path(standalone.__file__).read_text(encoding="utf-8")
    (folder / "model.py").write_text(source, encoding="utf-8")
    parameter = next(model.parameters())
    rebuilt = standalone.load(folder).to(parameter.device)
    compare(model.eval(), rebuilt, TOLERANCE[parameter.dtype], "what model.py builds")
