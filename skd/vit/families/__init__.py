"""The families of transformers that can be converted; adding one is adding one file here.

The files register themselves:

    vision_transformer   timm's VisionTransformer: DeiT, DINOv2, CLIP, SigLIP, AIMv2, ...
    eva                  timm's Eva: DINOv3, EVA-02, Perception Encoder, ...
    beit                 timm's Beit
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import TypeVar

from skd.vit.protocol import Network, TimmModel

_FAMILIES: list[type[Network]] = []
_Family = TypeVar("_Family", bound=type[Network])


def register(family: _Family) -> _Family:
    """Class decorator: models of its `model_classes` are described by `family`."""
    _FAMILIES.append(family)
    return family


def families() -> tuple[type[Network], ...]:
    """All families, by the names of their modules. The files of this folder are imported at the first call."""
    _import_files()
    return tuple(sorted(_FAMILIES, key=lambda family: family.__module__))


@cache
def _import_files() -> None:
    for file in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{file.name}")


def family_of(model: TimmModel) -> type[Network] | None:
    """The family of a model, by its class, or None if no family has it."""
    return next((family for family in families() if isinstance(model, family.model_classes)), None)


def family_named(name: str) -> type[Network]:
    """The family that has a class of models, by the name of the class that `skd.save` wrote.

    Raises:
        ValueError: no family has it.
    """
    known = {cls.__name__: family for family in families() for cls in family.model_classes}
    if name not in known:
        raise ValueError(f"model_class is {name!r}; it may be one of {sorted(known)}")
    return known[name]


def describe(model: TimmModel) -> Network:
    """The description of a timm model.

    Raises:
        ValueError: an architecture or feature that has no function-preserving nested form; the message names it.
    """
    family = family_of(model)
    if family is None:
        *known, last = [cls.__name__ for family in reversed(families()) for cls in family.model_classes]
        raise ValueError(
            f"model is a {type(model).__module__}.{type(model).__name__}; it must be a timm "
            f"{', '.join(known)} or {last} (Swin, NaFlexVit and others are not supported)"
        )
    return family.describe(model)
