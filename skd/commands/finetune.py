"""``skd finetune``: a training run of a plain model, such as an extracted sub-network, with nothing dropped."""

from __future__ import annotations

import argparse

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.commands.train import RECORDS, add_run, check_given, finish, loaders
from skd.support.outputs import Files
from skd.support.settings import finetune_config
from skd.support.types import Document

PRODUCT = "model.safetensors"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(
        parser, "file of skd extract, or a name in timm (with --model-kwargs and the like)", required=True
    )
    add_run(parser, finetune_config())


def files(given: argparse.Namespace) -> Files:
    return Files(
        reads=options.model_read(given) | options.options(given, "config") | options.data_read(given),
        folders={"--out": (given.out, [PRODUCT, *RECORDS])},
    )


def run(given: argparse.Namespace) -> Document:
    from skd.commands import _work as work
    from skd.data import seeded

    config, _ = options.settings(given, finetune_config())
    check_given(given, config)
    with seeded(config.seed, "weights"):  # a resumed run must start from the same weights, also if they are random
        model = work.plain_model(given, instead="extract a model from it, or skd train it")
    model = model.to(work.device(given))
    batches = loaders(given, model, config)
    history = skd.finetune(
        model,
        batches.train,
        batches.validation,
        config,
        out=given.out,
        resume=given.resume,
        group=given.group,
    )
    return finish(given, history, skd.SuperNet(model, copy=False), config, batches, PRODUCT)


COMMAND = Command(
    help="train a plain model, such as an extracted sub-network",
    description="Fine-tune an extracted sub-network, or train any timm Vision Transformer; the same recipe with "
    "nothing dropped. Writes model.safetensors, history.jsonl, report.md and checkpoints/ to --out.",
    arguments=arguments,
    files=files,
    run=run,
    shares=True,
    order=7,
)
