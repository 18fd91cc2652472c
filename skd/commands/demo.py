"""``skd demo``: the whole method on real images in minutes."""

from __future__ import annotations

import argparse

from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.settings import DEMO_EPOCHS
from skd.support.types import Document


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="skd-demo", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--seed", type=options.whole, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=options.whole, default=DEMO_EPOCHS, help="of the stand-in's training (default: %(default)s)"
    )


def files(given: argparse.Namespace) -> Files:
    from skd.demo.running import FILES

    return Files(folders={"--out": (given.out, FILES)})


def run(given: argparse.Namespace) -> Document:
    from skd.demo import running

    return running.run_demo(given.out, seed=given.seed, epochs=given.epochs)


COMMAND = Command(
    help="the whole method on real data in minutes, on a CPU",
    description="Train a small Vision Transformer on scikit-learn's digits, convert it, train it as a super-network, "
    "extract and evaluate sub-networks. Needs no download and no GPU.",
    arguments=arguments,
    files=files,
    run=run,
    order=1,
)
