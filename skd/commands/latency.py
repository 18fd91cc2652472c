"""``skd latency``: a table of what modules take, which predicts the latency of every sub-network."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.types import Document

if TYPE_CHECKING:
    from skd.latency import LatencyTable


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd convert, plan or train wrote")
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("--out", metavar="FILE", help="table to write, as JSON")
    options.add_latency_table(table, "or one that was written, to predict from")
    options.add_sizes(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="of --out: time these sub-networks in the same rounds, and compare those to which the table is not "
        "fitted with what is predicted",
    )
    options.add_timing(parser)


def files(given: argparse.Namespace) -> Files:
    return Files(reads=options.options(given, "supernet", "latency_table"), writes=options.options(given, "out"))


def run(given: argparse.Namespace) -> Document:
    from skd.commands import _work as work
    from skd.support.curve import sizes_of
    from skd.support.outputs import output_file

    if given.out is not None:
        output_file(given.out, "--out")
    supernet = work.supernet(given.supernet, work.device(given))
    chosen = list(dict.fromkeys([0, *work.listed_entries(given, supernet)]))
    table = _table(given, supernet, chosen if given.check else [])
    table.check(supernet)
    if given.out is not None:
        table.save(given.out)
    _print(table)
    if given.check and not table.checked:
        print("nothing to check: the table is fitted to all of these sub-networks; --shares or --entries name others")
    rows = sizes_of(supernet, chosen, table)
    work.print_sizes(rows, f"Predicted for {given.supernet}")
    return {"out": given.out, "table": table.to_dict(), "subnetworks": rows}


def _table(given: argparse.Namespace, supernet: skd.SuperNet, check: list[int]) -> LatencyTable:
    """The table that was written earlier, or one that is measured now."""
    from skd.commands import _work as work

    settings = work.timing(given)
    if given.latency_table is None:
        return skd.measure_latency(supernet, check=check, **settings)
    settings |= {"check": True} if given.check else {}
    if settings:
        option = "--" + next(iter(settings)).replace("_", "-")
        raise ValueError(f"{option} is given with --latency-table; it is for a table that is measured (--out)")
    return skd.LatencyTable.load(given.latency_table)


def _print(table: LatencyTable) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Milliseconds of one module, beyond those of a skipped one", title_justify="left")
    shown.add_column("modules")
    for heading in ("width", "median", "spread"):
        shown.add_column(heading, justify="right")
    for curve in table.curves:
        names = curve.modules[0] + (f" and {len(curve.modules) - 1} alike" if len(curve.modules) > 1 else "")
        for width, ms, spread in zip(curve.widths, curve.ms, curve.spread_ms, strict=True):
            shown.add_row(names, str(width), f"{ms:.3f}", f"{spread:.3f}")
    Console().print(shown)
    print(f"measured on {table.conditions}; {table.rounds} rounds, {table.conditions.date}")
    for whole in table.whole:
        print(f"a whole network: {whole.ms:.2f} ms, by the table {float(table.at(whole.widths)):.2f} ms")
    for one in table.checked:
        ms = float(table.at(one.widths))
        print(f"checked: {one.ms:.2f} ms, predicted {ms:.2f} ms ({ms / one.ms - 1:+.1%})")
    if table.agreement is not None:
        print("median error {:.1%}, rank correlation {:.3f}".format(*table.agreement))
    for names, flags in table.flags.items():
        for flag in flags:
            print(f"slow on this device, {names}: {flag}")


COMMAND = Command(
    help="what modules take, which predicts the latency of every sub-network",
    description="Time attentions and MLPs at many widths, and write a table that predicts the latency of any "
    "sub-network: for --latency-ms of extract, export and plan.",
    arguments=arguments,
    files=files,
    run=run,
    order=9,
)
