"""Writing results so that nothing half-written stays behind, and finding out early that they cannot be written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What `replacing` calls a file until it is whole.
_TEMPORARY = re.compile(r"\.[\w-]+\.\d+\.(safetensors|jsonl?|md|png)")


def remove_leftovers(*folders: Path) -> None:
    """Delete temporary files that a killed process has left; they can be gigabytes."""
    for folder in folders:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes the place of `path` if the block succeeds."""
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """`document` as indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def output_folder(path: str | os.PathLike[str], name: str = "out") -> Path:
    """`path` as a folder that can be written to, created if it is not there; what it holds is left alone.

    Raises:
        ValueError: it is a file, or cannot be created or written to. `name` is what the message calls it.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} is {str(folder)!r}, a file; it must be a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
    except OSError as error:
        raise ValueError(f"{name} is {str(folder)!r}; it cannot be written to: {error.strerror}") from None
    return folder


def output_file(path: str | os.PathLike[str], name: str = "path") -> Path:
    """`path` as a file that can be written, in a folder that exists.

    Raises:
        ValueError: it is a folder or a device, or its folder is missing or cannot be written to.
    """
    file = Path(os.path.realpath(path))  # what `replacing` writes to
    if file.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, a folder; it must be a file")
    if file.exists() and not file.is_file():  # it would be replaced, as any file that is there
        raise ValueError(f"{name} is {str(path)!r}, a device or a pipe; it must be a file")
    try:
        _probe(file.parent)
    except OSError as error:
        raise ValueError(f"{name} is {str(path)!r}; it cannot be written: {error.strerror}") from None
    return file


def _probe(folder: Path) -> None:
    """Permission bits do not tell (a super-user, a read-only disk): write something."""
    probe = folder / f".probe.{os.getpid()}"
    probe.touch()
    probe.unlink()
