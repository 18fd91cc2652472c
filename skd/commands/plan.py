"""``skd plan``: sizes in minutes, without any training."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import skd
from skd import planners
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.settings import CONVENTIONS
from skd.support.types import Document

if TYPE_CHECKING:
    from skd.data import Loader


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd convert wrote")
    parser.add_argument("--out", metavar="FILE", required=True, help="super-network to write; may be the same file")
    options.add_data(parser)
    options.add_calibration(parser)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--target", type=float, help="share of the MACs that the smallest has removed (default: 0.875)")
    options.add_latency_ms(goal, "or milliseconds for a batch, within which the smallest is by --latency-table")
    options.add_latency_table(parser)
    parser.add_argument(
        "--rounds", type=options.whole, default=10, help="rounds of the planner (default: %(default)s)"
    )
    parser.add_argument(
        "--planner", choices=planners.names(), default="loss", help="decides what to narrow (default: %(default)s)"
    )
    parser.add_argument(
        "--planner-options",
        metavar="JSON",
        type=options.json_object,
        default={},
        help="of the planner's own, such as '{\"points\": 8}'; its option compensated, if it has one, is by default "
        "whether corrections follow: with --compensate, or moments made now or stored in the file",
    )
    parser.add_argument(
        "--keep",
        metavar="JSON",
        type=options.json_object,
        default={},
        help="smallest widths that modules may get, such as '{\"0.mlp\": 64}'",
    )
    parser.add_argument(
        "--exclude",
        metavar="NAME,...",
        type=options.names,
        default=[],
        help="modules that stay whole, such as 11.attn",
    )
    parser.add_argument("--convention", choices=CONVENTIONS, default="full", help="of MACs (default: %(default)s)")
    parser.add_argument(
        "--compensate",
        type=options.shares,
        metavar="X,X,...",
        help="for the largest sub-network within each of these shares of the MACs: predict what it drops from what "
        "it keeps, and store the corrections for evaluate and extract",
    )
    options.add_moments(parser)
    options.add_device(parser)


def files(given: argparse.Namespace) -> Files:
    return Files(
        reads=options.options(given, "supernet", "latency_table") | options.data_read(given),
        writes=options.options(given, "out"),
        in_place=[("--out", "--supernet")],  # it only adds to it
    )


def run(given: argparse.Namespace) -> Document:
    from skd.commands import _work as work
    from skd.support.curve import sizes_of, usual_entries

    work.model_file(given.out)
    supernet = work.supernet(given.supernet, work.device(given))
    table = work.latency_table(given, supernet)
    batches = work.calibration(given, supernet.model)
    planners.check_options(given.planner, given.planner_options)
    if given.moments:  # before planning, which would measure them again
        skd.moments(supernet, batches, progress=work.progress("Moments"), group=given.group)
    start = time.perf_counter()
    supernet.dropout_list = skd.plan(
        supernet,
        batches,
        target=given.target,
        latency_ms=given.latency_ms,
        latency=table if given.latency_ms is not None else None,
        rounds=given.rounds,
        convention=given.convention,
        progress=work.progress("Planning"),
        group=given.group,
        planner=given.planner,
        keep=given.keep,
        exclude=given.exclude,
        **_planner_options(given, supernet),
    )
    seconds = time.perf_counter() - start
    compensation = {} if given.compensate is None else _compensate(given, supernet, batches)
    work.write(supernet, given.out, given.group)
    rows = sizes_of(supernet, list(dict.fromkeys([*usual_entries(supernet), len(supernet.dropout_list) - 1])), table)
    images = work.images_read(given, calibration=batches)
    work.print_sizes(rows, f"{given.out}: {len(supernet.dropout_list)} sub-networks, some of them")
    print(f"planned in {seconds:.1f} s")
    work.print_moments(supernet)
    return {
        "out": given.out,
        "entries": len(supernet.dropout_list),
        "seconds": seconds,
        "subnetworks": rows,
        "moments_bytes": work.moments_bytes(supernet),
        **compensation,
        **images,
    }


def _planner_options(given: argparse.Namespace, supernet: skd.SuperNet) -> dict[str, object]:
    """With `compensated`, where the planner has it: plan for the networks as they will be, corrected or not."""
    corrected = given.compensate is not None or bool(supernet.moments)
    told = {"compensated": corrected} if "compensated" in planners.option_names(given.planner) else {}
    return told | given.planner_options


def _compensate(given: argparse.Namespace, supernet: skd.SuperNet, batches: Loader) -> Document:
    """Correct the sub-networks within the shares of --compensate; print what that took.

    A plan rarely ends exactly at its target, and it must not be lost for that: in place of a share that no
    sub-network is within, the smallest one is corrected.
    """
    from skd.commands import _work as work
    from skd.support.curve import entries_within

    start, last = time.perf_counter(), len(supernet.dropout_list) - 1
    within = entries_within(supernet, given.compensate, given.convention)
    beyond = [share for share in given.compensate if share not in within]
    if beyond:
        named = ", ".join(f"{share:g}" for share in beyond)
        print(f"--compensate: no sub-network is within {named} of the MACs; the smallest is corrected")
    skd.compensate(
        supernet,
        batches,
        entries=[*within.values(), *([last] if beyond else [])],
        progress=work.progress("Compensating"),
        group=given.group,
    )
    seconds = time.perf_counter() - start
    found = work.corrections(supernet)
    work.print_corrections(found, f"in {seconds:.1f} s")
    return {"corrections": found, "compensation_seconds": seconds}


COMMAND = Command(
    help="nested sub-networks of every size, without any training",
    description="Measure importance on training images and give the super-network its dropout list.",
    arguments=arguments,
    files=files,
    run=run,
    shares=True,
    order=3,
)
