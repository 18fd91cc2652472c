"""Folders with one sub-folder of images per class, as timm reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from timm.data import create_dataset

from skd.data.readers import ReaderSource, Source, names_of

TRAIN = ("train", "training")
# timm's names; "test" last, so that a folder with train and test has something to evaluate on.
EVALUATION = ("validation", "val", "valid", "eval", "evaluation", "test")

ClassMap = str | os.PathLike[str] | Mapping[str, int]


def existing_folder(data: str | os.PathLike[str]) -> Path:
    """Raises ValueError: there is no such folder."""
    folder = Path(data)
    if not folder.exists():
        raise ValueError(
            f"data is {str(data)!r}; there is no such folder, and it is neither 'digits' nor a name with a prefix "
            "(hfds/, hfids/, wds/, tfds/, torch/)"
        )
    if not folder.is_dir():
        raise ValueError(f"data is {str(data)!r}, a file; it must be a folder")
    return folder


def open_folder(folder: Path, split: str, mode: str, class_map: ClassMap | None, require_split: bool) -> Source:
    """One split of a folder; arguments and errors as in `open_source`."""
    place = split_folder(folder, split, require_split)
    if isinstance(class_map, os.PathLike):
        class_map = os.fspath(class_map)
    try:
        reader = create_dataset("", root=str(place), search_split=False, class_map=class_map).reader
    except RuntimeError:
        of_map = " of the classes in class_map" if class_map else ""
        raise ValueError(f"data is {str(folder)!r}; there are no images{of_map} in {place}") from None
    except (AssertionError, OSError, ValueError) as error:
        raise ValueError(f"class_map is {class_map!r}; it cannot be used: {error}") from None
    if "" in reader.class_to_idx:
        lie = "all of its images lie" if len(reader.class_to_idx) == 1 else "some of its images lie"
        raise ValueError(
            f"data is {str(folder)!r}; {lie} directly in {place}, they must be in sub-folders, one for each class"
        )
    classes = names_of(reader.class_to_idx)
    return ReaderSource(reader, str(place), mode, classes=classes, root=place, mapped=class_map is not None)


def split_folder(folder: Path, split: str, required: bool = False) -> Path:
    """The sub-folder of a split, by its name or a synonym; `folder` itself if it is not divided into splits.

    Raises:
        ValueError: `folder` is divided, but does not have this split; or it is not, and that is `required`.
    """
    name = split.split("[")[0]
    synonyms = next((names for names in (TRAIN, EVALUATION) if name in names), ())
    tried = list(dict.fromkeys((name, *synonyms)))
    for candidate in tried:
        if _has_folders(folder / candidate):
            return folder / candidate
    others = [candidate for candidate in TRAIN + EVALUATION if _has_folders(folder / candidate)]
    if others or not synonyms:
        has = f"it has {', '.join(others)}, but " if others else "it has "
        raise ValueError(
            f"data is {str(folder)!r}; {has}no sub-folder {' or '.join(tried)} with sub-folders of classes in it"
        )
    if required:
        raise ValueError(
            f"data is {str(folder)!r}; training needs images to train and others to validate with, in sub-folders "
            f"named {TRAIN[0]} and {EVALUATION[0]} (or {', '.join(TRAIN[1:] + EVALUATION[1:])})"
        )
    return folder


def _has_folders(folder: Path) -> bool:
    """So a class that happens to be called "train" is not taken for a split."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.is_dir() for entry in entries)
