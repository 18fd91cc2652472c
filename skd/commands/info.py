"""``skd info``: what is installed and compiled, or what a file holds."""

from __future__ import annotations

import argparse

import skd
from skd.commands import Command
from skd.support.outputs import Files
from skd.support.types import Document


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="a .safetensors file of skd's")


def files(given: argparse.Namespace) -> Files:
    return Files(reads={"FILE": given.file})


def run(given: argparse.Namespace) -> Document:
    return _installation() if given.file is None else _file(given.file)


def _installation() -> Document:
    from rich.console import Console
    from rich.table import Table

    from skd_kernels import build_info

    document = build_info()
    table = Table(show_header=False, box=None)
    for name, value in document.items():
        if name != "implementations":
            table.add_row(name.replace("_", " "), _readable(value))
    operations = Table("operation", "implementations, best first", title="skd_kernels", title_justify="left")
    for name, implementations in document["implementations"].items():
        operations.add_row(name, ", ".join(implementations))
    Console().print(table, "", operations, sep="\n")
    return dict(document)


def _file(path: str) -> Document:
    from rich.console import Console
    from rich.table import Table

    from skd.commands import _work as work
    from skd.support.curve import sizes_of, usual_entries

    network = skd.load(path)
    model = network.model if isinstance(network, skd.SuperNet) else network
    full, linear = skd.cost(network), skd.cost(network, convention="linear")
    document: Document = {
        "file": path,
        "kind": "supernet" if isinstance(network, skd.SuperNet) else "model",
        "architecture": model.pretrained_cfg.get("architecture"),
        "classes": model.num_classes,
        "input_size": list(model.pretrained_cfg["input_size"]),
        "params": full.params,
        "macs": full.macs,
        "macs_linear": linear.macs,
    }
    table = Table(show_header=False, box=None)
    for name, value in document.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else _readable(value))
    Console().print(table)
    if isinstance(network, skd.SuperNet):
        last = len(network.dropout_list) - 1
        rows = sizes_of(network, list(dict.fromkeys([*usual_entries(network), last])))
        document |= {"entries": last + 1, "subnetworks": rows}
        work.print_sizes(rows, f"{last + 1} sub-networks, some of them")
        document["corrections"] = found = work.corrections(network)
        work.print_corrections(found)
        document["moments_bytes"] = work.moments_bytes(network)
        work.print_moments(network)
    return document


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


COMMAND = Command(
    help="versions and what is compiled; or what is in a file",
    description="Without FILE: the versions in use, what is compiled, and each operation's implementations. With "
    "FILE: the architecture, size and sub-networks of a super-network or model that skd wrote.",
    arguments=arguments,
    files=files,
    run=run,
    order=11,
)
