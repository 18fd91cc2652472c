"""``skd train``: a training run of a super-network. ``skd finetune`` uses the second half of this file too."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files, output_folder, write_json
from skd.support.settings import RESUME, TrainConfig
from skd.support.types import Document

if TYPE_CHECKING:
    import torch

    from skd.commands._work import ImagesRead
    from skd.data import Loaders
    from skd.recipes import About
    from skd.vit import TimmModel

PRODUCT = "supernet.safetensors"
CONVERTED = "converted.safetensors"  # the super-network that --model is converted to, in --out
CONVERTED_FROM = "converted.json"  # the options that said which model
# What train and finetune both write to --out besides their networks.
RECORDS = ("history.jsonl", "run.json", "report.md", "report/*", "checkpoints/*", "tensorboard/*")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--supernet", metavar="FILE", help="what skd convert wrote")
    options.add_model(
        parser,
        "in place of --supernet: a model of timm, converted first (default: the one that a recipe given as --config "
        "names, with timm's weights unless --checkpoint has others)",
        required=False,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build all, run a few steps on synthetic images, report"
    )
    add_run(parser, TrainConfig())


def files(given: argparse.Namespace) -> Files:
    products = [PRODUCT, "dropout_list.json", *RECORDS]
    if given.supernet is None:  # with --supernet, the file of that name in --out may belong to an earlier run
        products += [CONVERTED, CONVERTED_FROM]
    return Files(
        reads=options.model_read(given) | options.options(given, "supernet", "config") | options.data_read(given),
        folders={"--out": (None if given.dry_run else given.out, products)},
    )


def run(given: argparse.Namespace) -> Document:
    config, about = options.settings(given, TrainConfig())
    if given.supernet is None and given.model is None and "model" in about:
        given.model = about["model"]
        given.pretrained = given.checkpoint is None
    if given.dry_run:
        if given.group is not None:
            raise ValueError("--dry-run measures one process; run it without torchrun")
        return _dry_run(given, config, about)
    check_given(given, config)
    supernet, conversion = _supernet(given, config)
    batches = loaders(given, supernet.model, config)
    history = skd.train(
        supernet,
        batches.train,
        batches.validation,
        config,
        calibration=batches.calibration,
        out=given.out,
        resume=given.resume,
        group=given.group,
    )
    return finish(given, history, supernet, config, batches, PRODUCT, conversion)


def _supernet(given: argparse.Namespace, config: TrainConfig) -> tuple[skd.SuperNet, dict[str, ImagesRead]]:
    """The super-network of --supernet, or the one that --model is converted to; and what was read to convert it.

    The conversion uses the images on which importance is measured, and is kept in --out.
    """
    from skd.commands import _work as work
    from skd.data.building import calibration
    from skd.support.ranks import check_same, rank_of, spread, together

    where = work.device(given)
    if given.supernet is not None:
        if given.model is not None:
            raise ValueError("--supernet and --model are both given; it may be only one of them")
        return _given_supernet(given, where), {}
    if given.model is None:
        raise ValueError("--supernet is not given (nor --model, nor as --config a recipe that names a model)")
    file = output_folder(given.out) / CONVERTED
    check_same(file.exists(), f"the presence of {CONVERTED} in --out", given.group)
    if file.exists() and given.resume is None:
        raise ValueError(f"{file} is there already; resume its run (--resume auto), or choose another folder")
    if file.exists():
        _check_same_model(given, file)
        return work.supernet(str(file), where), {}
    model = work.build_model(given).to(where)
    work.warn_if_random(given)
    spread(model, given.group)  # random weights differ from process to process
    images = work.source(given, model, given.train_split, trained=True, training=True, require_split=True)
    batches = calibration(images, model, config, given.group)
    supernet = skd.convert(model, batches, progress=work.progress("Converting"), group=given.group)
    conversion = work.images_read(given, conversion=batches)["images"]
    work.write(supernet, file, given.group)
    with together(given.group):
        if rank_of(given.group) == 0:
            write_json(file.with_name(CONVERTED_FROM), _named_model(given))
    return supernet, conversion


def _named_model(given: argparse.Namespace) -> Document:
    """The options that say which model is converted."""
    names = ("model", "model_kwargs", "pretrained", "num_classes")
    checkpoint = None if given.checkpoint is None else os.path.realpath(given.checkpoint)
    return {"checkpoint": checkpoint, **{name: getattr(given, name) for name in names}}


def _check_same_model(given: argparse.Namespace, file: Path) -> None:
    """Check that `file` was converted from the model of these options, as far as it is known.

    Raises:
        ValueError: from another one.
    """
    known = file.with_name(CONVERTED_FROM)
    if not known.exists():  # of an earlier version, or the run was stopped while it wrote them
        return
    before = json.loads(known.read_text(encoding="utf-8"))
    for name, now in _named_model(given).items():
        if before.get(name) != now:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"resume: {option} is {now!r}, but {file} was made with {before.get(name)!r}; choose another folder"
            )


def _given_supernet(given: argparse.Namespace, where: torch.device) -> skd.SuperNet:
    """The super-network of --supernet, with a new head if --num-classes asks for one."""
    from skd.commands import _work as work

    work.check_no_weights(given)
    supernet: skd.SuperNet = work.with_new_head(work.supernet(given.supernet, where), given)
    return supernet


def _dry_run(given: argparse.Namespace, config: TrainConfig, about: About) -> Document:
    from skd.commands import _work as work
    from skd.training.dry_run import dry_run

    if (given.supernet is None) == (given.model is None):
        raise ValueError("--dry-run needs exactly one of --supernet and --model (or a recipe that names a model)")
    where = work.device(given)
    if given.supernet is not None:
        supernet = _given_supernet(given, where)
    else:
        given.pretrained = False  # the weights make no difference to time and memory
        supernet = skd.SuperNet(work.build_model(given).to(where), copy=False)
    images, left_out = None, {}
    if given.data is not None:
        training = work.source(given, supernet.model, given.train_split, trained=True, training=True)
        images, left_out = len(training), training.left_out.to_dict()
        if left_out:
            print(f"{training.name}: left out: {training.left_out}")
    document: Document = {**dry_run(supernet, config, images), "left_out": left_out}
    if "expected" in about:
        work.print_expected(about)
        document["expected"] = about["expected"]
    return document


# What skd finetune uses too


def add_run(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    """Add the arguments of a run, except those that name its network."""
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--resume", choices=[name for name in RESUME if name], help="go on where a run in --out stopped"
    )
    options.add_data(parser, required=False, loading=False)
    options.add_num_classes(parser)
    options.add_device(parser)
    options.add_settings(parser, defaults)


def check_given(given: argparse.Namespace, config: TrainConfig) -> None:
    """Check that --data and --out are given, which only --dry-run does without, and that --log can be served.

    Raises:
        ValueError: --data or --out is not given.
        ImportError: what --log needs is not installed.
    """
    from skd.training.tracking import check_log

    for name in ("data", "out"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name} is not given")
    check_log(config.log, given.out)


def loaders(given: argparse.Namespace, model: TimmModel, config: TrainConfig) -> Loaders:
    """The loaders of training, validation and calibration images, preprocessed for `model`."""
    from skd import data
    from skd.commands import _work as work

    opened = partial(work.open_split, given, model, require_split=True)
    training = opened(given.train_split, training=True)
    validation = opened(given.val_split, training=False)
    # A stream can only be read once at a time.
    again = opened(given.train_split, training=True) if training.iterable else training
    return data.loaders(data.Sources(training, validation, again), model, config, group=given.group)


def finish(
    given: argparse.Namespace,
    history: skd.History,
    supernet: skd.SuperNet,
    config: TrainConfig,
    batches: Loaders,
    product: str,
    conversion: dict[str, ImagesRead] | None = None,
) -> Document:
    """Write the report, print the table of the curve, and return what --json writes."""
    from skd.commands import _work as work
    from skd.support.ranks import rank_of, together
    from skd.training.report import write_report  # and with it matplotlib

    folder = Path(given.out)
    with together(given.group):
        if rank_of(given.group) == 0:
            write_report(folder, history, supernet, config)
    if history.curve:
        work.print_sizes(history.curve, f"{folder / product}: best epoch {(history.best_epoch or 0) + 1}")
    images = work.images_read(
        given, training=batches.train, validation=batches.validation, calibration=batches.calibration
    )
    images["images"] = (conversion or {}) | images["images"]
    print(f"wrote {folder / product} and {folder / 'report.md'}")
    return {
        "out": str(folder),
        "file": str(folder / product),
        "original_top1": history.original_top1,
        "best_epoch": history.best_epoch,
        "area": history.area,
        "curve": history.curve,
        "entries": len(supernet.dropout_list),
        **work.weights_taken(given),
        **images,
        "config": config.to_dict(),
    }


COMMAND = Command(
    help="train a super-network by progressive importance-aware dropout",
    description="PIAD training: the list of nested sub-networks grows by importance, every step trains one. Writes "
    "supernet.safetensors (the best weights so far), dropout_list.json, history.jsonl, report.md and checkpoints/ to "
    "--out. SIGTERM or Ctrl-C: a checkpoint, then a clean end.",
    arguments=arguments,
    files=files,
    run=run,
    shares=True,
    order=4,
)
