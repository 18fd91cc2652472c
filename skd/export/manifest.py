"""manifest.json: what is in a folder of exported networks, written last and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TypedDict

from skd import __version__
from skd.support.outputs import write_json

NAME = "manifest.json"
VERSION = 1


class Member(TypedDict):
    """One exported network.

    Attributes:
        entry: its index in the dropout list; None for a network that was not cut out of a super-network here.
        share: of the MACs of the full network, within which it was chosen; None if it was chosen otherwise.
        macs, macs_linear: for one image, in the full and in the linear convention.
        macs_fraction: the share of the full network's MACs that it has; None where that is not known.
        compensated: whether a correction (`skd.compensate`) is folded in.
        latency_ms: milliseconds as a table predicts them (`skd.measure_latency`), where one was given, or None.
        top1: in percent, where it was given, or None.
        layout: "timm" (timm's own), "model.py" (a folder that loads itself), "onnx" or "pt2".
        files: the SHA-256 of each of its files, by the path in the folder, with "/" between its parts.
    """

    entry: int | None
    share: float | None
    macs: int
    macs_linear: int
    macs_fraction: float | None
    params: int
    compensated: bool
    latency_ms: float | None
    top1: float | None
    layout: str
    files: dict[str, str]


def write_manifest(folder: Path, members: Sequence[Member]) -> None:
    """Write manifest.json into `folder`, which has the files of all `members`."""
    write_json(folder / NAME, {"version": VERSION, "skd": __version__, "members": list(members)})


def read_manifest(folder: str | os.PathLike[str], *, verify: bool = True) -> list[Member]:
    """The networks in a folder that `skd.export` wrote, the largest first.

    Args:
        folder: with a manifest.json.
        verify: also read every file and compare its SHA-256.

    Raises:
        ValueError: there is no manifest or it is damaged; a path in it is absolute, has "..", or leads out of the
            folder by a link; a file is missing, or not the one that was written.
    """
    folder = Path(folder)
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
        members: list[Member] = document["members"]
        files = [item for member in members for item in member["files"].items()]
        version = document["version"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"folder is {str(folder)!r}; its {NAME} cannot be read: {reason}") from None
    if version != VERSION:
        raise ValueError(f"{NAME} is of version {version!r}; this skd reads version {VERSION}")
    if {key for member in members for key in Member.__annotations__.keys() ^ member.keys()}:
        raise ValueError(f"{NAME} has a member with other fields than {sorted(Member.__annotations__)}")
    for name, digest in files:
        file = inside(folder, name)
        if verify and sha256(file) != digest:
            raise ValueError(f"{name} in {str(folder)!r} is not the file that was exported: its SHA-256 differs")
    return members


def inside(folder: Path, name: object) -> Path:
    """The file `name` of `folder`.

    Raises:
        ValueError: it is not the path of a file below the folder, or there is no such file.
    """
    path = PurePosixPath(str(name))
    plain = isinstance(name, str) and path.parts and not path.is_absolute() and ".." not in path.parts
    if not plain or "\\" in str(name) or ":" in str(name) or "\0" in str(name):
        raise ValueError(f"{NAME} names the file {name!r}; it must be the path of a file below its folder")
    file = folder / path
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{NAME} names the file {name!r}, which is a link out of its folder")
    if not os.path.isfile(file):  # False also where the name is too long
        raise ValueError(f"{NAME} names the file {name!r}, which is not in {str(folder)!r}")
    return file


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
