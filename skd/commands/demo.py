"""``skd demo``: the whole method on real images in minutes."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import arguments as options
from skd.outputs import Files
from skd.settings import DEMO_EPOCHS


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        description="Train a small Vision Transformer on scikit-learn's digits, convert it, train it as a "
        "super-network, extract and evaluate sub-networks. Needs no download and no GPU.",
    )
    parser.add_argument(
        "--out", default="skd-demo", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--seed", type=options.whole, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=options.whole, default=DEMO_EPOCHS, help="of the stand-in's training (default: %(default)s)"
    )
    parser.set_defaults(run="demo.run", files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    from skd.demo import FILES  # and with it torch

    return Files(folders={"--out": (arguments.out, FILES)})
