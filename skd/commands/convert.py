"""``skd convert``: a timm model to a super-network file."""

from __future__ import annotations

import argparse
from typing import Any

from skd.commands import arguments as options
from skd.outputs import Files
from skd.settings import CENTERINGS


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        description="Rotate and reorder the weights of a timm Vision Transformer so that leading coordinates know "
        "the most (WPAC), by one pass over some training images. Its function does not change.",
    )
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
    options.add_device(parser)
    parser.set_defaults(run="convert.run", files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=options.model_read(arguments) | options.data_read(arguments),
        writes=options.options(arguments, "out"),
    )
