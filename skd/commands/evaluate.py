"""``skd evaluate``: top-1 of a model, of one sub-network, or of the whole accuracy-MACs curve."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import arguments as options
from skd.outputs import Files
from skd.settings import CONVENTIONS


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        description="Top-1 accuracy on validation images. Of a super-network: all sub-networks on a grid of budgets "
        "in one pass, or the one that --entry, --macs or --params names.",
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--supernet", metavar="FILE", help="what skd convert, plan or train wrote")
    network.add_argument(
        "--model",
        metavar="FILE",
        help="a plain model, such as skd extract wrote; or a name in timm, with its weights (--checkpoint FILE: your "
        "own, before any conversion)",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--entry", type=options.whole, metavar="I", help="one sub-network, by its index")
    one.add_argument(
        "--macs", type=options.size, metavar="X", help="the largest within a share (0.5) or a count (4.2G)"
    )
    one.add_argument("--params", type=options.size, metavar="X", help="likewise, of parameters")
    one.add_argument(
        "--budgets", type=float, nargs="+", metavar="X", help="shares of the MACs to measure (default: twelfths)"
    )
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="full", help="of --macs and --budgets (default: %(default)s)"
    )
    options.add_weights(parser)
    options.add_data(parser)
    options.add_device(parser)
    parser.set_defaults(run="evaluate.run", files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=options.model_read(arguments) | options.options(arguments, "supernet") | options.data_read(arguments)
    )
