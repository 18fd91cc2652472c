"""``skd convert``: a timm model to a super-network file."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import common, models
from skd.convert import CENTERINGS, convert
from skd.cost import cost
from skd.files import save
from skd.outputs import Files
from skd.ranks import rank_of, spread, together


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        description="Rotate and reorder the weights of a timm Vision Transformer so that leading coordinates know "
        "the most (WPAC), by one pass over some training images. Its function does not change.",
    )
    models.add_model(
        parser,
        "name in timm, such as deit_small_patch16_224, hf-hub:USER/MODEL or local-dir:FOLDER; not needed for skd's "
        "own file, which is a --checkpoint",
        required=False,
    )
    models.add_num_classes(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="super-network to write (.safetensors)")
    common.add_data(parser)
    common.add_calibration(parser)
    parser.add_argument("--centering", choices=CENTERINGS, default="dataset", help="'batch' is the published way")
    common.add_device(parser)
    parser.set_defaults(run=run, files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=models.reads(arguments) | common.data_read(arguments),
        writes=common.options(arguments, "out"),
    )


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
