"""`open_source`: a data set by what a user calls it."""

from __future__ import annotations

import os
from typing import Any

from skd.data.digits import PREPROCESSING, pixels
from skd.data.folders import EVALUATION, TRAIN, ClassMap, existing_folder, open_folder
from skd.data.idx import IdxImages, idx_folder
from skd.data.named import PACKAGES, Request, open_named
from skd.data.readers import ArrayImages, PairSource, Source

MODES = {1: "L", 3: "RGB"}


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
            (A folder that is called like a prefix: "./hfds", or a Path.)
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
        exif_orientation: turn each picture as its EXIF block says. timm does not, nor do we by default.
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
    if data == "digits":
        _refuse(class_map, data)
        return _digits(split, mode, labelled)
    if isinstance(data, str) and data.partition("/")[0].lower() in PACKAGES and "/" in data:
        request = Request(
            data,
            split,
            mode,
            data_dir,
            class_map,
            require_split,
            download,
            training,
            num_samples,
            options,
            {"labelled": labelled, "exif_orientation": exif_orientation},
        )
        return open_named(request)
    if options or num_samples is not None:
        given = ", ".join(options) or "num_samples"
        raise ValueError(f"{given} is given, but data {str(data)!r} takes no options; data sets with a prefix do")
    folder = existing_folder(data)
    idx = idx_folder(folder)
    if idx is None:
        return open_folder(folder, split, mode, class_map, require_split, labelled, exif_orientation=exif_orientation)
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
    """Which of the two parts of a data set that has just these."""
    if split in TRAIN:
        return "train"
    if split in EVALUATION:
        return "validation"
    raise ValueError(f"split is {split!r}; {name} has 'train' and 'validation'")
