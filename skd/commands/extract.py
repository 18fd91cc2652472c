"""``skd extract``: one sub-network as a plain timm model."""

from __future__ import annotations

import argparse

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.settings import CONVENTIONS
from skd.support.types import Document


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--supernet", metavar="FILE", required=True, help="what skd plan or train wrote")
    budget = parser.add_mutually_exclusive_group(required=True)
    options.add_size(budget)
    options.add_latency_table(parser)
    parser.add_argument("--convention", choices=CONVENTIONS, default="full", help="of --macs (default: %(default)s)")
    options.add_correction(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="model to write (.safetensors)")


def files(given: argparse.Namespace) -> Files:
    return Files(reads=options.options(given, "supernet", "latency_table"), writes=options.options(given, "out"))


def run(given: argparse.Namespace) -> Document:
    import torch

    from skd.commands import _work as work
    from skd.extract import choose_entry
    from skd.support.curve import sizes_of

    work.model_file(given.out)
    supernet = work.supernet(given.supernet, torch.device("cpu"))
    table = work.latency_table(given, supernet)
    entry = choose_entry(
        supernet,
        macs=given.macs,
        params=given.params,
        entry=given.entry,
        latency_ms=given.latency_ms,
        latency=table if given.latency_ms is not None else None,
        convention=given.convention,
    )
    compensated = given.compensate is not None or (entry in supernet.corrections and not given.uncorrected)
    cut = skd.extract(supernet, entry=entry, corrected=given.compensate or not given.uncorrected)
    work.write(cut, given.out, given.group)
    rows = sizes_of(supernet, [entry], table)
    work.print_sizes(rows, given.out)
    if given.compensate is not None:
        print("with a correction from the stored moments folded in")
    elif compensated:
        print("with its correction folded in (skd plan --compensate)")
    return {"out": given.out, **rows[0], "compensated": compensated}


COMMAND = Command(
    help="a sub-network of any size as a plain timm model",
    description="Cut the largest sub-network within a budget out of a super-network.",
    arguments=arguments,
    files=files,
    run=run,
    order=5,
)
