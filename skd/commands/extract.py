"""``skd extract``: one sub-network as a plain timm model."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import arguments as options
from skd.outputs import Files
from skd.settings import CONVENTIONS


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "extract",
        description="Cut the largest sub-network within a budget out of a super-network.",
    )
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd plan or train wrote")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--macs", type=options.size, metavar="X", help="a share of the full network (0.5), or a count (4.2G)"
    )
    budget.add_argument("--params", type=options.size, metavar="X", help="a share (0.5), or a count (22M)")
    budget.add_argument("--entry", type=options.whole, metavar="I", help="index into the dropout list")
    parser.add_argument("--convention", choices=CONVENTIONS, default="full", help="of --macs (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", required=True, help="model to write (.safetensors)")
    parser.set_defaults(run="extract.run", files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(reads=options.options(arguments, "supernet"), writes=options.options(arguments, "out"))
