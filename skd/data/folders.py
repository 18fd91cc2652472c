"""Folders of images: one sub-folder per class, as timm reads them, or images without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from skd.data.readers import ReaderSource, Source, names_of
from skd.data.scanning import Found, LeftOut, search, shown
from skd.data.splits import EVALUATION, TRAIN, is_plain, kinds, split_folder

__all__ = ["EVALUATION", "TRAIN", "ClassMap", "existing_folder", "open_folder", "split_folder"]

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


def open_folder(
    folder: Path,
    split: str,
    mode: str,
    class_map: ClassMap | None,
    require_split: bool,
    labelled: bool = True,
    **options: Any,
) -> Source:
    """One split of a folder; arguments and errors as in `open_source`, options those of `Source`."""
    place = split_folder(folder, split, require_split, labelled)
    left_out = LeftOut()
    images = search(place, left_out)
    mapped = class_map is not None
    if not labelled:
        if not images:
            raise _nothing(folder, place, left_out, mapped=False)
        files = FolderImages([(image.path, -1) for image in images])
        return ReaderSource(files, str(place), mode, root=place, labelled=False, left_out=left_out, **options)
    if class_map is not None:
        class_to_index = _class_map(class_map, place)
        images = list(_of_classes(images, class_to_index, left_out))
    if not images:
        raise _nothing(folder, place, left_out, mapped)
    if class_map is None:
        _check_depth(folder, place, images)
        names = sorted({_class_of(image) for image in images}, key=natural_key)
        class_to_index = {name: label for label, name in enumerate(names)}
    if place == folder:
        _check_undivided(folder, images)
    files = FolderImages([(image.path, class_to_index[_class_of(image)]) for image in images])
    classes = names_of(class_to_index)
    return ReaderSource(
        files, str(place), mode, classes=classes, root=place, mapped=mapped, left_out=left_out, **options
    )


def open_image_folder(
    folder: Path, split: str, mode: str, require_split: bool, labelled: bool = True, **options: Any
) -> Source:
    """The same as torchvision's ImageFolder has it: the sub-folders are the classes, however deep their images lie.

    They are in the order of their names as strings ("10" before "2"), which is torchvision's.
    """
    place = split_folder(folder, split, require_split, labelled)
    left_out = LeftOut()
    images = []
    for image in search(place, left_out):
        if image.parent or not labelled:
            images.append(image)
        else:
            left_out.add("in no class", os.path.basename(image.path))
    if not images:
        raise _nothing(folder, place, left_out, mapped=False)
    if place == folder:
        _check_undivided(folder, [image for image in images if image.parent])
    classes = sorted({_top(image) for image in images}) if labelled else None
    labels = {name: label for label, name in enumerate(classes or ())}
    files = FolderImages([(image.path, labels.get(_top(image), -1)) for image in images])
    return ReaderSource(
        files, str(place), mode, classes=classes, root=place, labelled=labelled, left_out=left_out, **options
    )


class FolderImages:
    """Files with labels, in the form of timm's readers."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, absolute: bool = True) -> str:
        return self.samples[index][0]


def _class_of(image: Found) -> str:
    """The name of the folder that an image lies in, "" if that is the one of the split."""
    return os.path.basename(image.parent)


def _top(image: Found) -> str:
    """The first of the folders that an image lies in, "" if that is the one of the split."""
    return Path(image.parent).parts[0] if image.parent else ""


def _class_map(class_map: ClassMap, place: Path) -> Mapping[str, int]:
    if isinstance(class_map, os.PathLike):
        class_map = os.fspath(class_map)
    try:
        loaded: Mapping[str, int] = load_class_map(class_map, str(place))
    except (AssertionError, OSError, ValueError, UnpicklingError) as error:
        raise ValueError(f"class_map is {class_map!r}; it cannot be used: {error}") from None
    return loaded


def _of_classes(images: list[Found], class_to_index: Mapping[str, int], left_out: LeftOut) -> Iterable[Found]:
    for image in images:
        name = _class_of(image)
        if name in class_to_index:
            yield image
        else:
            left_out.add(f"not in class_map ({name or 'no class'})", os.path.basename(image.path))


def _nothing(folder: Path, place: Path, left_out: LeftOut, mapped: bool) -> ValueError:
    of_map = " of the classes in class_map" if mapped else ""
    reason = f"; left out: {left_out}" if left_out else ""
    return ValueError(f"data is {str(folder)!r}; there are no images{of_map} in {place}{reason}")


def _check_depth(folder: Path, place: Path, images: list[Found]) -> None:
    """Raises ValueError: images lie beside folders of images, so what their class is cannot be told."""
    parents = {image.parent for image in images}
    if "" in parents:
        lie = "all of its images lie" if len(parents) == 1 else "some of its images lie"
        raise ValueError(
            f"data is {str(folder)!r}; {lie} directly in {place}, they must be in sub-folders, one for each class"
        )
    above = {str(parent) for name in parents for parent in Path(name).parents} & parents
    if above:
        raise ValueError(
            f"data is {str(folder)!r}; {shown(sorted(above))} in {place} holds images and also folders of images; "
            "the images of a class must be in one folder"
        )


def _check_undivided(folder: Path, images: list[Found]) -> None:
    """Raises ValueError: the folder looks divided, in a way that is not understood.

    Taken for one set, its training images would be among those to validate with.
    """
    parents = sorted({image.parent for image in images})
    names = Counter(os.path.basename(parent) for parent in parents)
    several = [name for name in names if names[name] > 1]
    hint = "give the folder of one split, or its name as the split (--train-split, --val-split)"
    if several:
        where = shown([parent for parent in parents if os.path.basename(parent) == several[0]])
        raise ValueError(
            f"data is {str(folder)!r}; the class {several[0]!r} lies under several folders ({where}), which do not "
            f"have the names of splits such as train and val; {hint}"
        )
    on_the_way = sorted({part for parent in parents for part in Path(parent).parts})
    plain = [name for name in on_the_way if is_plain(name) or all(len(kinds(name)) == 1 for name in names)]
    splits = [name for name in plain if kinds(name)]
    if {"train", "evaluation"} <= set().union(*(kinds(name) for name in splits)):
        raise ValueError(
            f"data is {str(folder)!r}; the images of {shown(splits)} must be in sub-folders, one for each class"
        )
