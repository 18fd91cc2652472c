"""What every source of images has: a name, labels and their classes, and one way to report what cannot be read.

The functions after `Source` match the classes of the data with those of a model by name, because labels are only
numbers, and the two may number the same classes differently.
"""

from __future__ import annotations

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypedDict, Unpack

import torch
from PIL import Image

from skd.data.pixels import in_mode, in_pixels, is_turned, upright
from skd.vit import TimmModel

ClassMap = str | os.PathLike[str] | Mapping[str, int]

_SHOWN = 3

# What cannot be read, and what is left out


class BadImage(Exception):
    """One image that cannot be read.

    Attributes:
        file: its name.
        reason: why, on one line.
        missing: the file does not exist (otherwise it exists but is broken).
    """

    def __init__(self, file: str, reason: BaseException | str) -> None:
        self.file = file
        words = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        # Pillow also names the file object, which is either this file again or an address in memory.
        self.reason = " ".join(re.sub(r" <_io\.[^>]*>", "", words).split())
        super().__init__(f"{file} cannot be read: {self.reason}")
        self.missing = isinstance(reason, FileNotFoundError)


class LabelError(ValueError):
    """A label is not one of the classes of the head."""


class LeftOut:
    """Files and folders that are not read: how many for which reason, and the names of the first few."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str) -> None:
        count, names = self._found.get(reason, (0, []))
        self._found[reason] = (count + 1, names if count >= _SHOWN else [*names, name])

    def __bool__(self) -> bool:
        return bool(self._found)

    def to_dict(self) -> dict[str, dict[str, int | list[str]]]:
        """JSON values by reason."""
        found = sorted(self._found.items())
        return {reason: {"count": count, "such_as": list(names)} for reason, (count, names) in found}

    def __str__(self) -> str:
        """One line, such as "2 no image by its name (.txt): a/x.txt, a/y.txt; ..."."""
        parts = []
        for reason, (count, names) in sorted(self._found.items()):
            parts.append(f"{count} {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}")
        return "; ".join(parts)


def shown(names: Iterable[str], most: int = _SHOWN) -> str:
    """The first few of several names, separated by commas."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# Sources


class About(TypedDict, total=False):
    """The optional arguments of `Source`, by the names of its attributes."""

    classes: list[str] | None
    root: Path | None
    mapped: bool
    labelled: bool
    left_out: LeftOut
    exif_orientation: bool


class Source(ABC):
    """The images and labels of one split of a data set. `skd.data.opening.open_source` opens both kinds.

    `skd.data.indexed.IndexedSource` has numbered images, and `read` gives any of them.
    `skd.data.streams.StreamSource` has an order of its own, and `stream` gives the part of one worker.

    Attributes:
        name: for messages.
        classes: class names by label; None: unknown.
        mode: of the images, "L" or "RGB".
        root: the folder that the images are read from; None: there is none.
        mapped: labels come from a class map, so the number of classes need not be the head's.
        labelled: labels mean something; otherwise the loaders give None in their place.
        left_out: what is in the folder and not read.
        exif_orientation: pictures are turned as EXIF says. timm does not, so models are evaluated without.
        turned: names of pictures that EXIF says are not upright and were not turned, since it was last emptied.
        iterable: it is a stream.
    """

    iterable = False
    _new_labels: list[int] | None = None

    def __init__(self, name: str, mode: str, **about: Unpack[About]) -> None:
        self.name = name
        self.mode = mode
        self.classes = about.get("classes")
        self.root = about.get("root")
        self.mapped = about.get("mapped", False)
        self.labelled = about.get("labelled", True)
        self.left_out = about.get("left_out", LeftOut())
        self.exif_orientation = about.get("exif_orientation", False)
        self.turned: list[str] = []

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    def file(self, index: int) -> str:
        """What to call an image in messages: its file, or its number. It may take as long as reading the image."""
        return f"{self.name}[{index}]"

    @contextmanager
    def _decoding(self, index: int, name: str | None = None) -> Iterator[None]:
        """Inside the block any error of Pillow, or of the library around it, becomes a `BadImage`.

        Pillow's plugins raise all kinds of errors: OSError, SyntaxError, KeyError, IndexError, struct.error, ...
        """
        try:
            yield
        except (BadImage, LabelError, MemoryError):
            raise
        except Exception as reason:
            raise BadImage(name or self.file(index), reason) from reason

    def _prepared(self, image: Image.Image, index: int, name: str | None = None) -> Image.Image:
        """The image in `mode`. One that EXIF says is not upright is turned, or else noted in `turned`."""
        return in_mode(self._upright(image, index, name), self.mode)

    def _pixels(self, image: Image.Image, index: int, name: str | None = None) -> torch.Tensor:
        """`_prepared` as a tensor, (C, height, width) uint8."""
        return in_pixels(self._upright(image, index, name), self.mode)

    def _upright(self, image: Image.Image, index: int, name: str | None) -> Image.Image:
        if is_turned(image):
            if self.exif_orientation:
                return upright(image)
            self.turned.append(name or self.file(index))
        return image

    def renumber(self, new_labels: list[int]) -> None:
        """Give the images of label i the label ``new_labels[i]``. Other labels stay; the loaders refuse them."""
        old = self._new_labels
        self._new_labels = new_labels if old is None else [new_labels[label] for label in old]

    def _label(self, label: Any, index: int) -> int:
        """The label as an integer, renumbered; -1 where labels mean nothing.

        Raises:
            LabelError: it is not one integer.
        """
        if not self.labelled:
            return -1
        try:
            number = int(label)
        except (TypeError, ValueError):
            raise LabelError(f"{self.file(index)} has the label {label!r}; it must be one integer") from None
        renumbered = self._new_labels
        return number if renumbered is None or not 0 <= number < len(renumbered) else renumbered[number]


def opened(file: IO[bytes], decoded: bool = True) -> Image.Image:
    """The image in a file, decoded by Pillow, in the file's own mode. Without `decoded` a JPEG is only opened."""
    image = Image.open(file)
    if decoded or image.format != "JPEG":
        image.load()  # some formats have their EXIF block after the pixels
    return image


def names_of(class_to_index: Mapping[str, int]) -> list[str] | None:
    """Class names by label; None unless the labels are exactly 0..n-1, each used once."""
    names = {index: name for name, index in class_to_index.items()}
    if not names or len(names) < len(class_to_index) or sorted(names) != list(range(len(names))):
        return None
    return [str(names[index]) for index in range(len(names))]


# Classes


def label_names(model: TimmModel) -> list[str] | None:
    """Class names of a timm model's head, by label; None if they are unknown or their number does not fit."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if not isinstance(names, list | tuple) or len(names) != model.num_classes:
        return None
    return [str(name) for name in names]


def match_classes(source: Source, names: Sequence[str] | None) -> str | None:
    """Give the images of `source` the labels that `names` has for their classes.

    The labels stay unchanged if the names of the model or of the data are unknown, if a class map defines the labels,
    or if the model and the data do not have the same set of names.

    Args:
        source: from `open_source`; its labels and `classes` change.
        names: class names by label, such as those of a model (`label_names`).

    Returns:
        If both sets of names are known and differ, a description of the first label where they do; otherwise None.
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


def match_model(source: Source, model: TimmModel) -> None:
    """`match_classes` with the class names of `model`; a warning shows the first difference."""
    difference = match_classes(source, label_names(model))
    if difference is not None:
        warnings.warn(
            f"{source.name} has other classes than the model, labels are taken as they are: {difference}",
            stacklevel=3,
        )


def agree(source: Source, model: TimmModel, like: Source | None = None) -> None:
    """Give the images of `source` the labels that the model, or `like` (another split), has for their classes.

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


def name_classes(model: TimmModel, images: Source, trained: bool) -> None:
    """Give the model the names of the classes of its images, for the files that it is saved to.

    The model keeps the names it has, unless they do not fit its head or it is about to be trained. A class map can
    give labels other names, or names for only some of them; the trained model then gets no names.
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

    Nothing is compared for a headless model (0 classes), with a class map, or if the classes are unknown. In these
    cases too, every label is checked when its image is read.

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
    """Check that two splits of a data set have the same classes, as far as they are known.

    Raises:
        ValueError: they differ.
    """
    if not training.classes or not other.classes or other.mapped or training.classes == other.classes:
        return
    names = sorted(set(training.classes) ^ set(other.classes))
    if not names:
        raise ValueError(f"{training.name} and {other.name} have the same classes in another order")
    raise ValueError(
        f"{training.name} and {other.name} have different classes, so their labels differ: only in one is {names[0]}"
        + (f" (and {len(names) - 1} others)" if len(names) > 1 else "")
    )
