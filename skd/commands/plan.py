"""``skd plan``: sizes in minutes, without any training."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import common, models
from skd.curve import entries_within, sizes_of
from skd.files import save
from skd.outputs import Files
from skd.planning import plan
from skd.prices import CONVENTIONS
from skd.ranks import rank_of, together
from skd.training.config import TrainConfig


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        description="Measure importance on training images and give the super-network its dropout list.",
    )
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd convert wrote")
    parser.add_argument("--out", metavar="FILE", required=True, help="super-network to write; may be the same file")
    common.add_data(parser)
    common.add_calibration(parser)
    parser.add_argument(
        "--target", type=float, default=0.875, help="share of the MACs that the smallest has removed (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="importance passes (default: %(default)s)")
    parser.add_argument("--convention", choices=CONVENTIONS, default="full", help="of MACs (default: %(default)s)")
    common.add_device(parser)
    parser.set_defaults(run=run, files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=common.options(arguments, "supernet") | common.data_read(arguments),
        writes=common.options(arguments, "out"),
        in_place=[("--out", "--supernet")],  # it only adds to it
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    models.model_file(arguments.out)
    supernet = common.supernet(arguments.supernet, common.device(arguments))
    batches = common.calibration(arguments, supernet.model)
    supernet.dropout_list = plan(
        supernet,
        batches,
        target=arguments.target,
        rounds=arguments.rounds,
        convention=arguments.convention,
        progress=common.progress("Planning"),
        group=arguments.group,
    )
    with together(arguments.group):
        if rank_of(arguments.group) == 0:
            save(supernet, arguments.out)
    entries = list(
        dict.fromkeys([*entries_within(supernet, TrainConfig().budgets).values(), len(supernet.dropout_list) - 1])
    )
    rows = sizes_of(supernet, entries)
    images = common.images_read(arguments, calibration=batches)
    common.print_sizes(rows, f"{arguments.out}: {len(supernet.dropout_list)} sub-networks, some of them")
    return {"out": arguments.out, "entries": len(supernet.dropout_list), "subnetworks": rows, **images}
