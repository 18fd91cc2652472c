"""``skd plan``: sizes in minutes, without any training."""

from __future__ import annotations

import argparse
from typing import Any

from skd import planners
from skd.commands import arguments as options
from skd.outputs import Files
from skd.settings import CONVENTIONS


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        description="Measure importance on training images and give the super-network its dropout list.",
    )
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd convert wrote")
    parser.add_argument("--out", metavar="FILE", required=True, help="super-network to write; may be the same file")
    options.add_data(parser)
    options.add_calibration(parser)
    parser.add_argument(
        "--target", type=float, default=0.875, help="share of the MACs that the smallest has removed (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=options.whole, default=10, help="rounds of the planner (default: %(default)s)"
    )
    parser.add_argument(
        "--planner", choices=planners.names(), default="paper", help="decides what to narrow (default: %(default)s)"
    )
    parser.add_argument("--convention", choices=CONVENTIONS, default="full", help="of MACs (default: %(default)s)")
    options.add_device(parser)
    parser.set_defaults(run="plan.run", files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=options.options(arguments, "supernet") | options.data_read(arguments),
        writes=options.options(arguments, "out"),
        in_place=[("--out", "--supernet")],  # it only adds to it
    )
