"""``skd extract``: one sub-network as a plain timm model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from skd.commands.work import common, models
from skd.curve import sizes_of
from skd.extract import choose_entry, extract
from skd.files import save


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
