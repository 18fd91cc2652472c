"""What several commands share: data and model arguments, settings as options, tables."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from skd import recipes
from skd.convert import LABELS
from skd.data import (
    Loader,
    Source,
    calibration_loader,
    data_config,
    eval_loader,
    open_source,
)
from skd.data.classes import agree, name_classes
from skd.data.scanning import shown
from skd.devices import usable_device
from skd.files import load
from skd.ranks import everyone, rank_of, size_of, together
from skd.supernet import SuperNet
from skd.training.config import BAD_IMAGES, TrainConfig
from skd.training.screen import Screen

# Files


def options(arguments: argparse.Namespace, *names: str) -> dict[str, str | None]:
    """Paths for `skd.outputs.Files`, by the options they were given as: class_map is --class-map."""
    return {"--" + name.replace("_", "-"): getattr(arguments, name) for name in names}


def data_read(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What of the data is in files, for `skd.outputs.Files`: also the folder in a name such as wds/FOLDER."""
    reads = options(arguments, "class_map", "data", "data_dir")
    if reads["--data"] is not None:
        reads["--data"] = re.sub(r"^(hfds|hfids|wds)/", "", reads["--data"], flags=re.IGNORECASE)
    return reads


# Data


def add_data(parser: argparse.ArgumentParser, *, required: bool = True, loading: bool = True) -> None:
    """--data and how to read it; `loading` adds what a TrainConfig would otherwise say."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        help="'digits' (built in), a folder (of class folders with images in any format that Pillow reads, or of "
        "MNIST-style idx files), or a name of timm's: hfds/..., wds/..., torch/...",
    )
    group.add_argument("--data-dir", metavar="DIR", help="root folder of a timm data set")
    group.add_argument(
        "--train-split",
        default="train",
        help="name of the training split; a folder's is found by other names too, such as Train or seg_train "
        "(default: %(default)s)",
    )
    group.add_argument("--val-split", default="validation", help="of the validation split (default: %(default)s)")
    group.add_argument("--class-map", metavar="FILE", help="timm's class map: names of classes to labels")
    group.add_argument("--input-key", metavar="NAME", help="column of the images in a Hugging Face data set (image)")
    group.add_argument("--target-key", metavar="NAME", help="column of the labels (label)")
    group.add_argument(
        "--exif-orientation",
        action="store_true",
        help="turn pictures as their EXIF block says; timm does not, and by default such images are only counted",
    )
    group.add_argument("--download", action="store_true", help="let timm download a torch/ data set")
    if loading:
        parser.set_defaults(saves_memory="a smaller --batch-size, or --device cpu")
        group.add_argument(
            "--batch-size", type=int, default=128, help="images in a batch; no result depends on it (%(default)s)"
        )
        group.add_argument("--workers", type=int, default=4, help="processes that load images (default: %(default)s)")
        group.add_argument(
            "--bad-images",
            choices=BAD_IMAGES,
            default="skip",
            help="an image that cannot be read: skip and count, or fail",
        )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration-images", type=int, default=1024, help="un-augmented training images to use (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="that chooses them (default: %(default)s)")
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="given",
        help="or the model's own predictions: the images may then be of any classes, or without labels in one folder",
    )


def source(arguments: argparse.Namespace, model: Any, split: str, **options: Any) -> Source:
    """One split of --data, its classes in agreement with the model's.

    Where the model has other names, a warning has the first that differs, and labels stay what they are. A model that
    has no names of its classes takes those of the images it is trained (or calibrated) on.
    """
    opened = open_split(arguments, model, split, **options)
    agree(opened, model)
    if opened.labelled and options.get("training"):
        name_classes(model, opened, trained=arguments.command in ("train", "finetune"))
    return opened


def open_split(arguments: argparse.Namespace, model: Any, split: str, **options: Any) -> Source:
    """One split of --data, with the labels that it has itself."""
    options |= {
        "in_chans": model.in_chans,
        "data_dir": arguments.data_dir,
        "class_map": arguments.class_map,
        "download": arguments.download,
        "labelled": _reads_labels(arguments),
        "exif_orientation": arguments.exif_orientation,
    }
    keys = {name: getattr(arguments, name) for name in ("input_key", "target_key")}
    options |= {name: key for name, key in keys.items() if key is not None}
    if arguments.download:  # one process of a node writes the files, the others find them
        with together(arguments.group):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                open_source(arguments.data, split, **options)
    return open_source(arguments.data, split, **options)


def _reads_labels(arguments: argparse.Namespace) -> bool:
    """All commands do but convert and plan with ``--labels predicted``: then images may be of other classes than the
    model's, or of none."""
    return getattr(arguments, "labels", "given") == "given"


def calibration(arguments: argparse.Namespace, model: Any) -> Loader:
    """The un-augmented training images of convert and plan."""
    if arguments.calibration_images < 1:
        raise ValueError(f"--calibration-images is {arguments.calibration_images}; it must be at least 1")
    config = data_config(model)
    if not _reads_labels(arguments):
        config["num_classes"] = 0
    return calibration_loader(
        source(arguments, model, arguments.train_split, training=True),
        config,
        images=arguments.calibration_images,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        workers=workers(arguments.workers),
        bad_images=arguments.bad_images,
        **shard(arguments),
        **placed(model),
    )


def validation(arguments: argparse.Namespace, model: Any) -> Loader:
    """The validation images of evaluate."""
    return eval_loader(
        source(arguments, model, arguments.val_split),
        data_config(model),
        batch_size=arguments.batch_size,
        workers=workers(arguments.workers),
        bad_images=arguments.bad_images,
        **shard(arguments),
        **placed(model),
    )


def shard(arguments: argparse.Namespace) -> dict[str, Any]:
    """This process's share of every batch, for the loaders."""
    return {"rank": rank_of(arguments.group), "world": size_of(arguments.group)}


def images_read(arguments: argparse.Namespace, **loaders: Loader | None) -> dict[str, Any]:
    """Prints what was read of each data set and what was not, of all ranks; the same for --json."""
    used = {name: loader for name, loader in loaders.items() if loader is not None}
    mine = {name: (loader.read, loader.reasons, loader.turned) for name, loader in used.items()}
    all_ranks = everyone(mine, arguments.group)
    documents: dict[str, dict[str, Any]] = {}
    for name, loader in used.items():
        parts = [ranks[name] for ranks in all_ranks]
        if not any(read or reasons for read, reasons, _ in parts):
            continue  # a finished run that is resumed reads nothing
        reasons = dict(sorted((file, reason) for _, found, _ in parts for file, reason in found.items()))
        documents[name] = {
            "data": loader.name,
            "images": len(loader.source),
            "read": sum(read for read, _, _ in parts),
            "skipped": reasons,
            "not_upright": len(set().union(*(turned for _, _, turned in parts))),
            "left_out": loader.source.left_out.to_dict(),
        }
        print(_read_of(name, documents[name], str(loader.source.left_out)))
    skipped = sorted({file for document in documents.values() for file in document["skipped"]})
    return {"images": documents, "skipped_images": skipped}


def _read_of(name: str, document: dict[str, Any], left_out: str) -> str:
    """One line: validation: 29 of 30 images read; skipped: 1 (...); left out: 2 hidden: ..."""
    of = f" of {document['images']:,}" if document["images"] else ""
    line = f"{name}: {document['read']:,}{of} images read"
    if document["skipped"]:
        named = [f"{file} ({reason})" for file, reason in document["skipped"].items()]
        line += f"; skipped: {len(named)}, {shown(named)}"
    if document["not_upright"]:
        line += f"; not turned as EXIF says: {document['not_upright']:,}"
    return line + (f"; left out: {left_out}" if left_out else "")


def placed(model: Any) -> dict[str, Any]:
    """Where a loader leaves its images: on the model's device, by page-locked memory to a GPU."""
    device = next(model.parameters()).device
    return {"device": device, "pin_memory": device.type == "cuda"}


def workers(wanted: int) -> int:
    """No more processes than cores: PyTorch warns of them, and no result depends on it."""
    return min(wanted, os.cpu_count() or 1)


# Models


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")


def device(arguments: argparse.Namespace) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device is None else arguments.device
    return usable_device(name, "--device", torch.float64)  # statistics are float64


def supernet(path: str, where: torch.device) -> SuperNet:
    """The super-network in a file."""
    found = load(path, device=where)
    if not isinstance(found, SuperNet):
        raise ValueError(f"--supernet is {path!r}, a plain model; it must be what skd convert, plan or train wrote")
    return found


# Settings


def add_settings(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    """--config and one option per field of TrainConfig."""
    parser.set_defaults(saves_memory="--grad-accum-steps, --grad-checkpointing")
    group = parser.add_argument_group("settings", "each is a field of skd.TrainConfig")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="JSON or YAML file of settings, or the name of a recipe that comes with skd "
        f"({', '.join(recipes.names())}); options take precedence",
    )
    for setting in fields(TrainConfig):
        flag = "--" + setting.name.replace("_", "-")
        default = getattr(defaults, setting.name)
        shown = " ".join(f"{value:.3g}" for value in default) if isinstance(default, tuple) else default
        text = f"{setting.metadata['help']} (default: {shown})".replace("%", "%%")
        group.add_argument(flag, dest=setting.name, default=argparse.SUPPRESS, help=text, **_kind(setting))


def _kind(setting: Field[Any]) -> dict[str, Any]:
    """argparse's arguments for a field, by its annotation."""
    annotation = str(setting.type)
    if annotation == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if annotation.startswith("tuple"):
        return {"type": float, "nargs": "+", "metavar": "X"}
    base: Callable[[str], Any] = {"int": int, "float": float, "str": str}[annotation.split(" ")[0]]
    metavar = {"int": "N", "float": "X", "str": "NAME"}[annotation.split(" ")[0]]
    return {"type": partial(_or_none, base) if "None" in annotation else base, "metavar": metavar}


def _or_none(base: Callable[[str], Any], text: str) -> Any:
    try:
        return None if text.lower() == "none" else base(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def settings(
    arguments: argparse.Namespace, defaults: TrainConfig, command: str
) -> tuple[TrainConfig, dict[str, Any]]:
    """`defaults`, changed by --config, changed by the options given; and what a recipe says of itself."""
    recipe = recipes.Recipe({}, {}) if arguments.config is None else recipes.read_recipe(arguments.config)
    meant = recipe.about.get("command", command)
    if meant != command:
        raise ValueError(f"--config is {arguments.config!r}, a recipe for skd {meant}, not for skd {command}")
    given = {s.name: getattr(arguments, s.name) for s in fields(TrainConfig) if hasattr(arguments, s.name)}
    return defaults.changed(**(recipe.settings | given)), recipe.about


# Output


def bar(items: Iterable[Any], description: str) -> Iterable[Any]:
    return Screen(None).bar(items, description)


def progress(description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A bar for what takes `progress=`."""
    return lambda items: bar(items, description)


def print_sizes(rows: list[dict[str, Any]], title: str) -> None:
    """A table of sub-networks: rows of `skd.curve`."""
    table = Table(title=title, title_justify="left")
    for heading in ("entry", "MACs (full)", "of full", "MACs (linear)", "parameters"):
        table.add_column(heading, justify="right")
    measured = bool(rows) and "top1" in rows[0]
    if measured:
        table.add_column("top-1 (%)", justify="right")
    for row in rows:
        cells = [str(row["entry"]), count(row["macs"]), f"{row['macs_fraction']:.1%}", count(row["macs_linear"])]
        cells += [f"{row['params']:,}", *([f"{row['top1']:.2f}"] if measured else [])]
        table.add_row(*cells)
    Console().print(table)


def print_expected(about: dict[str, Any]) -> None:
    """The published table of a recipe."""
    headings = list(dict.fromkeys(key for row in about["expected"] for key in row))
    table = Table(*headings)
    for row in about["expected"]:
        table.add_row(*(str(row.get(heading, "")) for heading in headings))
    Console().print(f"\nPublished: {about.get('source', '')}", table, sep="\n")


def count(number: int) -> str:
    """MACs for people: 4.62 G, 35.1 M."""
    unit, name = (1e9, "G") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:.2f} {name}"
