"""What is in a folder: its images in timm's order, and what is left out of them and why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from timm.utils.misc import natural_key

from skd.data.modes import extensions

_SHOWN = 3
_OF_THE_SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # folders with copies or previews, not with images


class LeftOut:
    """Files and folders that are not read: how many for which reason, and the names of the first few."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str) -> None:
        count, names = self._found.get(reason, (0, []))
        self._found[reason] = (count + 1, names if count >= _SHOWN else [*names, name])

    def __bool__(self) -> bool:
        return bool(self._found)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """JSON values by reason."""
        found = sorted(self._found.items())
        return {reason: {"count": count, "such_as": list(names)} for reason, (count, names) in found}

    def __str__(self) -> str:
        """On one line: 2 no image by its name (.txt): a/x.txt, a/y.txt; ..."""
        parts = []
        for reason, (count, names) in sorted(self._found.items()):
            parts.append(f"{count} {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}")
        return "; ".join(parts)


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
    """All images below a folder, in timm's order; what else is there goes to `left_out`."""
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


def shown(names: Iterable[str], most: int = _SHOWN) -> str:
    """The first few of several names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
