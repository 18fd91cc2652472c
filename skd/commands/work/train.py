"""``skd train`` and ``skd finetune``: a training run on the user's own images."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from skd.commands import arguments as options
from skd.commands.train import CONVERTED
from skd.commands.work import common, models
from skd.convert import convert
from skd.data import Loaders, Sources, loaders, seeded
from skd.data.building import calibration
from skd.files import save
from skd.outputs import output_folder
from skd.ranks import check_same, rank_of, spread, together
from skd.supernet import SuperNet
from skd.training import History, TrainConfig, finetune, finetune_config, train


def run_train(arguments: argparse.Namespace) -> dict[str, Any]:
    config, about = options.settings(arguments, TrainConfig(), "train")
    if arguments.supernet is None and arguments.model is None and "model" in about:
        arguments.model = about["model"]
        arguments.pretrained = arguments.checkpoint is None
    if arguments.dry_run:
        if arguments.group is not None:
            raise ValueError("--dry-run measures one process; run it without torchrun")
        return _dry_run(arguments, config, about)
    for name in ("data", "out"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is not given")
    supernet = _supernet(arguments, config)
    batches = _loaders(arguments, supernet.model, config)
    history = train(
        supernet,
        batches.train,
        batches.validation,
        config,
        calibration=batches.calibration,
        out=arguments.out,
        resume=arguments.resume,
        group=arguments.group,
    )
    return _finish(arguments, history, supernet, config, batches, "supernet.safetensors")


def _supernet(arguments: argparse.Namespace, config: TrainConfig) -> SuperNet:
    """--supernet, or --model converted on the images that importance is measured on, and kept in --out."""
    where = common.device(arguments)
    if arguments.supernet is not None:
        if arguments.model is not None:
            raise ValueError("--supernet and --model are both given; it may be only one of them")
        return _given_supernet(arguments, where)
    if arguments.model is None:
        raise ValueError("--supernet is not given (nor --model, nor as --config a recipe that names a model)")
    file = output_folder(arguments.out) / CONVERTED
    check_same(file.exists(), f"the presence of {CONVERTED} in --out", arguments.group)
    if file.exists() and arguments.resume is None:
        raise ValueError(f"{file} is there already; resume its run (--resume auto), or choose another folder")
    if file.exists():
        return common.supernet(str(file), where)
    model = models.build_model(arguments).to(where)
    models.warn_if_random(arguments)
    spread(model, arguments.group)  # random weights differ from process to process
    images = common.source(arguments, model, arguments.train_split, training=True, require_split=True)
    batches = calibration(images, model, config, arguments.group)
    supernet = convert(model, batches, progress=common.progress("Converting"), group=arguments.group)
    arguments.conversion = common.images_read(arguments, conversion=batches)["images"]
    with together(arguments.group):
        if rank_of(arguments.group) == 0:
            save(supernet, file)
    return supernet


def _given_supernet(arguments: argparse.Namespace, where: Any) -> SuperNet:
    """--supernet, with the head that --num-classes asks for."""
    models.check_no_weights(arguments)
    supernet: SuperNet = models.with_new_head(common.supernet(arguments.supernet, where), arguments)
    return supernet


def run_finetune(arguments: argparse.Namespace) -> dict[str, Any]:
    config, _ = options.settings(arguments, finetune_config(), "finetune")
    for name in ("data", "out"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is not given")
    with seeded(config.seed, "weights"):  # where they are random, a resumed run is to find the same
        model = models.plain_model(arguments)
    model = model.to(common.device(arguments))
    batches = _loaders(arguments, model, config)
    history = finetune(
        model,
        batches.train,
        batches.validation,
        config,
        out=arguments.out,
        resume=arguments.resume,
        group=arguments.group,
    )
    return _finish(arguments, history, SuperNet(model, copy=False), config, batches, "model.safetensors")


def _loaders(arguments: argparse.Namespace, model: Any, config: TrainConfig) -> Loaders:
    """Training, validation and calibration batches, as the model wants its images."""
    opened = partial(common.open_split, arguments, model, require_split=True)
    training = opened(arguments.train_split, training=True)
    validation = opened(arguments.val_split, training=False)
    # A stream can only be read once at a time.
    again = opened(arguments.train_split, training=True) if training.iterable else training
    return loaders(Sources(training, validation, again), model, config, group=arguments.group)


def _finish(
    arguments: argparse.Namespace,
    history: History,
    supernet: SuperNet,
    config: TrainConfig,
    batches: Loaders,
    product: str,
) -> dict[str, Any]:
    """The report, the table, and what --json writes."""
    from skd.training.report import write_report  # and with it matplotlib

    folder = Path(arguments.out)
    with together(arguments.group):
        if rank_of(arguments.group) == 0:
            write_report(folder, history, supernet, config)
    if history.curve:
        common.print_sizes(history.curve, f"{folder / product}: best epoch {(history.best_epoch or 0) + 1}")
    images = common.images_read(
        arguments, training=batches.train, validation=batches.validation, calibration=batches.calibration
    )
    images["images"] = getattr(arguments, "conversion", {}) | images["images"]
    print(f"wrote {folder / product} and {folder / 'report.md'}")
    return {
        "out": str(folder),
        "file": str(folder / product),
        "original_top1": history.original_top1,
        "best_epoch": history.best_epoch,
        "area": history.area,
        "curve": history.curve,
        "entries": len(supernet.dropout_list),
        **models.weights_taken(arguments),
        **images,
        "config": config.to_dict(),
    }


def _dry_run(arguments: argparse.Namespace, config: TrainConfig, about: dict[str, Any]) -> dict[str, Any]:
    from skd.training.dry_run import dry_run

    if (arguments.supernet is None) == (arguments.model is None):
        raise ValueError("--dry-run needs exactly one of --supernet and --model (or a recipe that names a model)")
    where = common.device(arguments)
    if arguments.supernet is not None:
        supernet = _given_supernet(arguments, where)
    else:
        arguments.pretrained = False  # what the weights are makes no difference
        supernet = SuperNet(models.build_model(arguments).to(where), copy=False)
    images, left_out = None, {}
    if arguments.data is not None:
        training = common.source(arguments, supernet.model, arguments.train_split, training=True)
        images, left_out = len(training), training.left_out.to_dict()
        if left_out:
            print(f"{training.name}: left out: {training.left_out}")
    document = dry_run(supernet, config, images) | {"left_out": left_out}
    if "expected" in about:
        common.print_expected(about)
        document["expected"] = about["expected"]
    return document
