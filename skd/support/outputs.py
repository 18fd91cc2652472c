"""Writing results so that nothing half-written stays behind, and finding out early that they cannot be written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

# What `replacing` calls a file until it is whole.
_TEMPORARY = re.compile(r"\.[\w-]+\.\d+\.(safetensors|jsonl?|md|png)")

_ENDINGS = (".json", ".safetensors")  # of files that a command writes where its user says
_OF_DATA_SETS = ("_info.json", "info.json", "dataset_info.json", "dataset_infos.json", "features.json", "state.json")


def remove_leftovers(*folders: Path) -> None:
    """Delete temporary files that a killed process has left; they can be gigabytes."""
    for folder in folders:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes the place of `path` if the block succeeds."""
    path = Path(os.path.realpath(path))  # a link is kept, and the file that it leads to is replaced
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path`, which is removed in the end: what is whole is moved out of it before."""
    path = Path(os.path.realpath(path))
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        usual_mode(temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def usual_mode(path: Path) -> None:
    """Give a file or a folder the permissions of any new one: safetensors and tempfile leave them to their owner."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def new_folder(path: str | os.PathLike[str], name: str = "out") -> Path:
    """`path` as a folder that is not there yet, or is empty, in a folder that can be written to.

    Raises:
        ValueError: it is a file or has something in it, or its folder is missing or cannot be written to.
    """
    folder = Path(os.path.realpath(path))
    if os.path.ismount(folder):  # nothing can take its place
        raise ValueError(f"{name} is {str(path)!r}, where a disk is mounted; it must be a folder in it, or elsewhere")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "a folder that is not empty" if folder.is_dir() else "a file"
        raise ValueError(f"{name} is {str(path)!r}, {what}; it must be a new folder, or an empty one")
    _check_writable(folder.parent, path, name)
    return folder


def write_json(path: str | os.PathLike[str], document: object) -> None:
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
    if file.exists() and not file.is_file():  # `replacing` would put a plain file in its place
        raise ValueError(f"{name} is {str(path)!r}, a device or a pipe; it must be a file")
    _check_writable(file.parent, path, name)
    return file


def _check_writable(folder: Path, path: str | os.PathLike[str], name: str) -> None:
    """Raise ValueError about `path`, called `name`, unless a file can be written into `folder`."""
    try:
        _probe(folder)
    except OSError as error:
        raise ValueError(f"{name} is {str(path)!r}; it cannot be written: {error.strerror}") from None


def _probe(folder: Path) -> None:
    """Try to write a file, because permission bits are not reliable (for root, or on a read-only disk)."""
    probe = folder / f".probe.{os.getpid()}"
    probe.touch()
    probe.unlink()


@dataclass(frozen=True)
class Files:
    """What a command reads and writes, by the options that say where. An option that is not given has None.

    Attributes:
        reads: files, and folders of images. A path that does not exist is ignored, since it may be a name in timm.
        writes: files.
        folders: folders that results go to, each with the names of all that may be written there ("sub-*.json").
        in_place: (output, input) that may be the same file.
    """

    reads: Mapping[str, str | None] = field(default_factory=dict)
    writes: Mapping[str, str | None] = field(default_factory=dict)
    folders: Mapping[str, tuple[str | None, Sequence[str]]] = field(default_factory=dict)
    in_place: Collection[tuple[str, str]] = ()


def check_files(files: Files) -> None:
    """Check that no output would replace an input or another output, also where links lead to the same file.

    Raises:
        ValueError: an output would replace such a file, or a path is empty.
    """
    folders = {option: folder for option, (folder, _) in files.folders.items()}
    for option, path in [*files.reads.items(), *files.writes.items(), *folders.items()]:
        if path is not None and (not path or "\0" in path):
            raise ValueError(f"{option} is {path!r}, which names nothing")
    writes = {option: path for option, path in files.writes.items() if path is not None}
    reads = {option: path for option, path in files.reads.items() if path is not None and os.path.isfile(path)}
    for option, path in writes.items():
        for other, given in [*reads.items(), *writes.items()]:
            if option != other and (option, other) not in files.in_place and _same(path, given):
                raise ValueError(f"{option} and {other} are the same file, {given!r}; it would be lost")
        for other, folder in files.reads.items():
            if folder is not None and _may_be_data(path, folder):
                raise ValueError(
                    f"{option} is {path!r}, in the folder of {other}; its files would be lost if results had their "
                    f"names, so there it must end in {' or '.join(_ENDINGS)}"
                )
    for option, path in [*writes.items(), *reads.items()]:
        for other, (folder, names) in files.folders.items():
            if folder is not None and _is_named(path, folder, names):
                raise ValueError(f"{option} is {path!r}, a file of {other}; it would be lost")


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _is_named(path: str, folder: str, names: Sequence[str]) -> bool:
    """Whether `path` is a file of `folder` with one of the `names`, or is what a link with such a name leads to."""
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    if any(fnmatchcase(inside, name) for name in names):
        return True
    there = [found for name in names for found in [Path(folder, name), *Path(folder).glob(name)]]
    return any(_same(path, str(found)) for found in there)


def _may_be_data(path: str, folder: str) -> bool:
    """Whether the file would lie in a folder of data and has a name that a file of the data could have.

    Only the name decides, not whether the file exists, so that a command can be repeated with the same output.
    """
    file, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    ours = file.suffix in _ENDINGS and file.name not in _OF_DATA_SETS
    return root.is_dir() and root in file.parents and not ours
