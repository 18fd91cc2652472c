"""``skd convert``: a timm model to a super-network file."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands.work import common, models
from skd.convert import convert
from skd.cost import cost
from skd.files import save
from skd.ranks import rank_of, spread, together


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    writes = rank_of(arguments.group) == 0
    models.model_file(arguments.out)
    model = models.build_model(arguments).to(common.device(arguments))
    spread(model, arguments.group)  # random weights, and dropped-in layers, differ from process to process
    models.warn_if_random(arguments)
    batches = common.calibration(arguments, model)
    supernet = convert(
        model,
        batches,
        centering=arguments.centering,
        labels=arguments.labels,
        progress=common.progress("Converting"),
        group=arguments.group,
    )
    with together(arguments.group):
        if writes:
            save(supernet, arguments.out)
    full, linear = cost(supernet), cost(supernet, convention="linear")
    images = common.images_read(arguments, calibration=batches)
    print(
        f"{arguments.out}: {full.params:,} parameters, {common.count(full.macs)} MACs (full), "
        f"{common.count(linear.macs)} (linear); next: skd train, or skd plan"
    )
    return {
        "out": arguments.out,
        **models.weights_taken(arguments),
        "macs": full.macs,
        "macs_linear": linear.macs,
        "params": full.params,
        **images,
    }
