"""``skd info``: what is installed and compiled, or what is in a file."""

from __future__ import annotations

import argparse
from typing import Any

from skd.outputs import Files


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info",
        description="Without FILE: the versions in use, what is compiled, and each operation's implementations. With "
        "FILE: the architecture, size and sub-networks of a super-network or model that skd wrote.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="a .safetensors file of skd's")
    parser.set_defaults(run="info.run", files=files)
    return parser


def files(arguments: argparse.Namespace) -> Files:
    return Files(reads={"FILE": arguments.file})
