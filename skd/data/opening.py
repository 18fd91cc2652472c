"""`open_source`, the one place that opens a data set by what a user calls it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from skd.data.digits import PREPROCESSING, pixels
from skd.data.folders import EVALUATION, TRAIN, existing_folder, open_folder, open_image_folder
from skd.data.indexed import ArrayImages, IdxImages, PairSource, ReaderSource, idx_folder
from skd.data.source import About, ClassMap, Source, names_of, opened
from skd.data.streams import STREAMS

MODES = {1: "L", 3: "RGB"}

# The module that a prefix needs, and its name for pip.
PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets tensorflow"),
    "torch": ("torchvision", "torchvision"),
}


def open_source(
    data: str | os.PathLike[str],
    split: str = "validation",
    *,
    in_chans: int = 3,
    data_dir: str | os.PathLike[str] | None = None,
    class_map: ClassMap | None = None,
    require_split: bool = False,
    download: bool = False,
    training: bool | None = None,
    num_samples: int | None = None,
    labelled: bool = True,
    exif_orientation: bool = False,
    **options: Any,
) -> Source:
    """Open one split of a data set.

    Args:
        data: "digits" (built in), a folder, or a name with one of timm's prefixes: "hfds/NAME" (Hugging Face),
            "hfids/NAME" (the same as a stream), "wds/FOLDER" (web data set), "tfds/NAME", "torch/NAME" (torchvision).
            A folder holds one sub-folder of images per class, in any format that Pillow reads, or the idx files of
            MNIST and its relatives. Hidden files and folders are left out; `Source.left_out` says what else is.
            (A folder whose name is also a prefix is written "./hfds", or given as a Path.)
        split: "train" or "validation", or what the data set itself calls it. In a folder, the sub-folder of that name
            or of a synonym (`TRAIN`, `EVALUATION`) is taken, in any case or among other words (Train, seg_train,
            data/train), or the folder itself if it is not divided.
        in_chans: channels of the model, which decide the mode of the images: 1 grey, 3 RGB.
        data_dir: where data sets with a prefix are kept (timm's root): the cache of Hugging Face, the folder of the
            shards, ...
        class_map: from class names to labels, a dict or a text file with one name per line.
        require_split: a folder that is not divided is an error: training would be evaluated on its own images.
        download: fetch what is not there. Streams of remote data are read over the network anyhow.
        training: of a stream: shuffled, in whole batches; None: if split is one of `TRAIN`.
        num_samples: of a stream: how many images it has, where it does not say.
        labelled: False where labels are not needed: then images may lie anywhere in a folder, a data set need not
            have a column of labels, and the loaders give None for them.
        exif_orientation: turn each picture as its EXIF block says. timm does not, nor does skd by default.
        options: for timm's reader of a data set with a prefix, such as input_key and target_key (columns of images
            and labels).

    Raises:
        ValueError: one line that says what is wrong: an unknown name, a missing or empty folder, one without class
            sub-folders, one that is divided in a way that is not understood (a class name lies under several
            folders), a missing package, data that is not there and may not be downloaded.
    """
    if in_chans not in MODES:
        raise ValueError(f"in_chans is {in_chans}; images can be read with 1 (grey) or 3 (RGB)")
    mode = MODES[in_chans]
    prefixed = isinstance(data, str) and data.partition("/")[0].lower() in PACKAGES and "/" in data
    if not prefixed and (options or num_samples is not None):
        given = ", ".join(options) or "num_samples"
        raise ValueError(f"{given} is given, but data {str(data)!r} takes no options; data sets with a prefix do")
    if data == "digits":
        _refuse(class_map, data)
        return _digits(split, mode, labelled)
    if isinstance(data, str) and prefixed:
        request = _Request(
            data=data,
            split=split,
            mode=mode,
            data_dir=data_dir,
            class_map=class_map,
            require_split=require_split,
            download=download,
            training=split in TRAIN if training is None else training,
            num_samples=num_samples,
            options=options,
            labelled=labelled,
            exif_orientation=exif_orientation,
        )
        return _named(request)
    folder = existing_folder(data)
    idx = idx_folder(folder)
    if idx is None:
        return open_folder(folder, split, mode, class_map, require_split, labelled, exif_orientation)
    _refuse(class_map, folder)
    images = IdxImages(idx, _part(split, str(folder)))
    return PairSource(images, str(folder), mode, classes=images.classes, labelled=labelled)


def _refuse(class_map: ClassMap | None, data: str | os.PathLike[str]) -> None:
    if class_map is not None:
        raise ValueError(f"class_map is given, but the labels of data {str(data)!r} have no names to map")


def _digits(split: str, mode: str, labelled: bool) -> Source:
    train, test = pixels()
    part = _part(split, "digits")
    images = ArrayImages(*(train if part == "train" else test))
    classes = list(PREPROCESSING["label_names"])
    return PairSource(images, f"digits ({part})", mode, classes=classes, labelled=labelled)


def _part(split: str, name: str) -> str:
    """The part of a data set that has exactly two, for training and for validation."""
    if split in TRAIN:
        return "train"
    if split in EVALUATION:
        return "validation"
    raise ValueError(f"split is {split!r}; {name} has 'train' and 'validation'")


# Names with a prefix


@dataclass(frozen=True)
class _Request:
    """The arguments of `open_source` that concern named data sets."""

    data: str
    split: str
    mode: str
    data_dir: str | os.PathLike[str] | None
    class_map: ClassMap | None
    require_split: bool
    download: bool
    training: bool
    num_samples: int | None
    options: dict[str, Any]
    labelled: bool
    exif_orientation: bool

    @property
    def reading(self) -> About:
        """The arguments that `Source` takes too."""
        return {"labelled": self.labelled, "exif_orientation": self.exif_orientation}


def _named(request: _Request) -> Source:
    """Open a data set by a name with a prefix; errors are those of `open_source`."""
    prefix, _, rest = request.data.partition("/")
    prefix = prefix.lower()
    module, package = PACKAGES[prefix]
    if find_spec(module) is None:
        raise ValueError(f"data is {request.data!r}; it needs a package that is not installed: pip install {package}")
    if prefix == "torch" and rest.lower() in ("image_folder", "folder"):
        return _torch_folder(request)
    arguments = _arguments(request, prefix, rest)
    try:
        with _offline(prefix, allowed=request.download or Path(rest).exists()):
            if prefix in STREAMS:
                reader: Any = STREAMS[prefix].reader_of(rest, request.labelled, arguments)
            else:
                dataset = create_dataset(request.data, **arguments)
                reader = getattr(dataset, "reader", None)  # torchvision's data sets have none
    except Exception as error:  # each of the four libraries has its own kinds of errors
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
        pairs: About = {"classes": classes, "root": Path(arguments["root"]), **request.reading}
        return PairSource(dataset, request.data, request.mode, **pairs)
    described: About = {
        "classes": names_of(reader.class_to_idx),
        "mapped": request.class_map is not None,
        **request.reading,
    }
    if prefix in STREAMS:
        return STREAMS[prefix](reader, request.data, request.mode, training=request.training, **described)
    _check_columns(reader, request)
    return ReaderSource(reader, request.data, request.mode, **described)


def _check_torch(request: _Request) -> None:
    keys = [name for name in ("input_key", "target_key") if name in request.options]
    if keys:
        raise ValueError(f"{keys[0]} is given, but {request.data!r} has no columns")
    if request.data_dir is None:
        raise ValueError(f"data is {request.data!r}; data_dir must say which folder torchvision keeps it in")
    if request.class_map is not None:
        raise ValueError(f"class_map is given, but {request.data!r} cannot take one")


def _torch_folder(request: _Request) -> Source:
    """A folder with the classes and the order of torchvision's ImageFolder.

    Unlike torchvision, it takes every image that Pillow reads, and reports what it leaves out.
    """
    _check_torch(request)
    if request.options:
        raise ValueError(f"{', '.join(request.options)} is given, but data {request.data!r} takes no options")
    assert request.data_dir is not None
    folder = existing_folder(request.data_dir)
    return open_image_folder(
        folder, request.split, request.mode, request.require_split, request.labelled, request.exif_orientation
    )


def _check_columns(reader: Any, request: _Request) -> None:
    """Refuse names of columns that the data set does not have.

    timm's reader notices a wrong name only when it reads; for images it even adds an empty column of that name.
    """
    table = reader.dataset.data
    present = [name for name in table.column_names if table.column(name).null_count < max(1, len(reader))]
    keys = (("input_key", "image"), ("target_key", "label"))
    for option, default in keys if request.labelled else keys[:1]:
        names = [name.split("/")[0].strip() for name in (request.options.get(option) or default).split(",")]
        missing = [name for name in names if name not in present]
        if missing:
            raise ValueError(
                f"{option} is {', '.join(names)!r}; {request.data} has the columns {', '.join(present) or 'none'}"
            )


def _arguments(request: _Request, prefix: str, rest: str) -> dict[str, Any]:
    """The arguments for `timm.data.create_dataset`, or for the reader of a stream."""
    root = None if request.data_dir is None else os.fspath(request.data_dir)
    arguments = {"root": root, "split": request.split, "download": request.download, **request.options}
    if prefix == "hfds" and not request.labelled:
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
        # No mode is asked for, because timm's conversion to one clips images at 8 bits.
        arguments |= {"is_training": request.training, "num_samples": request.num_samples, "input_img_mode": ""}
        return {name: value for name, value in arguments.items() if value is not None}
    return arguments


@contextmanager
def _offline(prefix: str, allowed: bool) -> Iterator[None]:
    """Inside the block Hugging Face's libraries read only their cache, unless the network is `allowed`.

    Streams are exempt, because they always read over the network.
    """
    if prefix != "hfds" or allowed:
        yield
        return
    # Both libraries read their environment variables once, at import, so the flag is set in the modules themselves.
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


def _names(classes: Iterable[object] | None) -> list[str] | None:
    return None if classes is None else [str(name) for name in classes]
