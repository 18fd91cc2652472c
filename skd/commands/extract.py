"""``skd extract``: one sub-network as a plain timm model."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from skd.commands import common, models
from skd.curve import sizes_of
from skd.extract import choose_entry, extract
from skd.files import save
from skd.outputs import Files
from skd.prices import CONVENTIONS

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "extract",
        description="Cut the largest sub-network within a budget out of a super-network.",
    )
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd plan or train wrote")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--macs", type=size, metavar="X", help="a share of the full network (0.5), or a count (4.2G)")
    budget.add_argument("--params", type=size, metavar="X", help="a share (0.5), or a count (22M)")
    budget.add_argument("--entry", type=int, metavar="I", help="index into the dropout list")
    parser.add_argument("--convention", choices=CONVENTIONS, default="full", help="of --macs (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", required=True, help="model to write (.safetensors)")
    parser.set_defaults(run=run, files=files)
    return parser


def size(text: str) -> int | float:
    """'0.5' is a share, '4.2G' or '1000000' a count."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        number = float(text) if unit is None else round(float(text[:-1]) * unit)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (number > 1 and number != int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 0.5 nor a count such as 4.2G")
    return number if number <= 1 and unit is None else int(number)


def files(arguments: argparse.Namespace) -> Files:
    return Files(reads=common.options(arguments, "supernet"), writes=common.options(arguments, "out"))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    models.model_file(arguments.out)
    supernet = common.supernet(arguments.supernet, torch.device("cpu"))
    entry = choose_entry(
        supernet,
        macs=arguments.macs,
        params=arguments.params,
        entry=arguments.entry,
        convention=arguments.convention,
    )
    save(extract(supernet, entry=entry), arguments.out)
    rows = sizes_of(supernet, [entry])
    common.print_sizes(rows, arguments.out)
    return {"out": arguments.out, **rows[0]}
