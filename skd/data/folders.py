"""Folders of images: which sub-folder is a split, which files are images, and which folder of them is a class.

`split_folder` finds the split, `search` its files; `open_folder` (a sub-folder per class, as timm reads them, or
images without labels) and `open_image_folder` (as torchvision reads them) make a `ReaderSource` of them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, NamedTuple

from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from skd.data.indexed import ReaderSource
from skd.data.pixels import extensions
from skd.data.source import About, ClassMap, LeftOut, names_of, shown

TRAIN = ("train", "training")
# These are timm's names, in order of preference: "test" is used only if no other split can be evaluated on.
EVALUATION = ("validation", "val", "valid", "eval", "evaluation", "dev", "test", "testing")

_DEPTH = 6  # folders with nothing but one folder in them; links may go round in circles
_OF_THE_SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # folders with copies or previews, not with images

# What is in a folder


class Found(NamedTuple):
    """One image file.

    Attributes:
        path: where it is.
        parent: its folder, relative to the one that was searched; "" for that itself.
    """

    path: str
    parent: str


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_THE_SYSTEM


def sub_folders(folder: Path) -> list[str]:
    """Names of the sub-folders that are not hidden, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir())


def has_folders(folder: Path) -> bool:
    """Whether there is a sub-folder that is not hidden."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(not is_hidden(entry.name) and entry.is_dir() for entry in entries)


def search(folder: Path, left_out: LeftOut) -> list[Found]:
    """All images below a folder, in timm's order; all other files are recorded in `left_out`."""
    images: list[Found] = []
    for parent, files in _walk(folder, left_out):
        place = os.path.join(folder, parent)
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if is_hidden(file):
                left_out.add("hidden", os.path.join(parent, file))
            elif ending in extensions():
                images.append(Found(os.path.join(place, file), parent))
            else:
                left_out.add(f"no image by its name ({ending or 'without ending'})", os.path.join(parent, file))
    return sorted(images, key=lambda image: natural_key(image.path))


def _walk(folder: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to `folder`, names of its files); links are followed, but not in circles."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        parent = os.path.relpath(root, folder)
        parent = "" if parent == "." else parent
        real = os.path.realpath(root)
        if any(os.path.islink(os.path.join(root, name)) for name in folders) or real in seen:
            folders[:] = [name for name in folders if not _circular(os.path.join(root, name), real)]
        seen.add(real)
        for name in folders:
            if is_hidden(name):
                left_out.add("hidden", os.path.join(parent, name))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if not folders and not files and parent:
            left_out.add("empty folder", parent)
        yield parent, sorted(files)


def _circular(link: str, root: str) -> bool:
    """Whether a link leads to a folder that it is in."""
    target = os.path.realpath(link)
    return root == target or root.startswith(target + os.sep)


# Its splits


def split_folder(folder: Path, split: str, required: bool = False, labelled: bool = True) -> Path:
    """The sub-folder of a split; `folder` itself if it is not divided into splits.

    The split is found by its name or a synonym, in upper or lower case (Train), also as one word of a longer name
    (seg_train, train_images, val2017). It is looked for in `folder`, and in a single divided sub-folder (data/train).

    Args:
        folder: of a data set.
        split: "train", "validation", or the name of a sub-folder. What follows a "[" is ignored.
        required: a folder that is not divided is an error.
        labelled: a split must hold folders of classes; otherwise it may hold images, if there is another split.

    Raises:
        ValueError: the name leads out of `folder`; `folder` is divided, but no split has this name, or several do;
            or `folder` is not divided although this is `required`.
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
    """The kinds of split that the words of a folder's name suggest: a subset of "train" and "evaluation"."""
    words = _words(name)
    return {kind for kind, names in (("train", TRAIN), ("evaluation", EVALUATION)) if words & set(names)}


def _words(name: str) -> set[str]:
    """The words of a name in lower case, without digits: GTSRB_TrainingImages2 has gtsrb, training, images."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    return words | {word.removesuffix("set") for word in words}


def is_plain(name: str) -> bool:
    """Whether a name is exactly that of a split. Such a folder counts as a split even if it is the only one."""
    return name.lower() in TRAIN + EVALUATION


def _called(wanted: str, found: list[str]) -> list[str]:
    """The splits that match a name: exactly, else in upper or lower case, else as one of several words."""
    exact = [name for name in found if name == wanted]
    alike = [name for name in found if name.lower() == wanted.lower()]
    among = [name for name in found if wanted in _words(name) and wanted in TRAIN + EVALUATION]
    return exact or alike or among


def _splits(place: Path, labelled: bool) -> list[str]:
    """Names of the sub-folders that are splits. A class that happens to be called "train" does not count."""
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


# Its classes


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
    labelled: bool,
    exif_orientation: bool,
) -> ReaderSource:
    """One split of a folder; arguments and errors as in `open_source`."""
    place = split_folder(folder, split, require_split, labelled)
    left_out = LeftOut()
    about: About = {"root": place, "left_out": left_out, "exif_orientation": exif_orientation}
    images = search(place, left_out)
    mapped = class_map is not None
    if not labelled:
        if not images:
            raise _nothing(folder, place, left_out, mapped=False)
        files = FolderImages([(image.path, -1) for image in images])
        return ReaderSource(files, str(place), mode, **about | {"labelled": False})
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
    return ReaderSource(files, str(place), mode, **about | {"classes": classes, "mapped": mapped})


def open_image_folder(
    folder: Path, split: str, mode: str, require_split: bool, labelled: bool, exif_orientation: bool
) -> ReaderSource:
    """One split of a folder as torchvision's ImageFolder reads it: each sub-folder is a class, at any depth.

    The classes are sorted by their names as strings ("10" before "2"), as in torchvision.
    """
    place = split_folder(folder, split, require_split, labelled)
    left_out = LeftOut()
    about: About = {"root": place, "left_out": left_out, "exif_orientation": exif_orientation}
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
    return ReaderSource(files, str(place), mode, **about | {"classes": classes, "labelled": labelled})


class FolderImages:
    """Files with labels, in the form of timm's readers."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> tuple[IO[bytes], int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, /, *, absolute: bool) -> str:
        return self.samples[index][0]


def _class_of(image: Found) -> str:
    """The name of the folder that an image lies in; "" if it lies directly in the folder of the split."""
    return os.path.basename(image.parent)


def _top(image: Found) -> str:
    """The outermost folder below the split that holds an image; "" if it lies directly in the folder of the split."""
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
    """Raises ValueError: images lie beside folders of images, so their class is ambiguous."""
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
    """Raises ValueError: the folder looks divided into splits, but in a way that skd does not recognise.

    If it were read as one set, training images would be among the validation images.
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
