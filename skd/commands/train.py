"""``skd train`` and ``skd finetune``: a training run on the user's own images."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import arguments as options
from skd.outputs import Files
from skd.settings import RESUME, TrainConfig, finetune_config

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
    options.add_model(
        parser,
        "in place of --supernet: a model of timm, converted first (default: the one that a recipe given as --config "
        "names, with timm's weights unless --checkpoint has others)",
        required=False,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build all, run a few steps on synthetic images, report"
    )
    _add_run(parser, TrainConfig())
    parser.set_defaults(run="train.run_train", files=train_files)
    return parser


def add_finetune(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "finetune",
        description="Fine-tune an extracted sub-network, or train any timm Vision Transformer; the same recipe with "
        "nothing dropped. Writes model.safetensors, history.jsonl, report.md and checkpoints/ to --out.",
    )
    options.add_model(
        parser, "file of skd extract, or a name in timm (with --model-kwargs and the like)", required=True
    )
    _add_run(parser, finetune_config())
    parser.set_defaults(run="train.run_finetune", files=finetune_files)
    return parser


def _add_run(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--resume", choices=[name for name in RESUME if name], help="go on where a run in --out stopped"
    )
    options.add_data(parser, required=False, loading=False)
    options.add_num_classes(parser)
    options.add_device(parser)
    options.add_settings(parser, defaults)


def train_files(arguments: argparse.Namespace) -> Files:
    products = ["supernet.safetensors", "dropout_list.json", *RECORDS]
    if arguments.supernet is None:  # else that one may be an earlier run's
        products.append(CONVERTED)
    return Files(
        reads=options.model_read(arguments)
        | options.options(arguments, "supernet", "config")
        | options.data_read(arguments),
        folders={"--out": (None if arguments.dry_run else arguments.out, products)},
    )


def finetune_files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=options.model_read(arguments) | options.options(arguments, "config") | options.data_read(arguments),
        folders={"--out": (arguments.out, ["model.safetensors", *RECORDS])},
    )
