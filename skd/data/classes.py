"""Classes of data and of a model, matched by name: labels are only numbers, in an order of their own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from skd.data.readers import Source


def label_names(model: Any) -> list[str] | None:
    """Names of the classes of a timm model's head, by label; None: unknown (or of another head than it has)."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if not isinstance(names, list | tuple) or len(names) != model.num_classes:
        return None
    return [str(name) for name in names]


def match_classes(source: Source, names: Sequence[str] | None) -> str | None:
    """Give the images of `source` the labels that `names` has for their classes.

    Nothing is changed where the names are unknown, where a class map decides, or where they are not the same set:
    then labels stay the numbers that they are.

    Args:
        source: from `open_source`; its labels and `classes` change.
        names: class names by label, such as those of a model (`label_names`).

    Returns:
        None, or if both are known and differ: the first label at which they do, in words.
    """
    found = source.classes
    if names is None or found is None or source.mapped or found == list(names):
        return None
    if len(set(names)) == len(names) and sorted(found) == sorted(names):
        places = {name: label for label, name in enumerate(names)}
        source.renumber([places[name] for name in found])
        source.classes = list(names)
        return None
    label = next(
        (i for i, (a, b) in enumerate(zip(found, names, strict=False)) if a != b), min(len(found), len(names))
    )
    here, there = (repr(of[label]) if label < len(of) else "none" for of in (found, names))
    return f"label {label} is {here} in the data, {there} in the model"


def match_model(source: Source, model: Any) -> None:
    """`match_classes` with those that `model` knows; a warning has the first difference."""
    difference = match_classes(source, label_names(model))
    if difference is not None:
        warnings.warn(
            f"{source.name} has other classes than the model, labels are taken as they are: {difference}",
            stacklevel=3,
        )
