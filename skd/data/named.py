"""Data sets by timm's names with a prefix: Hugging Face, web data sets, TensorFlow data sets, torchvision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import create_dataset

from skd.data.folders import TRAIN, ClassMap, existing_folder, open_image_folder
from skd.data.readers import PairSource, ReaderSource, Source, StreamSource, names_of, opened
from skd.data.streams import STREAMS, open_stream

# What a prefix needs: the module to import, and what pip calls it.
PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets tensorflow"),
    "torch": ("torchvision", "torchvision"),
}


class Request(NamedTuple):
    """The arguments of `open_source` that concern named data sets."""

    data: str
    split: str
    mode: str
    data_dir: str | os.PathLike[str] | None
    class_map: ClassMap | None
    require_split: bool
    download: bool
    training: bool | None
    num_samples: int | None
    options: dict[str, Any]
    reading: dict[str, Any]  # of `Source`


def open_named(request: Request) -> Source:
    """Arguments and errors as in `open_source`."""
    prefix, _, rest = request.data.partition("/")
    prefix = prefix.lower()
    module, package = PACKAGES[prefix]
    if find_spec(module) is None:
        raise ValueError(f"data is {request.data!r}; it needs a package that is not installed: pip install {package}")
    training = request.split in TRAIN if request.training is None else request.training
    if prefix == "torch" and rest.lower() in ("image_folder", "folder"):
        return _torch_folder(request)
    arguments = _arguments(request, prefix, rest, training)
    try:
        with _offline(prefix, allowed=request.download or Path(rest).exists()):
            if prefix in STREAMS:
                dataset = open_stream(prefix, rest, request.reading["labelled"], **arguments)
            else:
                dataset = create_dataset(request.data, **arguments)
    except Exception as error:  # each of four libraries has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        fetchable = prefix != "wds" and not request.download
        hint = " (--download or download=True fetches what is not there)" if fetchable else ""
        raise ValueError(
            f"data is {request.data!r}, split {request.split!r}; it cannot be opened{hint}: {reason}"
        ) from error
    if prefix == "torch":
        classes = _names(getattr(dataset, "classes", None))
        if hasattr(dataset, "loader"):  # of files; torchvision's own makes 8-bit RGB of them
            dataset.loader = _loaded
        root = Path(arguments["root"])
        return PairSource(dataset, request.data, request.mode, classes=classes, root=root, **request.reading)
    classes, mapped = names_of(dataset.reader.class_to_idx), request.class_map is not None
    if prefix in STREAMS:
        return StreamSource(
            dataset,
            request.data,
            request.mode,
            training=training,
            classes=classes,
            mapped=mapped,
            **request.reading,
        )
    _check_columns(dataset.reader, request)
    return ReaderSource(dataset.reader, request.data, request.mode, classes=classes, mapped=mapped, **request.reading)


def _check_torch(request: Request) -> None:
    keys = [name for name in ("input_key", "target_key") if name in request.options]
    if keys:
        raise ValueError(f"{keys[0]} is given, but {request.data!r} has no columns")
    if request.data_dir is None:
        raise ValueError(f"data is {request.data!r}; data_dir must say which folder torchvision keeps it in")
    if request.class_map is not None:
        raise ValueError(f"class_map is given, but {request.data!r} cannot take one")


def _torch_folder(request: Request) -> Source:
    """torchvision's ImageFolder: its classes and their order, but all images that Pillow reads, and none unsaid."""
    _check_torch(request)
    if request.options:
        raise ValueError(f"{', '.join(request.options)} is given, but data {request.data!r} takes no options")
    assert request.data_dir is not None
    folder = existing_folder(request.data_dir)
    return open_image_folder(folder, request.split, request.mode, request.require_split, **request.reading)


def _check_columns(reader: Any, request: Request) -> None:
    """timm's reader notices a wrong name only when it reads, and adds an image column of that name, empty."""
    table = reader.dataset.data
    present = [name for name in table.column_names if table.column(name).null_count < max(1, len(reader))]
    keys = (("input_key", "image"), ("target_key", "label"))
    for option, default in keys if request.reading["labelled"] else keys[:1]:
        names = [name.split("/")[0].strip() for name in (request.options.get(option) or default).split(",")]
        missing = [name for name in names if name not in present]
        if missing:
            raise ValueError(
                f"{option} is {', '.join(names)!r}; {request.data} has the columns {', '.join(present) or 'none'}"
            )


def _arguments(request: Request, prefix: str, rest: str, training: bool) -> dict[str, Any]:
    """Of `timm.data.create_dataset`."""
    root = None if request.data_dir is None else os.fspath(request.data_dir)
    arguments = {"root": root, "split": request.split, "download": request.download, **request.options}
    if prefix == "hfds" and not request.reading["labelled"]:
        arguments["target_key"] = request.options.get("input_key") or "image"  # timm's reader wants a column
    if prefix == "torch":
        _check_torch(request)
        return arguments
    class_map = request.class_map
    arguments["class_map"] = os.fspath(class_map) if isinstance(class_map, os.PathLike) else class_map
    if prefix == "wds":
        place = rest if root is None else root
        if "://" not in place and not Path(place).is_dir():
            raise ValueError(f"data is {request.data!r}; there is no folder {place!r}")
        arguments["root"] = place
    if prefix in STREAMS:
        # No mode: what timm converts to one, it cuts off at 8 bits.
        arguments |= {"is_training": training, "num_samples": request.num_samples, "input_img_mode": ""}
    return arguments


@contextmanager
def _offline(prefix: str, allowed: bool) -> Iterator[None]:
    """Inside the block Hugging Face's libraries take what is in their cache, unless the network is `allowed`.

    A stream is exempt: reading over the network is what it is for.
    """
    if prefix != "hfds" or allowed:
        yield
        return
    # Both read the environment once, when they are imported.
    places: list[Any] = [import_module(name) for name in ("datasets.config", "huggingface_hub.constants")]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _loaded(file: str) -> Image.Image:
    with open(file, "rb") as content:
        return opened(content)


def _names(classes: Any) -> list[str] | None:
    return None if classes is None else [str(name) for name in classes]
