"""What several commands share: data and model arguments, settings as options, tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from skd.data import (
    Loader,
    Source,
    calibration_loader,
    data_config,
    eval_loader,
    open_source,
)
from skd.data.source import agree, name_classes, shown
from skd.devices import usable_device
from skd.files import load
from skd.ranks import everyone, rank_of, size_of, together
from skd.supernet import SuperNet
from skd.training.screen import Screen

# Data


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


def device(arguments: argparse.Namespace) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device is None else arguments.device
    return usable_device(name, "--device", torch.float64)  # statistics are float64


def supernet(path: str, where: torch.device) -> SuperNet:
    """The super-network in a file."""
    found = load(path, device=where)
    if not isinstance(found, SuperNet):
        raise ValueError(f"--supernet is {path!r}, a plain model; it must be what skd convert, plan or train wrote")
    return found


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
