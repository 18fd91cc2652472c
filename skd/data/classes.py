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


def agree(source: Source, model: Any, like: Source | None = None) -> None:
    """Give the images of `source` the labels that the model has for their classes, or `like`, another split.

    Raises:
        ValueError: the two splits, or the images and the model's head, do not have the same classes.
    """
    if like is not None:
        match_classes(source, like.classes)
        check_same_classes(like, source)
    if model.num_classes and source.labelled:
        check_classes(source, model.num_classes)
        if like is None:
            match_model(source, model)


def name_classes(model: Any, images: Source, trained: bool) -> None:
    """Give the model the names of the classes of its images, for the files that it is saved to.

    The names it has stay, unless they are not of its head or it is `trained` anew. By a class map labels may have
    other names than the model knew, or names of which not all are known: then the trained model has none.
    """
    known, names = getattr(model, "pretrained_cfg", {}), images.classes
    if not model.num_classes or (images.mapped and not trained):
        return
    if images.mapped and (names is None or len(names) != model.num_classes):
        model.pretrained_cfg = {key: value for key, value in known.items() if key != "label_names"}
    elif names and (trained or label_names(model) is None):
        model.pretrained_cfg = {**known, "label_names": names}


def check_classes(source: Source, num_classes: int) -> None:
    """Compare the classes of a data set with a head's: their number must be the same.

    Nothing is compared for a headless model (0 classes), where a class map decides, or where the classes are unknown;
    labels are checked as they come in any case.

    Raises:
        ValueError: the numbers differ; the message says how to make a head that fits.
    """
    found = source.classes
    if not num_classes or source.mapped or found is None or len(found) == num_classes:
        return
    count = len(found)
    shown = ", ".join(found[:5]) + (", ..." if count > 5 else "")
    raise ValueError(
        f"{source.name} has {count} classes ({shown}), the model's head has {num_classes}; give a class map, or make "
        f"a head that fits: model.reset_classifier({count}), or --num-classes {count} (convert, train, finetune); "
        "--labels predicted (convert, plan) takes images of any classes"
    )


def check_same_classes(training: Source, other: Source) -> None:
    """Raises ValueError: two splits of a data set have different classes, as far as they are known."""
    if not training.classes or not other.classes or other.mapped or training.classes == other.classes:
        return
    names = sorted(set(training.classes) ^ set(other.classes))
    if not names:
        raise ValueError(f"{training.name} and {other.name} have the same classes in another order")
    raise ValueError(
        f"{training.name} and {other.name} have different classes, so their labels differ: only in one is {names[0]}"
        + (f" (and {len(names) - 1} others)" if len(names) > 1 else "")
    )
