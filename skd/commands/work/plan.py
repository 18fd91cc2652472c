"""``skd plan``: sizes in minutes, without any training."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands.work import common, models
from skd.curve import entries_within, sizes_of
from skd.files import save
from skd.planning import plan
from skd.ranks import rank_of, together
from skd.settings import TrainConfig


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
        planner=arguments.planner,
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
