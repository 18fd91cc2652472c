"""Which sub-folder of a data set holds the training images, and which the others: by names that people give them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from skd.data.scanning import has_folders, shown, sub_folders

TRAIN = ("train", "training")
# timm's names; "test" last, so that a folder with train and test has something to evaluate on.
EVALUATION = ("validation", "val", "valid", "eval", "evaluation", "dev", "test", "testing")

_DEPTH = 6  # folders with nothing but one folder in them; links may go round in circles


def split_folder(folder: Path, split: str, required: bool = False, labelled: bool = True) -> Path:
    """The sub-folder of a split; `folder` itself if it is not divided into splits.

    It is found by its name or a synonym, whatever the case (Train), or where that is one word of several (seg_train,
    train_images, val2017); in `folder`, or in the one sub-folder of it that is divided (data/train).

    Args:
        folder: of a data set.
        split: "train", "validation", or the name of a sub-folder. What follows a "[" is ignored.
        required: a folder that is not divided is an error.
        labelled: a split holds folders of classes; otherwise it may hold images, if there is another split.

    Raises:
        ValueError: the name leads out of `folder`; or it is divided, but does not have this split, or two that may be
            it; or it is not, and that is `required`.
    """
    name = split.split("[")[0]
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"data is {str(folder)!r}, split {split!r}; that must be the name of one of its sub-folders")
    if has_folders(folder / name) and name:
        return folder / name
    synonyms = next((names for names in (TRAIN, EVALUATION) if name.lower() in names), ())
    tried = list(dict.fromkeys((name, *synonyms)))
    place = _divided(folder, labelled)
    found = _splits(place, labelled)
    for wanted in tried:
        candidates = _called(wanted, found)
        if len(candidates) > 1:
            raise ValueError(
                f"data is {str(folder)!r}, split {split!r}; that may be any of {', '.join(candidates)}: name one"
            )
        if candidates:
            return place / candidates[0]
    if not synonyms and name in sub_folders(place) and not labelled:
        return place / name
    if found or not synonyms:
        has = f"it has {', '.join(found)}, but " if found else "it has "
        raise ValueError(
            f"data is {str(folder)!r}; {has}no sub-folder {' or '.join(tried)} with sub-folders of classes in it"
        )
    if required:
        raise ValueError(
            f"data is {str(folder)!r}; training needs images to train and others to validate with, in sub-folders "
            f"named {TRAIN[0]} and {EVALUATION[0]} (or {', '.join(TRAIN[1:] + EVALUATION[1:])})"
        )
    return folder


def kinds(name: str) -> set[str]:
    """ "train" and "evaluation": what the words of a folder's name say that it is."""
    words = _words(name)
    return {kind for kind, names in (("train", TRAIN), ("evaluation", EVALUATION)) if words & set(names)}


def _words(name: str) -> set[str]:
    """In lower case, without digits: GTSRB_Final_TrainingImages2 has gtsrb, final, training, images."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    return words | {word.removesuffix("set") for word in words}


def is_plain(name: str) -> bool:
    """The name of a split and nothing else, so that it is one even without a counterpart."""
    return name.lower() in TRAIN + EVALUATION


def _called(wanted: str, found: list[str]) -> list[str]:
    """Those of the splits that go by a name: exactly, or in another case, or among other words."""
    exact = [name for name in found if name == wanted]
    alike = [name for name in found if name.lower() == wanted.lower()]
    among = [name for name in found if wanted in _words(name) and wanted in TRAIN + EVALUATION]
    return exact or alike or among


def _splits(place: Path, labelled: bool) -> list[str]:
    """Names of the sub-folders that are splits; a class that happens to be called "train" is none."""
    named = [name for name in sub_folders(place) if len(kinds(name)) == 1]
    nested = [name for name in named if has_folders(place / name)]
    both = nested if labelled else named
    if {"train", "evaluation"} <= set().union(*map(kinds, both)):
        return both
    return [name for name in nested if is_plain(name)]


def _divided(folder: Path, labelled: bool) -> Path:
    """The folder whose sub-folders are the splits: `folder`, or one below; `folder` if there is none.

    Raises:
        ValueError: there are several.
    """
    place = folder
    for _ in range(_DEPTH):
        if _splits(place, labelled):
            return place
        names = sub_folders(place)
        divided = [name for name in names if len(set().union(*map(kinds, _splits(place / name, labelled)))) == 2]
        if len(divided) > 1:
            raise ValueError(
                f"data is {str(folder)!r}; several of its sub-folders have a split for training and one for "
                f"evaluation ({shown(divided)}): give one of them"
            )
        if divided:
            return place / divided[0]
        nested = [name for name in names if has_folders(place / name)]
        if len(nested) != 1 and len(names) != 1:
            return folder
        place = place / (nested or names)[0]
    return folder
