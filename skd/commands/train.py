"""``skd train`` and ``skd finetune``: a training run on the user's own images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skd.commands import common
from skd.convert import convert
from skd.data import Loader, Source, calibration_loader, data_config, eval_loader, seeded, train_loader
from skd.files import load, save
from skd.outputs import Files, output_folder
from skd.ranks import check_same, rank_of, size_of, spread, together
from skd.supernet import SuperNet
from skd.training import History, TrainConfig, finetune, finetune_config, train
from skd.training.loop import RESUME

CONVERTED = "converted.safetensors"  # what --model becomes, in --out
# What both commands write to --out besides their networks.
RECORDS = ("history.jsonl", "run.json", "report.md", "report/*", "checkpoints/*")


def add_train(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        description="PIAD training: the list of nested sub-networks grows by importance, every step trains one. "
        "Writes supernet.safetensors (the best weights so far), dropout_list.json, history.jsonl, report.md and "
        "checkpoints/ to --out. SIGTERM or Ctrl-C: a checkpoint, then a clean end.",
    )
    parser.add_argument("--supernet", metavar="FILE", help="what skd convert wrote")
    common.add_model(
        parser,
        "in place of --supernet: a model of timm, converted first (default: the one that a recipe given as --config "
        "names, with timm's weights unless --checkpoint has others)",
        required=False,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build all, run a few steps on synthetic images, report"
    )
    _add_run(parser, TrainConfig())
    parser.set_defaults(run=run_train, files=train_files)
    return parser


def add_finetune(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "finetune",
        description="Fine-tune an extracted sub-network, or train any timm Vision Transformer; the same recipe with "
        "nothing dropped. Writes model.safetensors, history.jsonl, report.md and checkpoints/ to --out.",
    )
    common.add_model(
        parser, "file of skd extract, or a name in timm (with --model-kwargs and the like)", required=True
    )
    _add_run(parser, finetune_config())
    parser.set_defaults(run=run_finetune, files=finetune_files)
    return parser


def _add_run(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--resume", choices=[name for name in RESUME if name], help="go on where a run in --out stopped"
    )
    common.add_data(parser, required=False, loading=False)
    common.add_device(parser)
    common.add_settings(parser, defaults)


def train_files(arguments: argparse.Namespace) -> Files:
    products = ["supernet.safetensors", "dropout_list.json", *RECORDS]
    if arguments.supernet is None:  # else that one may be an earlier run's
        products.append(CONVERTED)
    return Files(
        reads=common.options(arguments, "supernet", "checkpoint", "config", "class_map", "data", "data_dir"),
        folders={"--out": (None if arguments.dry_run else arguments.out, products)},
    )


def finetune_files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=common.options(arguments, "model", "checkpoint", "config", "class_map", "data", "data_dir"),
        folders={"--out": (arguments.out, ["model.safetensors", *RECORDS])},
    )


def run_train(arguments: argparse.Namespace) -> dict[str, Any]:
    config, about = common.settings(arguments, TrainConfig(), "train")
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
    loaders = _loaders(arguments, supernet.model, config)
    history = train(
        supernet,
        loaders["train"],
        loaders["val"],
        config,
        calibration=loaders.get("calibration"),
        out=arguments.out,
        resume=arguments.resume,
        group=arguments.group,
    )
    return _finish(arguments, history, supernet, config, loaders, "supernet.safetensors")


def _supernet(arguments: argparse.Namespace, config: TrainConfig) -> SuperNet:
    """--supernet, or --model converted on the images that importance is measured on, and kept in --out."""
    where = common.device(arguments)
    if arguments.supernet is not None:
        if arguments.model is not None:
            raise ValueError("--supernet and --model are both given; it may be only one of them")
        return common.supernet(arguments.supernet, where)
    if arguments.model is None:
        raise ValueError("--supernet is not given (nor --model, nor as --config a recipe that names a model)")
    file = output_folder(arguments.out) / CONVERTED
    check_same(file.exists(), f"the presence of {CONVERTED} in --out", arguments.group)
    if file.exists() and arguments.resume is None:
        raise ValueError(f"{file} is there already; resume its run (--resume auto), or choose another folder")
    if file.exists():
        return common.supernet(str(file), where)
    model = common.build_model(arguments).to(where)
    spread(model, arguments.group)  # random weights differ from process to process
    images = common.source(arguments, model, arguments.train_split, training=True, require_split=True)
    batches = _calibration(arguments, images, model, config)
    supernet = convert(model, batches, progress=common.progress("Converting"), group=arguments.group)
    with together(arguments.group):
        if rank_of(arguments.group) == 0:
            save(supernet, file)
    return supernet


def run_finetune(arguments: argparse.Namespace) -> dict[str, Any]:
    config, _ = common.settings(arguments, finetune_config(), "finetune")
    for name in ("data", "out"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is not given")
    with seeded(config.seed, "weights"):  # where they are random, a resumed run is to find the same
        model = _plain_model(arguments)
    model = model.to(common.device(arguments))
    loaders = _loaders(arguments, model, config)
    history = finetune(
        model,
        loaders["train"],
        loaders["val"],
        config,
        out=arguments.out,
        resume=arguments.resume,
        group=arguments.group,
    )
    return _finish(arguments, history, SuperNet(model, copy=False), config, loaders, "model.safetensors")


def _plain_model(arguments: argparse.Namespace) -> Any:
    """--model as a file of skd's, or as a name in timm."""
    if not Path(arguments.model).is_file():
        return common.build_model(arguments)
    if arguments.pretrained or arguments.checkpoint or arguments.model_kwargs:
        raise ValueError(f"--model is {arguments.model!r}, a file; it has its own architecture and weights")
    model = load(arguments.model)
    if isinstance(model, SuperNet):
        raise ValueError(f"--model is {arguments.model!r}, a super-network; extract a model from it, or skd train it")
    return model


def _loaders(arguments: argparse.Namespace, model: Any, config: TrainConfig) -> dict[str, Loader]:
    """Training, validation and calibration batches, as the model wants its images."""
    images = data_config(model)
    training = common.source(arguments, model, arguments.train_split, training=True, require_split=True)
    validation = common.source(
        arguments, model, arguments.val_split, like=training, training=False, require_split=True
    )
    plain = training
    if training.iterable:  # a stream can only be read once at a time
        plain = common.source(arguments, model, arguments.train_split, training=True, require_split=True)
    shared: dict[str, Any] = {"workers": common.workers(config.workers), "bad_images": config.bad_images}
    shared |= common.shard(arguments) | common.placed(model)
    augmentation: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            *("scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "reprob", "remode", "recount"),
            "train_interpolation",
        )
    }
    loaders = {
        "train": train_loader(
            training,
            images,
            batch_size=config.batch_size // config.grad_accum_steps,
            seed=config.seed,
            aug_repeats=config.aug_repeats,
            **shared,
            **augmentation,
        ),
        "val": eval_loader(validation, images, batch_size=_evaluation_batch(arguments, config), **shared),
    }
    if config.growing_epochs:
        loaders["calibration"] = _calibration(arguments, plain, model, config)
    return loaders


def _calibration(arguments: argparse.Namespace, images: Source, model: Any, config: TrainConfig) -> Loader:
    """The un-augmented images that a network is converted on, and importance measured."""
    return calibration_loader(
        images,
        data_config(model),
        images=config.calibration_images,
        seed=config.seed,
        batch_size=_evaluation_batch(arguments, config),
        workers=common.workers(config.workers),
        bad_images=config.bad_images,
        **common.shard(arguments),
        **common.placed(model),
    )


def _evaluation_batch(arguments: argparse.Namespace, config: TrainConfig) -> int:
    """Images of all ranks together."""
    return config.validation_batch_size or min(config.batch_size, 256 * size_of(arguments.group))


def _finish(
    arguments: argparse.Namespace,
    history: History,
    supernet: SuperNet,
    config: TrainConfig,
    loaders: dict[str, Loader],
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
    print(f"wrote {folder / product} and {folder / 'report.md'}")
    return {
        "out": str(folder),
        "file": str(folder / product),
        "original_top1": history.original_top1,
        "best_epoch": history.best_epoch,
        "area": history.area,
        "curve": history.curve,
        "entries": len(supernet.dropout_list),
        "skipped_images": common.skipped(arguments, *loaders.values()),
        "config": config.to_dict(),
    }


def _dry_run(arguments: argparse.Namespace, config: TrainConfig, about: dict[str, Any]) -> dict[str, Any]:
    from skd.training.dry_run import dry_run

    if (arguments.supernet is None) == (arguments.model is None):
        raise ValueError("--dry-run needs exactly one of --supernet and --model (or a recipe that names a model)")
    where = common.device(arguments)
    if arguments.supernet is not None:
        supernet = common.supernet(arguments.supernet, where)
    else:
        arguments.pretrained = False  # what the weights are makes no difference
        supernet = SuperNet(common.build_model(arguments).to(where), copy=False)
    images = None
    if arguments.data is not None:
        images = len(common.source(arguments, supernet.model, arguments.train_split, training=True))
    document = dry_run(supernet, config, images)
    if "expected" in about:
        common.print_expected(about)
        document["expected"] = about["expected"]
    return document
