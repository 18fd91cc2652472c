"""``skd demo``: the whole method on real images in minutes."""

from __future__ import annotations

import argparse
from typing import Any

from skd import demo
from skd.outputs import Files


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        description="Train a small Vision Transformer on scikit-learn's digits, convert it, train it as a "
        "super-network, extract and evaluate sub-networks. Needs no download and no GPU.",
    )
    parser.add_argument(
        "--out", default="skd-demo", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=demo.EPOCHS, help="of the stand-in's training (default: %(default)s)"
    )
    parser.set_defaults(run=run, files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(folders={"--out": (arguments.out, demo.FILES)})


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return demo.run_demo(arguments.out, seed=arguments.seed, epochs=arguments.epochs)
