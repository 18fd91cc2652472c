"""``skd info``: what is installed and compiled, or what is in a file."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from skd.commands.work import common
from skd.cost import cost
from skd.curve import entries_within, sizes_of
from skd.files import load
from skd.settings import TrainConfig
from skd.supernet import SuperNet
from skd_kernels import build_info


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return _installation() if arguments.file is None else _file(arguments.file)


def _installation() -> dict[str, Any]:
    document = build_info()
    table = Table(show_header=False, box=None)
    for name, value in document.items():
        if name != "implementations":
            table.add_row(name.replace("_", " "), _readable(value))
    operations = Table("operation", "implementations, best first", title="skd_kernels", title_justify="left")
    for name, implementations in document["implementations"].items():
        operations.add_row(name, ", ".join(implementations))
    Console().print(table, "", operations, sep="\n")
    return document


def _file(path: str) -> dict[str, Any]:
    network = load(path)
    model = network.model if isinstance(network, SuperNet) else network
    full, linear = cost(network), cost(network, convention="linear")
    document: dict[str, Any] = {
        "file": path,
        "kind": "supernet" if isinstance(network, SuperNet) else "model",
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
    if isinstance(network, SuperNet):
        last = len(network.dropout_list) - 1
        entries = list(dict.fromkeys([*entries_within(network, TrainConfig().budgets).values(), last]))
        document |= {"entries": last + 1, "subnetworks": sizes_of(network, entries)}
        common.print_sizes(document["subnetworks"], f"{last + 1} sub-networks, some of them")
    return document


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
