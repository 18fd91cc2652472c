"""``skd export``: sub-networks in formats that others load."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.settings import CONVENTIONS
from skd.support.types import Document

if TYPE_CHECKING:
    from torch import nn

# What loads each layout of `skd.export.Member`.
_LOADED = {
    "timm": "timm alone loads it (local-dir:, hf-hub:, and transformers' TimmWrapper)",
    "model.py": "timm has no such network, so its own model.py loads it, with timm and without skd",
    "onnx": "any number of images, in float32",
    "pt2": "any number of images; torch.export.load loads it",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--supernet", metavar="FILE", help="what skd plan or train wrote")
    network.add_argument("--model", metavar="FILE", help="a plain model, as skd extract or finetune wrote it")
    budget = parser.add_mutually_exclusive_group()
    options.add_size(budget)
    budget.add_argument(
        "--all", type=options.shares, metavar="X,X", help="several shares of the MACs (0.25,0.5): a folder of them"
    )
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="full", help="of --macs and --all (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=("timm", "onnx", "pt2"),
        default="timm",
        help="a folder for timm, a file for ONNX Runtime, or a program of torch.export (default: %(default)s)",
    )
    options.add_latency_table(parser, "what skd latency wrote, to predict latencies, also those in a manifest")
    options.add_correction(parser)
    parser.add_argument(
        "--evaluated",
        metavar="FILE",
        help="what skd evaluate --json wrote: its top-1 goes into the manifest of --all",
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="of pt2: also a package of AOTInductor, which takes a minute (default: where there is a C++ compiler)",
    )
    parser.add_argument("--device", default="cpu", help="of pt2: where it is to run (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="a .onnx or .pt2 file; for timm and with --all a new folder"
    )


def files(given: argparse.Namespace) -> Files:
    reads = options.options(given, "supernet", "model", "evaluated", "latency_table")
    if given.all is not None or given.format == "timm":
        names = ("manifest.json", "macs-*", "config.json", "model.safetensors", "model.py")
        return Files(reads=reads, folders={"--out": (given.out, names)})
    more = {"--compiled": str(Path(given.out).with_suffix(".aoti.pt2"))} if given.format == "pt2" else {}
    return Files(reads=reads, writes=options.options(given, "out") | more)


def run(given: argparse.Namespace) -> Document:
    from skd.commands import _work as work
    from skd.export import export

    network = skd.load(given.supernet or given.model)
    if isinstance(network, skd.SuperNet) != (given.supernet is not None):
        option, other = ("--supernet", "--model") if given.supernet else ("--model", "--supernet")
        raise ValueError(f"{option} is {given.supernet or given.model!r}, which is for {other}")
    members = export(
        network,
        given.out,
        format=given.format,
        macs=given.macs,
        params=given.params,
        entry=given.entry,
        latency_ms=given.latency_ms,
        latency=work.latency_table(given),
        shares=given.all,
        convention=given.convention,
        corrected=given.compensate or not given.uncorrected,
        top1=None if given.evaluated is None else _top1(given, network),
        compiled=given.compiled,
        device=given.device,
    )
    correction = "a correction from the stored moments" if given.compensate else "its correction"
    for member in members:
        size = f"{work.count(member['macs'])} MACs (full), {member['params']:,} parameters"
        entry = "" if member["entry"] is None else f"entry {member['entry']}, "
        size += "" if member["latency_ms"] is None else f", predicted to take {member['latency_ms']:.2f} ms"
        more = f"; with {correction} folded in" if member["compensated"] else ""
        print(f"{', '.join(member['files'])}: {entry}{size}; {_LOADED[member['layout']]}{more}")
    return {"out": given.out, "format": given.format, "members": members}


def _top1(given: argparse.Namespace, network: nn.Module) -> dict[int, float]:
    """Top-1 by entry, from what skd evaluate --json wrote of this super-network.

    An entry that was measured with a correction, and is written without one or the other way round, is left out.

    Raises:
        ValueError: it is something else, or its entries have other sizes than those of the network.
    """
    from skd.export.writing import has_correction
    from skd.support.curve import sizes_of

    file: str = given.evaluated
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = document.get("curve", [document])
        found = {int(row["entry"]): (float(row["top1"]), int(row["macs"])) for row in rows}
        with_correction = document.get("corrections", rows if document.get("compensated") else [])
        measured = {int(row["entry"]) for row in with_correction}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        what = error.strerror if isinstance(error, OSError) else "it has no top-1 and MACs of entries"
        raise ValueError(f"--evaluated is {file!r}: {what}; it must be what skd evaluate --json wrote") from None
    if isinstance(network, skd.SuperNet):  # `export` refuses a plain model
        for entry, (_, macs) in found.items():
            (size,) = sizes_of(network, [entry])
            if size["macs"] != macs:
                raise ValueError(
                    f"--evaluated is {file!r}, of another super-network: its entry {entry} has {macs:,} MACs, "
                    f"and here it has {size['macs']:,}"
                )
        corrected = given.compensate or not given.uncorrected
        for entry in [entry for entry in found if entry]:
            before, after = entry in measured, has_correction(network, entry, corrected)
            if before != after:
                was, will = ("with", "without") if before else ("without", "with")
                text = f"entry {entry} was measured {was} a correction and is written {will} one: no top-1 of it"
                print(f"--evaluated: {text}")
                del found[entry]
    return {entry: top1 for entry, (top1, _) in found.items()}


COMMAND = Command(
    help="sub-networks for timm, ONNX Runtime and torch.export",
    description="Cut sub-networks out of a super-network and write them in a format that is loaded without skd.",
    arguments=arguments,
    files=files,
    run=run,
    order=8,
)
