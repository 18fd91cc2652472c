"""``skd benchmark``: the sizes of a super-network timed against the full network."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.types import Document

if TYPE_CHECKING:
    from skd.benchmark import Times


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd plan or train wrote")
    options.add_sizes(parser)
    options.add_timing(parser)
    parser.add_argument(
        "--compile", action="store_true", help="time each also with torch.compile, which takes a minute or more"
    )
    options.add_latency_table(
        parser, "what skd latency wrote: its predictions beside what is measured, with the settings of the table"
    )


def files(given: argparse.Namespace) -> Files:
    return Files(reads=options.options(given, "supernet", "latency_table"))


def run(given: argparse.Namespace) -> Document:
    from dataclasses import asdict

    from skd.benchmark import ROUNDS, benchmark, same_machine
    from skd.commands import _work as work
    from skd.latency import agreement

    table, settings = work.latency_table(given), work.timing(given)
    if table is not None:
        given.device = given.device or table.conditions.device
        settings = {name: getattr(table.conditions, name) for name in ("batch_size", "dtype", "threads")} | settings
    supernet = work.supernet(given.supernet, work.device(given))
    entries = work.listed_entries(given, supernet)
    rows, conditions = benchmark(supernet, entries, compiled=given.compile, latency=table, **settings)
    _print(rows, given.supernet)
    rounds = settings.get("rounds", ROUNDS)
    print(f"measured on {conditions}; medians of {rounds} rounds in turn")
    document: Document = {
        "supernet": given.supernet,
        "conditions": asdict(conditions),
        "rounds": rounds,
        "subnetworks": rows,
    }
    if table is None:
        return document
    if not same_machine(table.conditions, conditions):
        print(f"the table was measured on {table.conditions}")
    error, rank = agreement([row["latency_ms"] for row in rows], [row["ms"] for row in rows])
    print(f"predicted against measured: median error {error:.1%}, rank correlation {rank:.3f}")
    return {**document, "median_error": error, "rank_correlation": None if math.isnan(rank) else rank}


def _print(rows: list[Times], title: str) -> None:
    """Print the times, and how many times as fast as the full network each is."""
    from rich.console import Console
    from rich.table import Table

    compiled, predicted = (key in rows[0] for key in ("compiled_ms", "latency_ms"))
    table = Table(title=title, title_justify="left")
    headings = ["entry", "of the MACs", "ms", "spread", "speed-up"]
    headings += ["compiled, ms", "speed-up"] * compiled + ["predicted, ms", "error"] * predicted
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [str(row["entry"]), f"{row['macs_fraction']:.1%}", f"{row['ms']:.2f}", f"{row['spread_ms']:.2f}"]
        cells.append(f"{row['speedup']:.2f}x")
        cells += [f"{row['compiled_ms']:.2f}", f"{row['compiled_speedup']:.2f}x"] if compiled else []
        cells += [f"{row['latency_ms']:.2f}", f"{row['error']:+.1%}"] if predicted else []
        table.add_row(*cells)
    Console().print(table)


COMMAND = Command(
    help="the sizes of a super-network timed against the full network",
    description="Extract sub-networks and time them and the full network in turn, in evaluation mode and without "
    "gradients.",
    arguments=arguments,
    files=files,
    run=run,
    order=10,
)
