"""How to build a timm model again: by its name and arguments, or by its constructor's arguments.

Models from ``timm.create_model`` record their name and arguments. The constructor arguments of a model that was built
directly are read off its modules while it is whole, because an extracted model no longer shows them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, TypedDict

import timm
from timm.models import get_model_args

from skd.vit.families import family_named
from skd.vit.models import create_model
from skd.vit.protocol import Network, TimmModel

# Arguments of timm.create_model that read something other than the architecture.
_NOT_ARCHITECTURE = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class Construction(TypedDict):
    """How a model was built, in JSON values.

    `architecture` is timm's name of it, or None: then `model_args` are the arguments of the class's own constructor.
    `norm_eps` is None where timm's default holds.
    """

    architecture: str | None
    model_class: str
    model_args: dict[str, object]
    norm_eps: float | None


def remember_construction(model: TimmModel, network: Network) -> None:
    """Record the arguments that rebuild `model` where timm keeps them, if timm has not and they can be read off."""
    if _known_to_timm(model) or _remembered(model):
        return
    with suppress(ValueError):
        model._model_args = network.constructor_args(model)
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "architecture": None}


def construction(model: TimmModel, network: Network) -> Construction:
    """The description of `model` from which `build` builds it again.

    Raises:
        ValueError: nothing says how the model was built.
    """
    known = _known_to_timm(model)
    args: dict[str, Any] = get_model_args(model) if known or _remembered(model) else network.constructor_args(model)
    norm_eps = args.pop("norm_eps", None)
    return {
        "architecture": model.pretrained_cfg["architecture"] if known else None,
        "model_class": type(model).__name__,
        "model_args": args,
        "norm_eps": norm_eps,
    }


def build(header: Construction) -> TimmModel:
    """The module that `construction` described, freshly initialised.

    Raises:
        ValueError: unknown architecture or class.
    """
    args = dict(header["model_args"])
    forbidden = _NOT_ARCHITECTURE & args.keys()
    if forbidden:
        raise ValueError(f"model_args has {sorted(forbidden)}; a file may not name other files or weights")
    if header["architecture"] is not None:
        return create_model(header["architecture"], pretrained=False, **args)
    name = header["model_class"]
    return family_named(name).construct(name, args, header["norm_eps"])


def _known_to_timm(model: TimmModel) -> bool:
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        return False
    try:
        json.dumps(get_model_args(model))
    except TypeError:  # an argument that is a class or a function
        return False
    return True


def _remembered(model: TimmModel) -> bool:
    return "norm_eps" in getattr(model, "_model_args", {})
