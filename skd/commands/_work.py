"""What several commands do: open images, build models, print tables, write files. This module imports torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from skd.cost import cost
from skd.data import Loader, Loading, Source, data_config, open_source
from skd.data.building import loader_of, usable_workers
from skd.data.source import agree, name_classes, shown
from skd.extract import choose_entry
from skd.files import load, save
from skd.latency import LatencyTable
from skd.recipes import About
from skd.supernet import SuperNet
from skd.support.curve import Rows, entries_within
from skd.support.devices import usable_device
from skd.support.outputs import output_file
from skd.support.ranks import everyone, rank_of, size_of, together
from skd.support.types import Progress
from skd.training.screen import Screen
from skd.vit import MODEL_SOURCES, TimmModel, create_model, describe
from skd.vit.weights import load_weights, new_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Network = TypeVar("_Network", bound=nn.Module)

# Endings of files of weights. A safetensors file must not have one of the first group.
_OTHER_FORMATS = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".npz", ".npy", ".h5", ".onnx", ".json")
_USUAL_SHARES = (0.75, 0.5, 0.25)  # of the MACs, of what is timed
_WEIGHT_FILES = (".safetensors", *_OTHER_FORMATS)

# Data


class Opening(TypedDict, total=False):
    """Arguments of `skd.data.open_source` that the commands choose themselves."""

    training: bool
    require_split: bool


class ImagesRead(TypedDict):
    """What was read of one data set, by all ranks.

    Attributes:
        data: its name.
        images: how many it has; 0: unknown.
        read: how many were read.
        skipped: why each of the images that could not be read was left out, by file.
        not_upright: how many images EXIF says are not upright, and were not turned.
        left_out: what of a folder is not read at all, by reason.
    """

    data: str
    images: int
    read: int
    skipped: dict[str, str]
    not_upright: int
    left_out: dict[str, dict[str, int | list[str]]]


class AllImagesRead(TypedDict):
    """The same of all data sets of a command, by what they are used for; and all files that were skipped."""

    images: dict[str, ImagesRead]
    skipped_images: list[str]


def source(
    arguments: argparse.Namespace,
    model: TimmModel,
    split: str,
    *,
    trained: bool = False,
    **options: Unpack[Opening],
) -> Source:
    """One split of --data, with labels that agree with the model's classes.

    If the model has other class names than the data, the labels stay as they are, and a warning shows the first name
    that differs. A model without class names takes those of the images that it is calibrated on, and a model that is
    about to be `trained` always takes those of its images.
    """
    opened = open_split(arguments, model, split, **options)
    agree(opened, model)
    if opened.labelled and options.get("training"):
        name_classes(model, opened, trained=trained)
    return opened


def open_split(arguments: argparse.Namespace, model: TimmModel, split: str, **options: Unpack[Opening]) -> Source:
    """One split of --data, with its own labels."""
    given: dict[str, Any] = {
        **options,
        "in_chans": model.in_chans,
        "data_dir": arguments.data_dir,
        "class_map": arguments.class_map,
        "download": arguments.download,
        "labelled": _reads_labels(arguments),
        "exif_orientation": arguments.exif_orientation,
    }
    keys = {name: getattr(arguments, name) for name in ("input_key", "target_key")}
    given |= {name: key for name, key in keys.items() if key is not None}
    if arguments.download:  # one process of each node writes the files, and the others then find them
        with together(arguments.group):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                open_source(arguments.data, split, **given)
    return open_source(arguments.data, split, **given)


def _reads_labels(arguments: argparse.Namespace) -> bool:
    """Whether the command reads labels.

    convert and plan do not with ``--labels predicted``, so that the images may have other classes than the model, or
    no labels at all. Every other command does.
    """
    return getattr(arguments, "labels", "given") == "given"


def calibration(arguments: argparse.Namespace, model: TimmModel) -> Loader:
    """The loader of convert and plan: training images without augmentation."""
    if arguments.calibration_images < 1:
        raise ValueError(f"--calibration-images is {arguments.calibration_images}; it must be at least 1")
    images = source(arguments, model, arguments.train_split, training=True)
    loading = replace(
        _loading(arguments, model), seed=arguments.seed, calibration_images=arguments.calibration_images
    )
    return loader_of(images, data_config(model), loading)


def validation(arguments: argparse.Namespace, model: TimmModel) -> Loader:
    """The loader of evaluate: the validation images."""
    images = source(arguments, model, arguments.val_split)
    return loader_of(images, data_config(model), _loading(arguments, model))


def _loading(arguments: argparse.Namespace, model: TimmModel) -> Loading:
    """How the options of `add_data` load images: this process's share of each batch, on the model's device."""
    device = next(model.parameters()).device
    return Loading(
        arguments.batch_size,
        num_classes=model.num_classes if _reads_labels(arguments) else 0,
        bad_images=arguments.bad_images,
        workers=usable_workers(arguments.workers),
        rank=rank_of(arguments.group),
        world=size_of(arguments.group),
        pin_memory=device.type == "cuda",
        device=device,
    )


def images_read(arguments: argparse.Namespace, **loaders: Loader | None) -> AllImagesRead:
    """Print what all ranks have read and skipped of each data set, and return it for --json."""
    used = {name: loader for name, loader in loaders.items() if loader is not None}
    mine = {name: (loader.read, loader.reasons, loader.turned) for name, loader in used.items()}
    all_ranks = everyone(mine, arguments.group)
    documents: dict[str, ImagesRead] = {}
    for name, loader in used.items():
        parts = [ranks[name] for ranks in all_ranks]
        if not any(read or reasons for read, reasons, _ in parts):
            continue  # resuming a finished run reads nothing
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


def _read_of(name: str, document: ImagesRead, left_out: str) -> str:
    """One line, such as "validation: 29 of 30 images read; skipped: 1, ...; left out: 2 hidden: ..."."""
    of = f" of {document['images']:,}" if document["images"] else ""
    line = f"{name}: {document['read']:,}{of} images read"
    if document["skipped"]:
        named = [f"{file} ({reason})" for file, reason in document["skipped"].items()]
        line += f"; skipped: {len(named)}, {shown(named)}"
    if document["not_upright"]:
        line += f"; not turned as EXIF says: {document['not_upright']:,}"
    return line + (f"; left out: {left_out}" if left_out else "")


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


def latency_table(arguments: argparse.Namespace, network: SuperNet | None = None) -> LatencyTable | None:
    """The table in --latency-table, which --latency-ms needs.

    Raises:
        ValueError: it is not given, with --latency-ms; or it is no table, or one of another network than `network`.
    """
    wanted: float | None = getattr(arguments, "latency_ms", None)
    if arguments.latency_table is None:
        if wanted is not None:
            raise ValueError(f"--latency-ms is {wanted}; it needs --latency-table FILE, which skd latency writes")
        return None
    table = LatencyTable.load(arguments.latency_table)
    if network is not None:
        table.check(network)
    return table


def timing(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_timing` that were given, but for --device."""
    given = {name: getattr(arguments, name) for name in ("batch_size", "dtype", "threads", "rounds")}
    return {name: value for name, value in given.items() if value is not None}


def listed_entries(arguments: argparse.Namespace, network: SuperNet) -> list[int]:
    """The entries that --shares or --entries name, by default some usual ones, each once."""
    if arguments.entries is not None:
        for entry in arguments.entries:
            network.widths(entry)  # which refuses what is no entry
        return list(dict.fromkeys(arguments.entries))
    if arguments.shares is not None:
        return list(dict.fromkeys(choose_entry(network, macs=share) for share in arguments.shares))
    return list(dict.fromkeys(entries_within(network, _USUAL_SHARES).values()))


def check_no_weights(arguments: argparse.Namespace) -> None:
    """Check that the options of `add_weights` are not given together with --supernet.

    Raises:
        ValueError: one of them is.
    """
    if arguments.pretrained or arguments.checkpoint or arguments.checkpoint_weights or arguments.model_kwargs:
        raise ValueError("--supernet is given, a file with its own weights; the options of --model are not for it")


def model_file(path: str, option: str = "--out") -> None:
    """Check that `path` can be written and is not named like a file of another format.

    Raises:
        ValueError: it cannot be written, or it has the ending of another format.
    """
    output_file(path, option)
    ending = Path(path).suffix
    if ending.lower() in _OTHER_FORMATS:
        raise ValueError(f"{option} is {path!r}; what is written is a safetensors file: call it .safetensors")


def is_file(name: str) -> bool:
    """Whether --model is a file, or is named like one, rather than a name in timm."""
    if name.partition(":")[0].lower() in MODEL_SOURCES:
        return False
    return (
        Path(name).is_file() or Path(name).suffix.lower() in _WEIGHT_FILES or name.startswith((os.sep, "." + os.sep))
    )


def build_model(arguments: argparse.Namespace) -> TimmModel:
    """Build the model that --model, --model-kwargs, --pretrained or --checkpoint, and --num-classes describe."""
    name = arguments.model
    if name is None:
        if arguments.checkpoint is None:
            raise ValueError("neither --model nor --checkpoint is given")
        return _own_file(arguments, arguments.checkpoint, "--checkpoint without --model")
    if is_file(name):
        missing = "" if Path(name).is_file() else " (which is not there)"
        raise ValueError(
            f"--model is {name!r}, a file{missing}; here it is a name in timm: give skd's file as --checkpoint "
            "alone, other weights as --model NAME --checkpoint FILE"
        )
    return _named(arguments)


def plain_model(arguments: argparse.Namespace, instead: str) -> TimmModel:
    """As `build_model`, but --model may also be a file that skd wrote.

    Args:
        instead: what the error message advises if that file holds a super-network.
    """
    if not is_file(arguments.model):
        return build_model(arguments)
    if arguments.pretrained or arguments.checkpoint:
        raise ValueError(f"--model is {arguments.model!r}, a file; it has its own architecture and weights")
    return _own_file(arguments, arguments.model, "--model", instead)


def warn_if_random(arguments: argparse.Namespace) -> None:
    """Warn if the model has random weights, which is seldom intended."""
    loaded = arguments.pretrained or arguments.checkpoint or arguments.model_kwargs.get("checkpoint_path")
    if not loaded and not is_file(arguments.model) and rank_of(arguments.group) == 0:
        print(
            f"warning: the weights of {arguments.model} are random (no --pretrained, no --checkpoint)",
            file=sys.stderr,
        )


def weights_taken(arguments: argparse.Namespace) -> dict[str, str | None]:
    """For --json: the checkpoint, and under which key its weights were, such as "model_ema".

    The key is None if the file has only one set of weights. The result is empty if no checkpoint was read.
    """
    taken: dict[str, str | None] = getattr(arguments, "taken", {})
    return taken


def with_new_head(network: _Network, arguments: argparse.Namespace) -> _Network:
    """`network`, a plain model or a super-network, with a new head if --num-classes asks for one."""
    classes = _num_classes(arguments)
    model = network.model if isinstance(network, SuperNet) else network
    # If --model-kwargs gives the number of classes that the file's head already has, the head is kept.
    if classes is not None and (getattr(arguments, "num_classes", None) or classes != model.num_classes):
        try:
            new_head(model, classes, _seed(arguments))
        except (RuntimeError, MemoryError) as error:  # of PyTorch's allocator, in many lines
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"--num-classes is {classes}; such a head cannot be made: {reason}") from None
    return network


def _named(arguments: argparse.Namespace) -> TimmModel:
    """A model by its name in timm, with its weights."""
    name, file, kwargs = arguments.model, arguments.checkpoint, dict(arguments.model_kwargs)
    if file is None and not arguments.pretrained:
        file = kwargs.pop("checkpoint_path", None)  # loaded below, since timm does not say which weights it takes
    loads = arguments.pretrained or file is not None or "checkpoint_path" in kwargs
    if not loads and _num_classes(arguments) is not None:
        kwargs["num_classes"] = _num_classes(arguments)
    try:
        model = create_model(name, pretrained=arguments.pretrained, **kwargs)
        if any(tensor.is_meta for tensor in model.parameters()):
            raise ValueError(f"model {name} has no data in its tensors, on the device meta")
    except TypeError as error:  # an argument given twice
        raise ValueError(f"--model-kwargs is {json.dumps(kwargs)}: {error}") from None
    describe(model)
    try:
        cost(model)  # everything but the blocks runs, without data
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--model-kwargs is {json.dumps(kwargs)}; such a model takes no image: {reason}") from None
    if file is not None:
        _load(model, arguments, file)
    if loads:
        with_new_head(model, arguments)
    return model.eval()


def _load(model: TimmModel, arguments: argparse.Namespace, file: str) -> None:
    """Load a file of weights into a timm model, and print which weights were taken if the file has several."""
    option = "--checkpoint" if arguments.checkpoint is not None else "checkpoint_path"
    classes = _num_classes(arguments)
    if not isinstance(file, str) or not Path(file).is_file():
        raise ValueError(f"{option} is {file!r}; there is no such file")
    try:
        key = load_weights(model, file, take=arguments.checkpoint_weights, any_head=classes is not None)
    except ValueError as error:
        hint = "" if classes or "head." not in str(error) else "; --num-classes N makes a new head"
        raise ValueError(f"{option} {file} does not fit {arguments.model}: {error}{hint}") from None
    arguments.taken = {"checkpoint": file, "checkpoint_weights": key or None}
    if key:
        print(f"{file}: the weights are those of {key!r} (see --checkpoint-weights)")


def _own_file(
    arguments: argparse.Namespace, file: str, option: str, instead: str = "it must be a plain model"
) -> TimmModel:
    """Load a plain model from a file that skd wrote."""
    others = sorted(arguments.model_kwargs.keys() - {"num_classes"})
    if others or arguments.checkpoint_weights:
        given = f"--model-kwargs has {others[0]}" if others else "--checkpoint-weights is given"
        raise ValueError(f"{given}, but {file!r} is a file, with its own architecture and weights")
    try:
        model = load(file)
    except ValueError as error:
        other = "; weights of another kind need --model NAME --checkpoint FILE" if Path(file).is_file() else ""
        raise ValueError(f"{option} must be a file of skd's: {error}{other}") from None
    if isinstance(model, SuperNet):
        raise ValueError(f"{option} is {file!r}, a super-network; {instead}")
    return with_new_head(model, arguments)


def _num_classes(arguments: argparse.Namespace) -> int | None:
    """The value of --num-classes. For a file, which has its own architecture, --model-kwargs may give it instead."""
    wanted: int | None = getattr(arguments, "num_classes", None)
    also = arguments.model_kwargs.get("num_classes")
    of_a_file = arguments.model is None or is_file(arguments.model)
    if of_a_file and also is not None and not hasattr(arguments, "num_classes"):
        raise ValueError("--model-kwargs has num_classes, but a file is evaluated with the head that it has")
    if wanted is None:
        wanted = also if of_a_file else None
    elif also is not None and also != wanted:
        raise ValueError(f"--num-classes is {wanted}, but --model-kwargs has num_classes {also}; give one of them")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise ValueError(f"--num-classes is {wanted!r}; it must be a whole number, at least 1")
    return wanted


def _seed(arguments: argparse.Namespace) -> int:
    """The seed of a new head, which must be the same in every process and when a run is resumed."""
    return int(getattr(arguments, "seed", None) or 0)


# Output


def write(network: nn.Module, path: str | os.PathLike[str], group: ProcessGroup | None) -> None:
    """Write a super-network or a plain model to a file. Rank 0 writes it, and the other ranks wait."""
    with together(group):
        if rank_of(group) == 0:
            save(network, path)


def progress(description: str) -> Progress:
    """A progress bar, for functions that take ``progress``."""
    return lambda items: Screen(None).bar(items, description)


def print_sizes(rows: Rows, title: str) -> None:
    """Print a table of sub-networks."""
    table = Table(title=title, title_justify="left")
    for heading in ("entry", "MACs (full)", "of full", "MACs (linear)", "parameters"):
        table.add_column(heading, justify="right")
    measured, predicted = (bool(rows) and key in rows[0] for key in ("top1", "latency_ms"))
    if measured:
        table.add_column("top-1 (%)", justify="right")
    if predicted:
        table.add_column("predicted (ms)", justify="right")
    for row in rows:
        cells = [str(row["entry"]), count(row["macs"]), f"{row['macs_fraction']:.1%}", count(row["macs_linear"])]
        cells += [f"{row['params']:,}", *([f"{row['top1']:.2f}"] if measured else [])]
        cells += [f"{row['latency_ms']:.2f}"] if predicted else []
        table.add_row(*cells)
    Console().print(table)


class CorrectionRow(TypedDict):
    """The correction of one entry, for --json: its size, and how many modules it has output layers for."""

    entry: int
    bytes: int
    modules: int


def corrections(supernet: SuperNet) -> list[CorrectionRow]:
    """The corrections of a super-network (`skd.compensate`), by entry."""
    found = supernet.corrections.items()
    return [{"entry": entry, "bytes": own.nbytes, "modules": len(own.layers)} for entry, own in found]


def print_corrections(rows: list[CorrectionRow], more: str = "") -> None:
    """Print one line on which entries have a correction, and the bytes of each; nothing without any."""
    if rows:
        each = ", ".join(f"{row['entry']} ({row['bytes']:,} bytes)" for row in rows)
        print(f"compensated entries: {each}" + (f"; {more}" if more else ""))


def moments_bytes(supernet: SuperNet) -> int:
    """The bytes of the moments of a super-network (`skd.moments`); 0 without any."""
    return sum(own.nbytes for own in supernet.moments.values())


def print_moments(supernet: SuperNet) -> None:
    """Print one line on the moments; nothing without any."""
    if supernet.moments:
        print(f"moments of the features: {moments_bytes(supernet):,} bytes, for --compensate moments")


def print_expected(about: About) -> None:
    """Print the published results of a recipe."""
    headings = list(dict.fromkeys(key for row in about["expected"] for key in row))
    table = Table(*headings)
    for row in about["expected"]:
        table.add_row(*(str(row.get(heading, "")) for heading in headings))
    Console().print(f"\nPublished: {about.get('source', '')}", table, sep="\n")


def count(number: int) -> str:
    """A number of MACs in short form, such as "4.62 G" or "35.10 M"."""
    unit, name = (1e9, "G") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:.2f} {name}"
