"""The command ``skd``. One function per subcommand; what it returns is what ``--json`` writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from skd.outputs import output_file, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 for a user's mistake, 1 for a failed disk."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.json is not None:
            output_file(arguments.json, "--json")
        document = arguments.run(arguments)
        if arguments.json is not None:
            write_json(arguments.json, document)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    from skd import __version__

    parser = argparse.ArgumentParser(
        prog="skd", description="Turn one pre-trained Vision Transformer into a super-network of every size."
    )
    parser.add_argument("--version", action="version", version=f"skd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_info):
        command = add(commands)
        command.add_argument("--json", metavar="FILE", help="write what was printed to FILE as JSON")
    return parser


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    from skd.demo import EPOCHS

    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="the whole method on real data in minutes, on a CPU",
        description="Train a small Vision Transformer on scikit-learn's digits, convert it, plan its sub-networks, "
        "extract and evaluate them. Needs no download and no GPU.",
    )
    parser.add_argument(
        "--out", default="skd-demo", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="of the stand-in's training (default: %(default)s)"
    )
    parser.set_defaults(run=demo)
    return parser


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from skd.demo import run_demo

    return run_demo(arguments.out, seed=arguments.seed, epochs=arguments.epochs)


def _add_info(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info",
        help="versions, and what is compiled",
        description="Show the versions in use, what is compiled, and each operation's implementations.",
    )
    parser.set_defaults(run=info)
    return parser


def info(arguments: argparse.Namespace) -> dict[str, Any]:
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
    console = Console()
    console.print(table, "", operations, sep="\n")
    return document


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)
