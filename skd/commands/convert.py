"""``skd convert``: a timm model to a super-network file."""

from __future__ import annotations

import argparse

import skd
from skd.commands import Command
from skd.commands import _arguments as options
from skd.support.outputs import Files
from skd.support.settings import CENTERINGS, NEURONS, QK, V
from skd.support.types import Document


def arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(
        parser,
        "name in timm, such as deit_small_patch16_224, hf-hub:USER/MODEL or local-dir:FOLDER; not needed for skd's "
        "own file, which is a --checkpoint",
        required=False,
    )
    options.add_num_classes(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="super-network to write (.safetensors)")
    options.add_data(parser)
    options.add_calibration(parser)
    parser.add_argument("--centering", choices=CENTERINGS, default="dataset", help="'batch' is the published way")
    parser.add_argument("--qk", choices=QK, default=QK[0], help="bases of queries and keys (default: %(default)s)")
    parser.add_argument("--v", choices=V, default=V[0], help="bases of values (default: %(default)s)")
    parser.add_argument("--neurons", choices=NEURONS, default=NEURONS[0], help="their order (default: %(default)s)")
    parser.add_argument(
        "--attention-group", type=int, metavar="N", help="coordinates of a head that one step removes"
    )
    options.add_moments(parser)
    options.add_device(parser)


def files(given: argparse.Namespace) -> Files:
    return Files(
        reads=options.model_read(given) | options.data_read(given),
        writes=options.options(given, "out"),
    )


def run(given: argparse.Namespace) -> Document:
    from skd.commands import _work as work
    from skd.support.ranks import spread

    work.model_file(given.out)
    model = work.build_model(given).to(work.device(given))
    spread(model, given.group)  # random weights, and dropped-in layers, differ from process to process
    work.warn_if_random(given)
    batches = work.calibration(given, model)
    supernet = skd.convert(
        model,
        batches,
        centering=given.centering,
        labels=given.labels,
        qk=given.qk,
        v=given.v,
        neurons=given.neurons,
        attention_group=given.attention_group,
        moments=given.moments,
        progress=work.progress("Converting"),
        group=given.group,
    )
    work.write(supernet, given.out, given.group)
    full, linear = skd.cost(supernet), skd.cost(supernet, convention="linear")
    images = work.images_read(given, calibration=batches)
    print(
        f"{given.out}: {full.params:,} parameters, {work.count(full.macs)} MACs (full), "
        f"{work.count(linear.macs)} (linear); next: skd train, or skd plan"
    )
    work.print_moments(supernet)
    return {
        "out": given.out,
        "moments_bytes": work.moments_bytes(supernet),
        **work.weights_taken(given),
        "macs": full.macs,
        "macs_linear": linear.macs,
        "params": full.params,
        **images,
    }


COMMAND = Command(
    help="a timm model to a super-network, its function unchanged",
    description="Rotate and reorder the weights of a timm Vision Transformer so that leading coordinates know the "
    "most (WPAC), by one pass over some training images. Its function does not change.",
    arguments=arguments,
    files=files,
    run=run,
    shares=True,
    order=2,
)
