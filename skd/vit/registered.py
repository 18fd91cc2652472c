"""Which cut networks timm alone can build: those whose blocks have the shape of a network in its registry."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from timm.models import save_for_hf

from skd.vit.construction import Construction, build
from skd.vit.families.vision_transformer import mlp_ratio
from skd.vit.images import probe
from skd.vit.protocol import TimmModel

# A network of each class in timm's registry, all of whose arguments can be given.
_NAMES = {
    "VisionTransformer": "vit_base_patch16_224",
    "VisionTransformerDistilled": "deit_base_distilled_patch16_224",
}


@torch.no_grad()
def registered(model: TimmModel, origin: Construction, widths: list[list[int]]) -> TimmModel | None:
    """The same network from ``timm.create_model``, or None if no name and arguments of timm's give it.

    timm's arguments say one width of all MLPs, and none of attentions. Whether it is the same network is tried: its
    parameters must have the same names and shapes, and its logits must be the same numbers.

    Args:
        model: as `skd.extract` cuts it.
        origin: how the network that it was cut out of was built.
        widths: [attention, MLP] of each block.
    """
    name = origin["architecture"] or _NAMES.get(origin["model_class"])
    if name is None or (origin["architecture"] is None and origin["norm_eps"] is not None):
        return None
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    neurons = {mlp for _, mlp in widths}
    ratios = [{}] if len(neurons) > 1 else [{}, *_ratios(neurons.pop(), int(model.embed_dim))]
    for ratio in ratios:
        told: Construction = {**origin, "architecture": name, "model_args": {**origin["model_args"], **ratio}}
        try:
            with torch.device("meta"):
                fits = {key: tensor.shape for key, tensor in build(told).state_dict().items()} == shapes
            found = _with_weights(build(told), model) if fits else None
        except (TypeError, ValueError, RuntimeError):  # an argument that the name does not take
            continue
        if found is not None:
            return found
    return None


def write_registered(model: TimmModel, folder: Path, data: dict[str, object], names: list[str] | None) -> None:
    """Write what `registered` found as timm's folder for a hub: config.json and model.safetensors.

    Args:
        data: the preprocessing, and the size of images.
        names: of the classes, or None.
    """
    # The tag and the license are those of timm's default weights of that name; these may come from others.
    known = {key: value for key, value in model.pretrained_cfg.items() if key not in ("tag", "license")}
    model.pretrained_cfg = {**known, **data, "num_classes": model.num_classes}
    save_for_hf(model, str(folder), model_config={"label_names": names} if names else None, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers gives timm the one at the top of the file
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _ratios(neurons: int, dim: int) -> list[dict[str, float]]:
    """Values of mlp_ratio that give so many neurons: of plain MLPs, and of those whose argument counts gates too."""
    return [{"mlp_ratio": mlp_ratio(dim, hidden)} for hidden in (neurons, 2 * neurons)]


def _with_weights(built: TimmModel, model: TimmModel) -> TimmModel | None:
    """`built` with the weights of `model`, if it computes the same."""
    parameter, image = next(model.parameters()), probe(model)
    built.to(parameter.device, parameter.dtype).eval().load_state_dict(model.state_dict())
    return built if torch.equal(built(image), model.eval()(image)) else None
